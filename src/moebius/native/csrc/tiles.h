// Many rows of inputs times one matrix: a tile of it at a time is unpacked to bytes and multiplied while it is in the nearest
// cache. Inputs are rounded to 8 bits, with a step for each row and tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "level.h"

namespace moebius {

// Inputs and outputs of a tile.
constexpr int kTileInputs = 128, kTileOutputs = 64;
constexpr float kSignsCentre = 128;  // of bytes that stand for sums of signs
// Up to so many inputs of one matrix are read from its bits one by one, where nothing better is known; beyond, it is unpacked.
constexpr int kFewInputs = 8;

// The loops of it, for one instruction set.
struct TileLoops {
  // out[r][j] = base + Σ_p steps[p] · bit j of row r of plane p, modulo 256, for j < width. Rows of `out` are `out_stride`
  // apart; what lies between `width` and the next multiple of 64 may be overwritten. Nothing at or behind `end` is read.
  void (*spread_signs)(const uint8_t* const* planes, int count, const uint8_t* end, size_t stride, int rows, int width,
                       uint8_t base, const uint8_t* steps, uint8_t* out, size_t out_stride);

  // out[r][j] = code (r, first + j) + shift for j < width; the rest as above. `first` is a multiple of kPadding.
  void (*spread_codes)(const Codes& codes, int first, int width, uint8_t shift, uint8_t* out, size_t out_stride);

  // Tiles in the order that `multiply` reads them: groups of four inputs, in each the outputs, in each its four inputs.
  void (*order_inputs)(const uint8_t* rows, uint8_t* tile);   // rows: (kTileInputs, kTileOutputs)
  void (*order_outputs)(const uint8_t* rows, uint8_t* tile);  // rows: (kTileOutputs, kTileInputs)

  // kTileInputs floats to integers of 8 bits: values ≈ out · step. Returns the sum of the integers.
  int (*round)(const float* values, int8_t* out, float* step);

  // sums[t][n] += steps[t] · (Σ_k values[t][k] · tile[k][n] − corrections[t]), the sum over k in integers. values: (tokens,
  // kTileInputs); sums: (tokens, kTileOutputs).
  void (*multiply)(const uint8_t* tile, const int8_t* values, const float* steps, const float* corrections, int tokens,
                   float* sums);
};

const TileLoops* avx512_tile_loops();  // null where it was not compiled

// What a packed matrix shows of itself: rows of bytes; byte − centre is what is meant, but for scales.
class TileSource {
 public:
  virtual ~TileSource() = default;

  struct Shape {
    int inputs, outputs;   // that are in use: outputs behind them are zero
    bool rows_are_inputs;  // otherwise rows are outputs
    float centre;
  };
  // Up to so many slots of a matrix are multiplied otherwise: more exactly, and faster if they are one or two.
  virtual int few_slots() const { return 2; }
  virtual Shape tile_shape(int matrix) const = 0;
  // The inputs times their scales, `inputs` of them.
  virtual void scale_inputs(int matrix, const float* from, const Level& level, float* out) const = 0;
  // Scales of outputs [first, first + count).
  virtual void output_scales(int matrix, int first, int count, const Level& level, float* out) const = 0;
  // Rows [row, row + rows), bytes [first, first + width) of each, `stride` apart. Up to the next multiple of 64, anything.
  virtual void tile_rows(int matrix, int row, int rows, int first, int width, const TileLoops& loops, uint8_t* out,
                         size_t stride) const = 0;
};

struct TileSlot {
  int matrix;
  const float* input;
  float* output;
};

// outputs = matrix · input for all slots; slots of the same matrix follow each other. Outputs have `rows` elements. The level
// has tiles.
void multiply_tiles(const TileSource& source, const std::vector<TileSlot>& slots, int rows, const Level& level, int threads);

}  // namespace moebius
