// Autograd around a pair of functions on tensors, without a step through Python:
//
//   forward(arguments…) -> result, or a tuple (result, saved…)
//   backward(grad, arguments…, [result,] saved…, needs) -> a gradient, or none, for each of some arguments
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace pcmecl {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename F>
struct Signature;
template <typename R, typename... A>
struct Signature<R (*)(A...)> {
  using Result = R;
  using Arguments = std::tuple<std::decay_t<A>...>;
  static constexpr size_t count = sizeof...(A);
};

inline std::tuple<Tensor> as_tuple(Tensor result) { return {std::move(result)}; }
template <typename... R>
std::tuple<R...> as_tuple(std::tuple<R...> results) {
  return results;
}

inline const Tensor* tensor_in(const Tensor& x) { return &x; }
inline const Tensor* tensor_in(const std::optional<Tensor>& x) { return x ? &*x : nullptr; }
template <typename T>
const Tensor* tensor_in(const T&) {
  return nullptr;
}

// The gradients of a backward under create_graph: they can be used, but not differentiated again.
struct NotTwice : torch::autograd::Function<NotTwice> {
  // `tensors`: the gradients, then all that they depend on.
  static variable_list forward(AutogradContext* ctx, const char* name, size_t gradients, at::TensorList tensors) {
    ctx->saved_data["name"] = std::string(name);
    return tensors.slice(0, gradients).vec();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, ctx->saved_data["name"].toStringRef(),
        ": the compiled backends have no second derivative; use backend='reference'");
  }
};

// `differentiable`: positions of the arguments that have a gradient, in the order of the backward's results.
template <auto forward_, auto backward_, size_t... differentiable>
class Differentiable : public torch::autograd::Function<Differentiable<forward_, backward_, differentiable...>> {
  using Arguments = typename Signature<decltype(forward_)>::Arguments;
  static constexpr size_t kArguments = std::tuple_size_v<Arguments>;
  static constexpr size_t kKept = Signature<decltype(backward_)>::count - kArguments - 2;
  using Results = decltype(as_tuple(std::declval<typename Signature<decltype(forward_)>::Result>()));
  static constexpr size_t kFirstKept = std::tuple_size_v<Results> - kKept;  // 0 where the result is kept, too

  // What the backward needs beside tensors, which autograd keeps.
  struct Rest : torch::CustomClassHolder {
    const char* name;
    Arguments arguments;

    Rest(const char* name, Arguments arguments) : name(name), arguments(std::move(arguments)) {}
  };

 public:
  template <typename... A>
  static Tensor call(const char* name, const A&... arguments) {
    const auto all = std::forward_as_tuple(arguments...);
    if (at::GradMode::is_enabled() && (requires_grad(std::get<differentiable>(all)) || ...))
      return Differentiable::apply(name, arguments...);
    return std::get<0>(run([&] { return forward_(arguments...); }));
  }

  template <typename... A>
  static Tensor forward(AutogradContext* ctx, const char* name, const A&... arguments) {
    Results results = run([&] { return forward_(arguments...); });
    variable_list kept;
    const auto keep = [&](const auto& x) {
      if (const Tensor* tensor = tensor_in(x)) kept.push_back(*tensor);
    };
    (keep(arguments), ...);
    for_kept([&](auto k) { kept.push_back(std::get<kFirstKept + k>(results)); });
    ctx->save_for_backward(std::move(kept));
    ctx->set_materialize_grads(false);
    auto rest = c10::make_intrusive<Rest>(name, Arguments(arguments...));
    std::apply([](auto&... own) { (forget(own), ...); }, rest->arguments);
    ctx->saved_data["rest"] = c10::IValue::make_capsule(std::move(rest));
    return std::get<0>(results);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(1 + kArguments);  // the first is the name's
    if (!grads[0].defined()) return gradients;
    const auto rest = c10::static_intrusive_pointer_cast<Rest>(ctx->saved_data["rest"].toCapsule());
    const variable_list saved = ctx->get_saved_variables();
    Arguments arguments = rest->arguments;
    size_t next = 0;
    std::vector<bool> needed(kArguments);
    for_arguments([&](auto k) {
      if (!remembered(std::get<k>(arguments), saved, next)) return;
      needed[k] = ctx->needs_input_grad(next++);
    });
    const std::vector<bool> needs = {needed[differentiable]...};
    const auto computed = std::apply(
        [&](const auto&... own) {
          return run_backward(grads[0], saved, next, needs, std::make_index_sequence<kKept>(), own...);
        },
        arguments);
    size_t at = 0;
    ((gradients[1 + differentiable] = at < computed.size() && needs[at] ? *computed[at] : Tensor(), ++at), ...);
    if (at::GradMode::is_enabled()) forbid_twice(rest->name, gradients, grads[0], saved);
    return gradients;
  }

 private:
  static bool requires_grad(const Tensor& x) { return x.requires_grad(); }
  static bool requires_grad(const std::optional<Tensor>& x) { return x && x->requires_grad(); }

  // Tensors give way to an empty one, which still says that there is one.
  static void forget(Tensor& x) { x = Tensor(); }
  static void forget(std::optional<Tensor>& x) {
    if (x) x = Tensor();
  }
  template <typename T>
  static void forget(T&) {}

  static bool remembered(Tensor& x, const variable_list& saved, size_t at) { return x = saved[at], true; }
  static bool remembered(std::optional<Tensor>& x, const variable_list& saved, size_t at) {
    return x && (x = saved[at], true);
  }
  template <typename T>
  static bool remembered(T&, const variable_list&, size_t) {
    return false;
  }

  // Outside autograd and autocast.
  template <typename F>
  static Results run(F&& function) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return as_tuple(function());
  }

  template <size_t... kept, typename... A>
  static auto run_backward(
      const Tensor& grad, const variable_list& saved, size_t first_kept, const std::vector<bool>& needs,
      std::index_sequence<kept...>, const A&... arguments) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return backward_(grad.contiguous(), arguments..., saved[first_kept + kept]..., needs);
  }

  static void forbid_twice(const char* name, variable_list& gradients, const Tensor& grad, const variable_list& saved) {
    variable_list defined;
    for (const Tensor& gradient : gradients)
      if (gradient.defined()) defined.push_back(gradient);
    const size_t count = defined.size();
    defined.push_back(grad);
    defined.insert(defined.end(), saved.begin(), saved.end());
    const variable_list once = NotTwice::apply(name, count, at::TensorList(defined));
    size_t next = 0;
    for (Tensor& gradient : gradients)
      if (gradient.defined()) gradient = once[next++];
  }

  template <typename F>
  static void for_arguments(F&& f) {
    for_each(std::make_index_sequence<kArguments>(), f);
  }
  template <typename F>
  static void for_kept(F&& f) {
    for_each(std::make_index_sequence<kKept>(), f);
  }
  template <size_t... k, typename F>
  static void for_each(std::index_sequence<k...>, F& f) {
    (f(std::integral_constant<size_t, k>()), ...);
  }
};

}  // namespace pcmecl
