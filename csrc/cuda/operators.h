// What the CUDA operators share. Python's drivers (pcmecl_fast/ops/backends/cuda) allocate and hand over the addresses
// of contiguous tensors, as kernels.h shapes them, in float32, float16 or bfloat16. A function's first arguments are
// the device, its stream and the tensors' dtype; where none is given, all is in float32. A scale's value is never read.
// Nothing here knows the device: under the host harness it is the CPU.
#pragma once

#include "../common/binding.h"
#include "../common/directions.h"
#include "../common/dtype.h"
#include "kernels.h"
#include "on.h"

namespace pcmecl::cuda {

// A scale on the device, or where that is missing a number.
inline Scale scale_of(Address on_device, double number) { return {on_device.of<const float>(), float(number)}; }

}  // namespace pcmecl::cuda
