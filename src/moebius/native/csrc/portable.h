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

// Eight bits as eight words: all ones where the bit is set. Compilers turn loops over eight words into vectors everywhere.
struct PortableMasks {
  alignas(16) int16_t of[256][8];

  constexpr PortableMasks() : of() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) of[byte][bit] = byte >> bit & 1 ? -1 : 0;
  }
};
[[maybe_unused]] constexpr PortableMasks kMasks;

[[maybe_unused]] void portable_add_signs(const uint8_t* signs, size_t stride, int rows, const int16_t* values, int lanes, int,
                                         int32_t* sums) {
  constexpr int kBytes = 4;
  for (int begin = 0; begin < lanes; begin += 8 * kBytes) {
    const int count = lanes - begin < 8 * kBytes ? lanes - begin : 8 * kBytes, bytes = (count + 7) / 8;
    alignas(16) int16_t block[kBytes][8] = {};
    for (int r = 0; r < rows; ++r) {
      uint8_t row[kBytes] = {};
      std::memcpy(row, signs + r * stride + begin / 8, bytes);
      const int16_t value = values[r];
      for (int byte = 0; byte < kBytes; ++byte)
        for (int i = 0; i < 8; ++i) block[byte][i] = static_cast<int16_t>(block[byte][i] + (value & kMasks.of[row[byte]][i]));
    }
    for (int j = 0; j < count; ++j) sums[begin + j] += block[j / 8][j % 8];
  }
}

[[maybe_unused]] void portable_dot_signs(const uint8_t* signs, const uint8_t*, size_t stride, int rows, const int16_t* values,
                                         int columns, int32_t* sums) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = signs + r * stride;
    alignas(16) int16_t lanes[2][8] = {};
    int byte = 0;
    for (; byte * 8 + 16 <= columns; byte += 2)
      for (int odd = 0; odd < 2; ++odd)
        for (int i = 0; i < 8; ++i) {
          const int value = values[(byte + odd) * 8 + i] & kMasks.of[row[byte + odd]][i];
          lanes[odd][i] = static_cast<int16_t>(lanes[odd][i] + value);
        }
    for (int i = 0; i < 16; ++i) sums[r] += lanes[i / 8][i % 8];
    for (int j = byte * 8; j < columns; ++j) sums[r] += values[j] & -portable_bit(row, j);
  }
}

constexpr int kPortableChunk = 256;  // codes that are bytes at a time

// `count` codes to bytes, eight at a time, up to a multiple of eight.
[[maybe_unused]] void portable_spread(const uint8_t* at, const uint8_t* end, int bits, int count, uint8_t* out) {
  const uint64_t low = (uint64_t{1} << bits) - 1;
  for (int j = 0; j < count; j += 8, at += bits) {
    uint8_t bytes[8] = {};
    std::memcpy(bytes, at, end - at >= 8 ? 8 : end > at ? end - at : 0);
    uint64_t packed = 0;
    for (int i = 0; i < 8; ++i) packed |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    for (int i = 0; i < 8; ++i) out[j + i] = static_cast<uint8_t>(packed >> (i * bits) & low);
  }
}

[[maybe_unused]] void portable_dot_codes(const Codes& codes, const int16_t* values, int columns, int32_t* sums) {
  uint8_t bytes[kPortableChunk];
  for (int r = 0; r < codes.rows; ++r) {
    const uint8_t* row = codes.codes + r * codes.stride;
    int32_t sum = 0;
    for (int begin = 0; begin < columns; begin += kPortableChunk) {
      const int count = columns - begin < kPortableChunk ? columns - begin : kPortableChunk;
      portable_spread(row + static_cast<size_t>(begin) / 8 * codes.bits, codes.end, codes.bits, count, bytes);
      for (int j = 0; j < count; ++j) sum += values[begin + j] * bytes[j];
    }
    sums[r] = sum;
  }
}

[[maybe_unused]] void portable_add_codes(const Codes& codes, const int16_t* values, int first, int lanes, int32_t* sums) {
  uint8_t bytes[kPortableChunk];
  for (int r = 0; r < codes.rows; ++r) {
    const uint8_t* row = codes.codes + r * codes.stride + static_cast<size_t>(first) / 8 * codes.bits;
    const int16_t value = values[r];
    for (int begin = 0; begin < lanes; begin += kPortableChunk) {
      const int count = lanes - begin < kPortableChunk ? lanes - begin : kPortableChunk;
      portable_spread(row + static_cast<size_t>(begin) / 8 * codes.bits, codes.end, codes.bits, count, bytes);
      for (int j = 0; j < count; ++j) sums[begin + j] += value * bytes[j];
    }
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
