// The loops of dense.h, in a form that compilers turn into vectors of any length. Internal linkage, as in portable.h.
#pragma once

#include <cmath>
#include <cstring>

#include "dense.h"

namespace moebius {
namespace {

constexpr int kDenseLanes = 64;

inline float float_of(float value) { return value; }

inline float float_of(uint16_t bf16) {
  const uint32_t wide = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// A polynomial around the nearest power of two: right to 3e-7 of the result, and never beyond the range of a float.
inline float portable_exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float power = (x * 1.44269504f + 12582912.0f) - 12582912.0f;       // to the nearest integer
  const float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
  float sum = 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(power) + 127)
                        << 23;  // whatever it is of NaN: the sum is NaN
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

inline float sum_of_lanes(float* lanes) {
  for (int half = kDenseLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <typename T>
float portable_dot(const T* row, const float* inputs, int count) {
  alignas(64) float lanes[kDenseLanes] = {};
  int j = 0;
  for (; j + kDenseLanes <= count; j += kDenseLanes)
    for (int i = 0; i < kDenseLanes; ++i) lanes[i] += float_of(row[j + i]) * inputs[j + i];
  for (int i = 0; j + i < count; ++i) lanes[i] += float_of(row[j + i]) * inputs[j + i];
  return sum_of_lanes(lanes);
}

template <typename T>
void portable_add(const T* row, float factor, int count, float* out) {
  for (int j = 0; j < count; ++j) out[j] += factor * float_of(row[j]);
}

inline float portable_exponentials(float* values, int count, float largest) {
  alignas(64) float lanes[kDenseLanes] = {};
  for (int j = 0; j < count; ++j) values[j] = portable_exponential(values[j] - largest);
  for (int j = 0; j < count; ++j) lanes[j % kDenseLanes] += values[j];
  return sum_of_lanes(lanes);
}

inline void portable_silu(const float* gate, const float* up, int count, float* out) {
  for (int j = 0; j < count; ++j) out[j] = gate[j] / (1.0f + portable_exponential(-gate[j])) * up[j];
}

constexpr DenseLevel kPortableDense{portable_dot<float>,    portable_dot<uint16_t>, portable_add<float>,
                                    portable_add<uint16_t>, portable_exponentials,  portable_silu};

}  // namespace
}  // namespace moebius
