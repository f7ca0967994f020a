// What both of tree_attention's files know of a tree's layout.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace pcmecl::cuda {

// Where a token's own segment begins and ends; a token of the prefix has none.
struct Span {
  int begin, end;

  __device__ Span(const TreeLayout& layout, int token) : begin(0), end(0) {
    if (token < layout.prefix) return;
    int low = 0, high = layout.segments - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (int(layout.end[middle]) > token)
        high = middle;
      else
        low = middle + 1;
    }
    begin = low == 0 ? layout.prefix : int(layout.end[low - 1]);
    end = int(layout.end[low]);
  }
};

}  // namespace pcmecl::cuda
