#include "quantized.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

#include "numbers.h"

namespace moebius {
namespace {

// Magnitudes of quantized values add up to this many runs at least, and to this on average: rounding then errs by a
// thousandth of the mean magnitude or less, and moving sums from 16 to 32 bits costs little.
constexpr float kLeastRuns = 0.7f;
constexpr float kMeanMagnitude = 320;
constexpr float kLargestCode = 255;

struct Magnitude {
  float sum, largest;
};

Magnitude magnitude(const float* values, int count) {
  constexpr int kParts = 16;  // sums in a fixed order that vectorizes
  std::array<float, kParts> sums{}, largest{};
  int j = 0;
  for (; j + kParts <= count; j += kParts)
    for (int i = 0; i < kParts; ++i) {
      const float size = std::fabs(values[j + i]);
      sums[i] += size;
      largest[i] = largest[i] < size ? size : largest[i];
    }
  for (; j < count; ++j) {
    sums[0] += std::fabs(values[j]);
    largest[0] = std::max(largest[0], std::fabs(values[j]));
  }
  float sum = 0, most = 0;
  for (int i = 0; i < kParts; ++i) sum += sums[i], most = std::max(most, largest[i]);
  return {sum, most};
}

}  // namespace

void Quantized::round(const float* from, int count, float wanted_step, const Level& level) {
  // What is not finite must stay so: the step carries it to every output, as a product in floating point would.
  step = count == 0 || wanted_step < kSmallestStep ? 0 : wanted_step;
  values.assign(padded(count), 0);
  if (step > 0 && std::isfinite(step)) level.round(from, count, 1 / step, values.data());
  total = 0;
  int32_t part = 0;
  for (int j = 0; j < count; j += 4096, total += part) {
    part = 0;
    for (int i = j; i < std::min(count, j + 4096); ++i) part += values[i];
  }
}

void Quantized::for_rows(const float* from, int count, const Level& level) {
  const Magnitude size = magnitude(from, count);
  const float wanted = std::max(kMeanMagnitude * static_cast<float>(count), kLeastRuns * kLargestRun);
  round(from, count, std::max(size.sum / wanted, size.largest / kLargestRun), level);
  runs.assign(1, 0);
  for (int j = 0, sum = 0; j < count; ++j) {
    const int value = std::abs(static_cast<int>(values[j]));
    if (sum + value > kLargestRun) runs.push_back(j), sum = 0;
    sum += value;
  }
  runs.push_back(count);
}

void Quantized::for_columns(const float* from, int count, const Level& level) {
  constexpr float kLargest = kLargestRun / (kPadding / kLanes);  // a lane can take what one run has at least
  const Magnitude size = magnitude(from, count);
  const float wanted = std::max(kMeanMagnitude * static_cast<float>(count), kLeastRuns * kLargestRun * kLanes);
  round(from, count, std::max(size.sum / wanted, size.largest / kLargest), level);
  runs.assign(1, 0);
  std::array<int32_t, kLanes> sums{};
  for (int j = 0; j < count; j += kPadding) {
    std::array<int32_t, kLanes> more{};
    for (int i = 0; i < kPadding; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) more[lane] += std::abs(static_cast<int>(values[j + i + lane]));
    int32_t worst = 0;
    for (int lane = 0; lane < kLanes; ++lane) worst = std::max(worst, sums[lane] + more[lane]);
    if (worst > kLargestRun) runs.push_back(j), sums = more;
    else
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += more[lane];
  }
  runs.push_back(count);
}

void Quantized::for_codes(const float* from, int count, const Level& level) {
  const Magnitude size = magnitude(from, count);
  const float by_sum = size.sum * 1.01f / (2147483648.0f / kLargestCode - 0.5f * static_cast<float>(count));
  round(from, count, std::max(by_sum, size.largest / kLargestDigits), level);
}

}  // namespace moebius
