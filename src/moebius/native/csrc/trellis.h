// The search for trellis codes, for quantization alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moebius {

constexpr int kTrellisStates = 256, kMostTrellisRate = 4;

struct TrellisSearch {
  const float *values, *scales;  // (count, length)
  const float* table;            // what each state stands for
  int count, length;
  uint8_t* codes;  // (count, length)
};

// The codes whose values times the scales come nearest; rate: bits of a code, 1 to kMostTrellisRate.
void search_trellis(const TrellisSearch& search, int rate);

}  // namespace moebius
