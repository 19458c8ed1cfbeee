// Loops over vectors of float32 and of bf16, once for every instruction set: what a token meets outside the packed matrices.
// Sums are kept apart in lanes that are the same at every level, so every level gives the same bits.
#pragma once

#include <cstdint>

#include "level.h"

namespace moebius {

struct DenseLevel {
  // Σ_j row[j] · inputs[j].
  float (*dot_floats)(const float* row, const float* inputs, int count);
  float (*dot_bf16)(const uint16_t* row, const float* inputs, int count);

  // out[j] += factor · row[j].
  void (*add_floats)(const float* row, float factor, int count, float* out);
  void (*add_bf16)(const uint16_t* row, float factor, int count, float* out);

  // values[j] = e^(values[j] − largest); returns their sum.
  float (*exponentials)(float* values, int count, float largest);

  // out[j] = gate[j] / (1 + e^−gate[j]) · up[j].
  void (*silu)(const float* gate, const float* up, int count, float* out);
};

const DenseLevel* scalar_dense();
const DenseLevel* avx2_dense();    // null where it was not compiled
const DenseLevel* avx512_dense();  // null where it was not compiled

}  // namespace moebius
