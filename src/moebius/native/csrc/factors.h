// Packed matrices that are multiplied as they lie in memory. Each is y = M_e x for the matrix e that a row of x is routed to.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "level.h"
#include "tiles.h"

namespace moebius {

// Which matrix each row of the outputs comes from, and which row of the inputs goes in: row / inputs_per.
struct Routes {
  const int64_t* matrices;  // null: the first matrix for every row; anything that is no matrix: zeros
  int rows;
  int inputs_per;         // output rows for one input row
  const int64_t* inputs;  // the row of the inputs for each row; null: row / inputs_per
};

class Factor : public TileSource {
 public:
  Factor(int batch, int rows, int columns) : batch(batch), rows(rows), columns(columns) {}

  // inputs: (routes.rows / inputs_per, columns); outputs: (routes.rows, rows), every element of the rows named is written.
  void apply(const float* inputs, float* outputs, const Routes& routes, const Level& level, int threads) const;

  // One matrix in bf16, row after row as it is stored, without some of its scales. Returns how many rows there are.
  //   planes: a row for each direction that has a plane, without the scales of the entries
  //   signs: the first plane, without scales
  //   codes: a row for each direction, in halves of its scale
  int unpack(int matrix, uint16_t* out, const Level& level, int threads) const;

  // Rows that a matrix has when it is unpacked, and their width.
  virtual int unpacked_rows(int matrix) const = 0;
  virtual int unpacked_width() const = 0;

  const int batch, rows, columns;

 protected:
  struct Slot {
    int matrix, row;
    const float* input;
    float* output;
  };
  // Slots of the same matrix follow each other.
  virtual void apply(const std::vector<Slot>& slots, const Level& level, int threads) const = 0;
  virtual void unpack_row(int matrix, int row, uint16_t* out, const Level& level) const = 0;
};

constexpr int kMostPlanes = 7;
// By number of planes: what each of them is worth.
using Amplitudes = std::array<std::array<float, kMostPlanes>, kMostPlanes + 1>;

// moebius.formats.planes. All pointers stay the caller's, and scales are decoded: (batch, entries) and (batch, directions).
struct PlanesTensors {
  int batch, directions, entries, planes;
  const int16_t* widths;
  const uint8_t* signs;
  int64_t sign_rows;
  const float* entry_scales;
  const float* direction_scales;
  Amplitudes amplitudes;
};
std::unique_ptr<Factor> planes_input(const PlanesTensors&);
std::unique_ptr<Factor> planes_output(const PlanesTensors&);

// moebius.formats.signs, scales in float32; `picked`: the salient columns of each matrix, (batch, salient).
struct SignsTensors {
  int batch, rows, columns, salient;
  const uint8_t* signs;
  const float* row_scales;
  const float* column_scales;
  const int32_t* picked;
  const uint8_t* salient_signs;
  const float* salient_scales;
};
std::unique_ptr<Factor> signs(const SignsTensors&);

// moebius.formats.graded and integers with a scale per row: runs of directions with as many bits each; one matrix.
struct Grade {
  int bits, count;
};
struct CodesTensors {
  int directions, entries;
  std::vector<Grade> grades;
  const uint8_t* codes;
  int64_t bytes;
  const float* scales;
};
std::unique_ptr<Factor> codes_input(const CodesTensors&);
std::unique_ptr<Factor> codes_output(const CodesTensors&);

}  // namespace moebius
