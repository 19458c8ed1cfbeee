// The loops in plain C++: the scalar level, and the ends of rows at the others. Everything here has internal linkage, because
// each level is compiled for another processor: a function shared by the linker could be one that this processor cannot run.
#pragma once

#include <cstring>

#include "level.h"

namespace moebius {
namespace {

inline int portable_bit(const uint8_t* row, int j) { return (row[j >> 3] >> (j & 7)) & 1; }

inline int portable_code(const uint8_t* row, int bits, int j) {
  const int at = j * bits, byte = at >> 3, shift = at & 7;
  int code = row[byte] >> shift;
  if (shift + bits > 8) code |= row[byte + 1] << (8 - shift);
  return code & ((1 << bits) - 1);
}

[[maybe_unused]] void portable_add_signs(const uint8_t* signs, size_t stride, int rows, const int16_t* values, int lanes, int,
                                         int32_t* sums) {
  constexpr int kBlock = 256;  // sums that stay in the nearest cache, in 16 bits
  for (int begin = 0; begin < lanes; begin += kBlock) {
    const int count = lanes - begin < kBlock ? lanes - begin : kBlock;
    int16_t block[kBlock] = {};
    for (int r = 0; r < rows; ++r) {
      const uint8_t* row = signs + r * stride + begin / 8;
      const int16_t value = values[r];
      for (int byte = 0; byte * 8 < count; ++byte)
        for (int bit = 0; bit < 8; ++bit)
          block[byte * 8 + bit] = static_cast<int16_t>(block[byte * 8 + bit] + (value & -((row[byte] >> bit) & 1)));
    }
    for (int j = 0; j < count; ++j) sums[begin + j] += block[j];
  }
}

[[maybe_unused]] void portable_dot_signs(const uint8_t* signs, const uint8_t*, size_t stride, int rows, const int16_t* values,
                                         int columns, int32_t* sums) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = signs + r * stride;
    int32_t lanes[8] = {};
    int byte = 0;
    for (; byte * 8 + 8 <= columns; ++byte)
      for (int bit = 0; bit < 8; ++bit) lanes[bit] += values[byte * 8 + bit] & -((row[byte] >> bit) & 1);
    for (int j = byte * 8; j < columns; ++j) lanes[0] += values[j] & -portable_bit(row, j);
    for (int bit = 0; bit < 8; ++bit) sums[r] += lanes[bit];
  }
}

[[maybe_unused]] void portable_dot_codes(const Codes& codes, const int16_t* values, int columns, int32_t* sums) {
  for (int r = 0; r < codes.rows; ++r) {
    const uint8_t* row = codes.codes + r * codes.stride;
    int32_t sum = 0;
    for (int j = 0; j < columns; ++j) sum += values[j] * portable_code(row, codes.bits, j);
    sums[r] = sum;
  }
}

[[maybe_unused]] void portable_add_codes(const Codes& codes, const int16_t* values, int first, int lanes, int32_t* sums) {
  for (int r = 0; r < codes.rows; ++r) {
    const uint8_t* row = codes.codes + r * codes.stride + static_cast<size_t>(first) * codes.bits / 8;
    for (int j = 0; j < lanes; ++j) sums[j] += values[r] * portable_code(row, codes.bits, j);
  }
}

[[maybe_unused]] void portable_look_up(const uint8_t* const* planes, int count, const uint16_t* table, int lanes,
                                       uint16_t* out) {
  for (int j = 0; j < lanes; ++j) {
    int index = 0;
    for (int p = 0; p < count; ++p) index |= portable_bit(planes[p], j) << p;
    out[j] = table[index];
  }
}

// Integers of eight bits and a sign are bf16 numbers: the upper half of the float that they are.
inline uint16_t portable_bf16(int value) {
  const float number = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

[[maybe_unused]] void portable_expand_codes(const Codes& codes, int row, int lanes, uint16_t* out) {
  const uint8_t* at = codes.codes + row * codes.stride;
  for (int j = 0; j < lanes; ++j) out[j] = portable_bf16(2 * portable_code(at, codes.bits, j) - ((1 << codes.bits) - 1));
}

[[maybe_unused]] void portable_round(const float* values, int count, float scale, int16_t* out) {
  for (int j = 0; j < count; ++j) {
    const float shifted = values[j] * scale + 12582912.0f;  // 1.5 · 2^23: the integer is then in the lowest bits
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    out[j] = static_cast<int16_t>(bits);
  }
}

[[maybe_unused]] void portable_multiply(const float* left, const float* right, int count, float scale, float* out) {
  for (int j = 0; j < count; ++j) out[j] = left[j] * right[j] * scale;
}

}  // namespace
}  // namespace moebius
