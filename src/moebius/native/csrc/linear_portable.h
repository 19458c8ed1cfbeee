// The loops of packed linear layers in plain C++. As in portable.h, every level has its own copy, compiled for its processor.
#pragma once

#include <cmath>
#include <cstring>

#include "linear.h"

namespace moebius {
namespace {

// Columns whose products with bytes are summed in 32 bits: 255 · kLargestDigits · 1024 < 2^31.
[[maybe_unused]] constexpr int kByteRun = 1024;

[[maybe_unused]] inline float portable_half(uint16_t half) {
  // The exponent is wrong by 112, in subnormals too: a multiplication mends it exactly.
  const uint32_t moved = static_cast<uint32_t>(half & 0x7fff) << 13, sign = static_cast<uint32_t>(half & 0x8000) << 16;
  float value;
  std::memcpy(&value, &moved, sizeof value);
  value *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] inline uint16_t portable_rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : up);
}

[[maybe_unused]] inline float portable_lanes(float* lanes) {
  for (int half = kBlockLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Bytes as they are; nibbles block by block, the even columns before the odd ones.
[[maybe_unused]] void portable_arrange(const int16_t* values, int padded, int bits, int16_t* out) {
  if (bits == 8) {
    std::memcpy(out, values, padded * sizeof *out);
    return;
  }
  for (int j = 0; j < padded; j += kBlock)
    for (int i = 0; i < kBlock / 2; ++i) out[j + i] = values[j + 2 * i], out[j + kBlock / 2 + i] = values[j + 2 * i + 1];
}

[[maybe_unused]] void portable_dot_bytes(const LinearRows& rows, const int16_t* arranged, int64_t* sums) {
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* row = rows.codes + r * rows.stride;
    int64_t total = 0;
    for (int begin = 0; begin < rows.columns; begin += kByteRun) {
      const int end = rows.columns - begin < kByteRun ? rows.columns : begin + kByteRun;
      int32_t sum = 0;
      for (int j = begin; j < end; ++j) sum += arranged[j] * row[j];
      total += sum;
    }
    sums[r] = total;
  }
}

// A block of a row, whole or the beginning of one.
[[maybe_unused]] inline int32_t portable_block(const uint8_t* at, int bytes, const int16_t* arranged) {
  int32_t sum = 0;
  for (int i = 0; i < bytes; ++i) sum += arranged[i] * (at[i] & 15) + arranged[kBlock / 2 + i] * (at[i] >> 4);
  return sum;
}

[[maybe_unused]] void portable_dot_nibbles(const LinearRows& rows, const int16_t* arranged, const int32_t* centres,
                                           float* sums) {
  const int bytes = (rows.columns + 1) / 2;
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* row = rows.codes + r * rows.stride;
    const uint16_t* scales = rows.scales + static_cast<size_t>(r) * rows.groups;
    float lanes[kBlockLanes] = {};
    for (int b = 0, at = 0; at < bytes; ++b, at += kBlock / 2) {
      const int count = bytes - at < kBlock / 2 ? bytes - at : kBlock / 2;
      const int32_t sum = portable_block(row + at, count, arranged + b * kBlock);
      const float product = portable_half(scales[b / rows.blocks_per_scale]) * static_cast<float>(2 * sum - centres[b]);
      lanes[b % kBlockLanes] += product;
    }
    sums[r] = portable_lanes(lanes);
  }
}

// Some columns that share a scale, from an even one on: `store(j, value)` for each.
template <typename Store>
inline void portable_expand(const LinearRows& rows, int row, Store store) {
  const uint8_t* codes = rows.codes + row * rows.stride;
  const uint16_t* scales = rows.scales + static_cast<size_t>(row) * rows.groups;
  if (rows.bits == 8) {
    const float half = 0.5f * portable_half(scales[0]);
    for (int j = 0; j < rows.columns; ++j) store(j, half * static_cast<float>(2 * codes[j] - 255));
    return;
  }
  const int width = rows.blocks_per_scale * kBlock;
  for (int group = 0; group < rows.groups; ++group) {
    const float half = 0.5f * portable_half(scales[group]);
    const int begin = group * width, end = rows.columns - begin < width ? rows.columns : begin + width;
    for (int j = begin; j < end; ++j) store(j, half * static_cast<float>(2 * (codes[j >> 1] >> (4 * (j & 1)) & 15) - 15));
  }
}

[[maybe_unused]] void portable_expand_floats(const LinearRows& rows, int row, float* out) {
  portable_expand(rows, row, [out](int j, float value) { out[j] = value; });
}

[[maybe_unused]] void portable_expand_bf16(const LinearRows& rows, int row, uint16_t* out) {
  portable_expand(rows, row, [out](int j, float value) { out[j] = portable_rounded(value); });
}

}  // namespace
}  // namespace moebius
