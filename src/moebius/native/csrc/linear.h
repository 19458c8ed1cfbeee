// A matrix of a linear layer in moebius.formats.integers, multiplied as it lies in memory: y = W x.
#pragma once

#include <cstddef>
#include <cstdint>

#include "level.h"

namespace moebius {

// Columns whose codes of four bits are summed in integers before they meet their scale.
constexpr int kBlock = 32;
// Lanes of floats whose sums are kept apart: block b of a row adds to lane b % kBlockLanes, at every level.
constexpr int kBlockLanes = 16;
// Arranged vectors are padded with zeros to a multiple of this.
constexpr int kLinearPadding = kBlock * kBlockLanes;

// Rows of codes of `bits` bits, 4 or 8; row r begins at codes + r * stride. Nothing at or behind `end` may be read.
// Levels lie symmetrically around zero: scale · (code − (2^bits − 1) / 2).
struct LinearRows {
  const uint8_t* codes;
  const uint8_t* end;
  size_t stride;
  int rows, columns, bits;
  const uint16_t* scales;        // fp16, (rows, groups)
  int groups, blocks_per_scale;  // of 4 bits: 1, 2, 4, 8 or 16 blocks; 8 bits have one group
};

struct LinearLevel {
  // Integers, at most kLargestDigits and padded, in the order in which the functions below want them: as many bytes.
  void (*arrange)(const int16_t* values, int padded, int bits, int16_t* out);

  // sums[r] = Σ_j values[j] · code (r, j), for 8 bits.
  void (*dot_bytes)(const LinearRows& rows, const int16_t* arranged, int64_t* sums);

  // sums[r] = Σ_b scale (r, b) · (2 · Σ_j values[j] · code (r, j) − centres[b]) over the blocks b and their columns j, for 4
  // bits. Products and sums of floats are rounded one by one, lane by lane, and lanes are added in halves.
  void (*dot_nibbles)(const LinearRows& rows, const int16_t* arranged, const int32_t* centres, float* sums);

  // What the codes of a row stand for.
  void (*expand_floats)(const LinearRows& rows, int row, float* out);
  void (*expand_bf16)(const LinearRows& rows, int row, uint16_t* out);
};

const LinearLevel* scalar_linear();
const LinearLevel* avx2_linear();    // null where it was not compiled
const LinearLevel* avx512_linear();  // null where it was not compiled

// What a linear layer is stored as; all pointers stay the caller's.
class PackedLinear {
 public:
  PackedLinear(int rows, int columns, int bits, int group_size, const uint8_t* codes, const uint16_t* scales);

  // inputs: (count, columns), outputs: (count, rows), both in float32 or both in bf16; every output is written.
  void apply(const void* inputs, void* outputs, int count, bool bf16, const Level& level, int threads) const;

  // Rows of the matrix in float32 or bf16.
  void unpack(int first, int count, void* out, bool bf16, const Level& level, int threads) const;

  int rows() const { return all_.rows; }
  int columns() const { return all_.columns; }

 private:
  LinearRows part(int first, int count) const;

  const LinearRows all_;
};

}  // namespace moebius
