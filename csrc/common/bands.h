// A resize along one side as a band of weights: what the drivers hand to their kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "resize.h"

namespace pcmecl {

// One side's weights, rows of new pixels over columns of old ones, as the band that is not 0.
struct BandWeights {
  int64_t before, after;
  std::vector<int64_t> first;                // (after,)
  std::vector<std::vector<double>> weights;  // of each new pixel, from its first old one on
};

inline BandWeights resize_weights(Filter filter, int64_t before, int64_t after) {
  BandWeights band = {before, after, {}, {}};
  for (int64_t pixel = 0; pixel < after; ++pixel) {
    const ResizeWindow window = resize_window(filter, pixel, before, after);
    std::vector<double> weights;
    double total = 0;
    for (int64_t old = window.first; old < window.last; ++old) {
      weights.push_back(resize_weight(window, old));
      total += weights.back();
    }
    for (double& weight : weights) weight /= total;
    band.first.push_back(window.first);
    band.weights.push_back(weights);
  }
  return band;
}

inline BandWeights transposed(const BandWeights& band) {
  BandWeights other = {band.after, band.before, std::vector<int64_t>(band.before, 0), {}};
  other.weights.resize(band.before);
  for (int64_t pixel = 0; pixel < band.after; ++pixel)
    for (size_t tap = 0; tap < band.weights[pixel].size(); ++tap) {
      const int64_t old = band.first[pixel] + int64_t(tap);
      // Windows move on with their pixel, so those that hold an old pixel follow one another.
      if (other.weights[old].empty()) other.first[old] = pixel;
      other.weights[old].push_back(band.weights[pixel][tap]);
    }
  return other;
}

// The same number of taps for every pixel, all inside the old ones.
template <typename C>
struct BandTable {
  std::vector<int32_t> first;
  std::vector<C> weights;
  int64_t before, after, taps = 1;

  explicit BandTable(const BandWeights& band) : before(band.before), after(band.after) {
    for (const auto& weights : band.weights) taps = std::max<int64_t>(taps, int64_t(weights.size()));
    weights.resize(taps * after, C(0));
    for (int64_t pixel = 0; pixel < after; ++pixel) {
      const int64_t start = std::min(band.first[pixel], before - taps);
      first.push_back(int32_t(start));
      for (size_t tap = 0; tap < band.weights[pixel].size(); ++tap)
        weights[(band.first[pixel] - start + int64_t(tap)) * after + pixel] = C(band.weights[pixel][tap]);
    }
  }
};

}  // namespace pcmecl
