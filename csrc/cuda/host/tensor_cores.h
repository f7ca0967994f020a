// mma.sync.m16n8k16 on the host: what a lane gets, from what the lanes of its warp hold.
#pragma once

#include "harness.h"

namespace pcmecl::host {

enum class Factors { kHalf, kBFloat16 };

// c += A·B by the fragments of ../tensor_cores.h; returns to the place in the kernel that a report names.
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Factors factors);

}  // namespace pcmecl::host
