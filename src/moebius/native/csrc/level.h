// The loops that the time goes into, once for every instruction set. All are exact in integers, so every level gives the same
// bits; what is rounded, and how coarsely, is decided in factors.cpp alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moebius {

// The sum of the magnitudes that are added up in 16 bits before they move on to 32.
constexpr int kLargestRun = 32767;
// Lanes whose sums are kept apart when signs are multiplied by a vector: column j adds to lane j % kLanes.
constexpr int kLanes = 16;
// Magnitudes of quantized values that meet codes: they fit two digits of 7 bits and a sign.
constexpr int kLargestDigits = 8191;
// Quantized vectors are padded with zeros to a multiple of this.
constexpr int kPadding = 64;

// A run of codes of equal width: row r begins at codes + r * stride. Nothing at or behind `end` may be read.
struct Codes {
  const uint8_t* codes;
  const uint8_t* end;
  size_t stride;
  int bits;
  int rows;
};

struct TileLoops;

struct Level {
  const char* name;

  // sums[j] += Σ_r values[r] · bit j of row r, for j < lanes. Σ|values| <= kLargestRun. `ahead` rows are fetched early.
  void (*add_signs)(const uint8_t* signs, size_t stride, int rows, const int16_t* values, int lanes, int ahead, int32_t* sums);

  // sums[r] += Σ_j values[j] · bit j of row r. `columns` is a multiple of kPadding except at the end of the rows, where values
  // are padded with zeros and `signs_end` ends what may be read. In each of kLanes lanes Σ|values| <= kLargestRun.
  void (*dot_signs)(const uint8_t* signs, const uint8_t* signs_end, size_t stride, int rows, const int16_t* values, int columns,
                    int32_t* sums);

  // sums[r] = Σ_j values[j] · code (r, j), over `columns` codes; values are padded and at most kLargestDigits, and
  // 255 · Σ|values| < 2^31.
  void (*dot_codes)(const Codes& codes, const int16_t* values, int columns, int32_t* sums);

  // sums[j] += Σ_r values[r] · code (r, first + j) for j < lanes; `first` is a multiple of kPadding. Bounds as above.
  void (*add_codes)(const Codes& codes, const int16_t* values, int first, int lanes, int32_t* sums);

  // out[j] = table[Σ_p 2^p · bit j of planes[p]], for j < lanes and up to seven planes. Beyond four it is slow: a bit at a
  // time.
  void (*look_up)(const uint8_t* const* planes, int count, const uint16_t* table, int lanes, uint16_t* out);

  // out[j] = 2 · code (row, j) − (2^bits − 1) as bf16, which is exact, for j < lanes.
  void (*expand_codes)(const Codes& codes, int row, int lanes, uint16_t* out);

  // out[j] = scale · values[j] rounded to the nearest integer, ties to even.
  void (*round)(const float* values, int count, float scale, int16_t* out);

  // out[j] = scale · left[j] · right[j].
  void (*multiply)(const float* left, const float* right, int count, float scale, float* out);

  const TileLoops* tiles;  // null: many rows are then better multiplied by others
};

const Level* scalar_level();
const Level* avx2_level();    // null where it was not compiled
const Level* avx512_level();  // null where it was not compiled

}  // namespace moebius
