// Maths that the CPU and the GPU share is inline and carries this mark.
#pragma once

#ifdef __CUDACC__
#define PCMECL_HD __host__ __device__ __forceinline__
#else
#define PCMECL_HD inline __attribute__((always_inline))
#endif
