"""csrc/common/dtype.h on the host, where the harness computes by it: the same bits as PyTorch's conversions."""

import ctypes
import subprocess

import cuda_on_host
import pytest
import torch

pytestmark = pytest.mark.skipif(not cuda_on_host.compiler(), reason="needs a C++ compiler and the sources")
SOURCE = """
#include "common/dtype.h"

template <typename T>
void narrow(const float* from, uint16_t* to, long count) {
  for (long i = 0; i < count; ++i) to[i] = T(from[i]).bits;
}
template <typename T>
void widen(const uint16_t* from, float* to, long count) {
  for (long i = 0; i < count; ++i) {
    T x;
    x.bits = from[i];
    to[i] = x;
  }
}
extern "C" {
void narrow_float16(const float* from, uint16_t* to, long count) { narrow<pcmecl::Half>(from, to, count); }
void narrow_bfloat16(const float* from, uint16_t* to, long count) { narrow<pcmecl::BFloat16>(from, to, count); }
void widen_float16(const uint16_t* from, float* to, long count) { widen<pcmecl::Half>(from, to, count); }
void widen_bfloat16(const uint16_t* from, float* to, long count) { widen<pcmecl::BFloat16>(from, to, count); }
}
"""
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtype")
    (folder / "dtype.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{cuda_on_host.CSRC}"]
    subprocess.run([cuda_on_host.compiler(), *flags, folder / "dtype.cpp", "-o", folder / "dtype.so"], check=True)
    return ctypes.CDLL(str(folder / "dtype.so"))


def run(library, way, x, to, dtype):
    result = torch.empty(x.shape, dtype=to)
    function = getattr(library, f"{way}_{str(dtype).removeprefix('torch.')}")
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(result.data_ptr()), ctypes.c_long(len(x)))
    return result


@dtypes
def test_every_number_widens_to_itself(library, dtype):
    widened, expected = run(library, "widen", EVERY, torch.float32, dtype), EVERY.view(dtype).float()
    same = widened.view(torch.int32) == expected.view(torch.int32)
    assert (same | (widened.isnan() & expected.isnan())).all()


@dtypes
def test_numbers_narrow_to_the_nearest_and_ties_to_even(library, dtype):
    each = EVERY.view(dtype).float()
    each = each[each.isfinite()].double().sort().values
    ties = ((each[1:] + each[:-1]) / 2).float()
    beyond = torch.tensor([65519.0, 65520.0, 65536.0, 3.3e38, torch.inf, torch.nan, 2.0**-25, 2.0**-149, 0.0])
    drawn = torch.randint(-(2**31), 2**31, (2**20,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    near = [torch.nextafter(ties, torch.tensor(towards)) for towards in (-torch.inf, torch.inf)]
    x = torch.cat([each.float(), ties, *near, beyond, -beyond, drawn.view(torch.float32)])
    narrowed, expected = run(library, "narrow", x, torch.int16, dtype), x.to(dtype)
    same = narrowed == expected.view(torch.int16)
    assert (same | (narrowed.view(dtype).isnan() & expected.isnan())).all()
    assert (narrowed[x.isnan()] != -1).all()  # which would be taken for memory that nothing has written
