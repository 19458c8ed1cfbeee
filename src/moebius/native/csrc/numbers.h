// Sizes of packed rows and of tasks, and numbers of few bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "level.h"

namespace moebius {

constexpr float kSmallestStep = 1e-37f;  // what has a finite inverse

inline int padded(int count) { return (count + kPadding - 1) / kPadding * kPadding; }
inline size_t bytes_of(int values, int bits) { return (static_cast<size_t>(values) * bits + 7) / 8; }
inline int tasks_of(int count, int per_task) { return (count + per_task - 1) / per_task; }

// To the nearest bf16, ties to even.
inline uint16_t bf16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace moebius
