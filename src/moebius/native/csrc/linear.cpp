#include "linear.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "linear_portable.h"
#include "numbers.h"
#include "threads.h"

namespace moebius {
namespace {

constexpr int kRowsPerTask = 64;

const LinearLevel& linear_of(const Level& level) {
  if (&level == avx512_level()) return *avx512_linear();
  if (&level == avx2_level()) return *avx2_linear();
  return *scalar_linear();
}

// A vector in integers: values[j] · step, padded with zeros.
struct Vector {
  std::vector<float> floats;
  std::vector<int16_t> values, arranged;
  std::vector<int32_t> centres;  // of every block: what its levels are shifted by, twice
  float step = 0;
  int64_t total = 0;

  void round(const void* inputs, size_t first, int columns, bool bf16, int bits, const Level& level) {
    const int padded = (columns + kLinearPadding - 1) / kLinearPadding * kLinearPadding;
    floats.resize(columns);
    if (bf16) {
      const auto* from = static_cast<const uint16_t*>(inputs) + first;
      for (int j = 0; j < columns; ++j) {
        const uint32_t wide = static_cast<uint32_t>(from[j]) << 16;
        std::memcpy(&floats[j], &wide, sizeof wide);
      }
    } else {
      std::copy_n(static_cast<const float*>(inputs) + first, columns, floats.data());
    }
    // What is not finite must stay so: the step carries it to every output, as a product in floating point would.
    std::array<float, 16> largest{}, strange{};
    for (int j = 0; j < columns; ++j) {
      const float size = std::fabs(floats[j]);
      largest[j % 16] = largest[j % 16] < size ? size : largest[j % 16];
      strange[j % 16] += size * 0.0f;  // NaN for what is not finite
    }
    float most = 0, not_finite = 0;
    for (int i = 0; i < 16; ++i) most = std::max(most, largest[i]), not_finite += strange[i];
    const float wanted = most / kLargestDigits;
    step = (wanted < kSmallestStep ? 0 : wanted) + not_finite;
    values.assign(padded, 0);
    if (step > 0 && std::isfinite(step)) level.round(floats.data(), columns, 1 / step, values.data());
    arranged.resize(padded);
    linear_of(level).arrange(values.data(), padded, bits, arranged.data());
    centres.resize(padded / kBlock);
    total = 0;
    for (int b = 0; b < padded / kBlock; ++b) {
      int32_t sum = 0;
      for (int i = 0; i < kBlock; ++i) sum += values[b * kBlock + i];
      centres[b] = sum * 15;
      total += sum;
    }
  }
};

std::vector<Vector>& kept(int count) {
  static thread_local std::vector<Vector> vectors;
  if (vectors.size() < static_cast<size_t>(count)) vectors.resize(count);
  return vectors;
}

}  // namespace

PackedLinear::PackedLinear(int rows, int columns, int bits, int group_size, const uint8_t* codes, const uint16_t* scales)
    : all_{codes,  codes + bytes_of(columns, bits) * rows,  bytes_of(columns, bits), rows, columns, bits,
           scales, (columns + group_size - 1) / group_size, group_size / kBlock} {}

LinearRows PackedLinear::part(int first, int count) const {
  LinearRows rows = all_;
  rows.codes += first * rows.stride;
  rows.scales += static_cast<size_t>(first) * rows.groups;
  rows.rows = count;
  return rows;
}

void PackedLinear::apply(const void* inputs, void* outputs, int count, bool bf16, const Level& level, int threads) const {
  if (all_.columns == 0) return void(std::memset(outputs, 0, static_cast<size_t>(count) * all_.rows * (bf16 ? 2 : 4)));
  auto& vectors = kept(count);
  for_each(count, threads, [&](int i) {
    vectors[i].round(inputs, static_cast<size_t>(i) * all_.columns, all_.columns, bf16, all_.bits, level);
  });
  const LinearLevel& linear = linear_of(level);
  for_each(tasks_of(all_.rows, kRowsPerTask), threads, [&](int task) {
    const int first = task * kRowsPerTask;
    const LinearRows rows = part(first, std::min(kRowsPerTask, all_.rows - first));
    std::array<int64_t, kRowsPerTask> totals;
    std::array<float, kRowsPerTask> sums;
    for (int i = 0; i < count; ++i) {
      const Vector& vector = vectors[i];
      if (all_.bits == 8) {
        linear.dot_bytes(rows, vector.arranged.data(), totals.data());
        for (int r = 0; r < rows.rows; ++r)
          sums[r] = portable_half(rows.scales[r]) * static_cast<float>(2 * totals[r] - 255 * vector.total);
      } else {
        linear.dot_nibbles(rows, vector.arranged.data(), vector.centres.data(), sums.data());
      }
      const size_t at = static_cast<size_t>(i) * all_.rows + first;
      for (int r = 0; r < rows.rows; ++r) sums[r] *= 0.5f * vector.step;
      if (bf16)
        for (int r = 0; r < rows.rows; ++r) static_cast<uint16_t*>(outputs)[at + r] = portable_rounded(sums[r]);
      else std::copy_n(sums.data(), rows.rows, static_cast<float*>(outputs) + at);
    }
  });
}

void PackedLinear::unpack(int first, int count, void* out, bool bf16, const Level& level, int threads) const {
  const LinearLevel& linear = linear_of(level);
  for_each(tasks_of(count, kRowsPerTask), threads, [&](int task) {
    const int begin = task * kRowsPerTask;
    const LinearRows rows = part(first + begin, std::min(kRowsPerTask, count - begin));
    for (int r = 0; r < rows.rows; ++r) {
      const size_t at = static_cast<size_t>(begin + r) * all_.columns;
      if (bf16) linear.expand_bf16(rows, r, static_cast<uint16_t*>(out) + at);
      else linear.expand_floats(rows, r, static_cast<float*>(out) + at);
    }
  });
}

}  // namespace moebius
