// A vector in integers that are fine enough for exact sums: what meets signs and codes.
#pragma once

#include <cstdint>
#include <vector>

#include "level.h"

namespace moebius {

// values[j] · step, padded with zeros.
struct Quantized {
  std::vector<int16_t> values;
  std::vector<int> runs;  // where sums in 16 bits have to begin anew; the last one is the end
  float step = 0;
  int64_t total = 0;

  // For sums over rows of signs: runs of rows.
  void for_rows(const float* from, int count, const Level& level);

  // For sums along rows of signs: runs of columns, in each of which every lane holds its sum.
  void for_columns(const float* from, int count, const Level& level);

  // For products with codes of up to 8 bits, summed in 32.
  void for_codes(const float* from, int count, const Level& level);

 private:
  void round(const float* from, int count, float wanted_step, const Level& level);
};

}  // namespace moebius
