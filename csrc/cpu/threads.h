// Ranges over OpenMP's threads. They are PyTorch's own where both find one libgomp, which they do if PyTorch is loaded
// first: it makes its libgomp's symbols global.
#pragma once

#include <cstdint>

namespace pcmecl::cpu {

// The number of threads to use at most: `asked`, or one in a process that was forked, where OpenMP's are gone.
int usable_threads(int asked);

// f(begin, end, thread) over parts of [0, count), each of `grain` units at least.
template <typename F>
void parallel(int threads, int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  const int64_t parts = (count + grain - 1) / grain;
  const int usable = parts > 1 ? usable_threads(threads) : 1;
  if (usable == 1) return f(int64_t(0), count, 0);
  // Always as many as PyTorch has: libgomp ends threads that a smaller team leaves out, and starts them anew.
#pragma omp parallel for num_threads(usable) schedule(static, 1)
  for (int thread = 0; thread < usable; ++thread) {
    const int64_t used = parts < usable ? parts : usable, each = (count + used - 1) / used;
    const int64_t begin = thread * each, end = begin + each < count ? begin + each : count;
    if (begin < end) f(begin, end, thread);
  }
}

}  // namespace pcmecl::cpu
