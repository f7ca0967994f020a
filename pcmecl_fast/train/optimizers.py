"""Adam and Muon as the trainers use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SCHULZ = (3.4445, -4.7750, 2.0315)
_SCHULZ_STEPS = 5
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fused_adam(*groups: Iterable[nn.Parameter], **options: Any) -> torch.optim.Adam:
    """`torch.optim.Adam` in one pass over memory where all parameters are real, which is what it takes.

    On a CPU the pass goes through memory without a look at strides. States that are loaded are therefore laid out as
    their parameters are: a checkpoint made on another device has its own layout.

    Args:
        groups: the parameters of each group, which has a rate of its own.
        options: Adam's.
    """
    listed = [{"params": list(parameters)} for parameters in groups]
    real = all(x.is_floating_point() for group in listed for x in group["params"])
    adam = torch.optim.Adam(listed, fused=real, **options)
    adam.register_load_state_dict_post_hook(_lay_out)
    return adam


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, x in state.items():
            if isinstance(x, Tensor) and x.shape == parameter.shape and x.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=x.dtype).copy_(x)


class Muon(torch.optim.Optimizer):
    r"""Momentum whose matrices are made orthogonal: every direction that a layer could move in moves as far.

        m ← μ m + (1 − μ) g,   w ← w − lr · 0.2 √max(rows, columns) · orthogonal(μ m + (1 − μ) g)

    Muon (Jordan et al. 2024), with steps as long as Adam's usual ones (Liu et al. 2025), so that a learning rate found
    for one is a fair start for the other. A filter counts as the matrix (outputs, all the rest). `torch.optim.Muon`
    takes matrices alone, one after the other and in bfloat16, for which few CPUs have instructions.

    Args:
        parameters: of two or more dimensions.
        momentum: μ.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float = 1e-3, *, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        found = None
        if closure is not None:
            with torch.enable_grad():
                found = closure()
        for group in self.param_groups:
            learning = [x for x in group["params"] if x.grad is not None]
            moves = orthogonal([self._moving(x, group["momentum"]) for x in learning])
            for x, move in zip(learning, moves, strict=True):
                x.add_(move.reshape(x.shape), alpha=-group["lr"] * 0.2 * max(move.shape) ** 0.5)
        return found

    def _moving(self, x: Tensor, momentum: float) -> Tensor:  # (rows, columns)
        assert x.grad is not None
        state = self.state[x]
        if not state:
            state["momentum"] = torch.zeros_like(x)
        state["momentum"].lerp_(x.grad, 1 - momentum)
        return x.grad.lerp(state["momentum"], momentum).flatten(1)


def matrices_of(network: nn.Module) -> list[nn.Parameter]:
    """The weights that `Muon` is for: those of linear layers and of convolutions, as far as they learn."""
    layers = [layer for layer in network.modules() if isinstance(layer, _LAYERS)]
    # Not `layer.weight`: what a parametrization computes is no parameter, and computing it changes spectral norms.
    weights = dict.fromkeys(dict(layer.named_parameters(recurse=False)).get("weight") for layer in layers)
    return [x for x in weights if x is not None and x.requires_grad and x.is_floating_point()]


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    r"""U Vᵀ of each X = U S Vᵀ, roughly: singular values become about 0.7 to 1.1, the smallest less.

        X ← X / ‖X‖,  then five times  X ← (a + b A + c A²) X,  A = X Xᵀ                          (Newton–Schulz)

    All steps multiply X from the left by something made of the first A. So they are taken on the products alone, which
    are small and of which those of one size go together; each X is read twice, however wide. Zero stays zero.
    """
    exact = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in matrices]
    wide = [x if x.shape[0] <= x.shape[1] else x.mT for x in exact]
    by_height: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for place, x in enumerate(wide):
        by_height.setdefault((len(x), x.dtype, x.device), []).append(place)
    found: list[Tensor] = list(wide)
    for places in by_height.values():
        lefts = _schulz(torch.stack([wide[place] @ wide[place].mT for place in places]))
        for place, left in zip(places, lefts, strict=True):
            found[place] = left @ wide[place]
    turned = [y if y.shape == x.shape else y.mT for x, y in zip(matrices, found, strict=True)]
    return [y.to(x.dtype) for x, y in zip(matrices, turned, strict=True)]


def _schulz(
    product: Tensor,  # (K, m, m), each X Xᵀ
) -> Tensor:  # (K, m, m): what makes each X orthogonal, from the left
    a, b, c = _SCHULZ
    squared = product.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=torch.finfo(product.dtype).tiny)
    product = product / squared
    left = squared.rsqrt()
    for step in range(_SCHULZ_STEPS):
        move = torch.baddbmm(product, product, product, beta=b, alpha=c)
        move.diagonal(dim1=-2, dim2=-1).add_(a)
        left = move @ left if step else move * left
        if step < _SCHULZ_STEPS - 1:
            product = move @ product @ move
    return left


class Learning:
    """The optimisers of networks that learn together: Adam, and Muon for their matrices where it is wanted.

    Args:
        networks: each with its learning rate.
        matrices: what Muon learns.
    """

    def __init__(self, networks: Sequence[tuple[nn.Module, float]], matrices: Iterable[nn.Parameter] = ()) -> None:
        by_muon = set(matrices)
        self.rates = [rate for _, rate in networks]
        parameters = [list(network.parameters()) for network, _ in networks]
        self.adam = fused_adam(*([x for x in own if x not in by_muon] for own in parameters), betas=(0.5, 0.99))
        groups = [{"params": [x for x in own if x in by_muon]} for own in parameters]
        self.muon = Muon(groups) if by_muon else None

    def zero_grad(self) -> None:
        for optimizer in self._all():
            optimizer.zero_grad(set_to_none=True)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        for optimizer in self._all():
            scaler.unscale_(optimizer)

    def step(self, scaler: torch.amp.GradScaler) -> None:
        for optimizer in self._all():
            scaler.step(optimizer)

    def set_rates(self, part: float) -> None:
        """The networks' learning rates, times `part`."""
        for optimizer in self._all():
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * part

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict() | ({} if self.muon is None else {"muon": self.muon.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state)
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])

    def _all(self) -> list[torch.optim.Optimizer]:
        """Those that have something to learn: a scaler refuses to step without a gradient."""
        both = [self.adam] if self.muon is None else [self.adam, self.muon]
        return [x for x in both if any(group["params"] for group in x.param_groups)]
