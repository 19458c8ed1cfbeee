#include "factors.h"

#include <algorithm>

#include "numbers.h"
#include "slots.h"
#include "threads.h"

namespace moebius {
namespace {

constexpr int kUnpackedRowsPerTask = 64;

}  // namespace

void Factor::apply(const float* inputs, float* outputs, const Routes& routes, const Level& level, int threads) const {
  // Nothing to add up, as where a budget gives a layer no directions: zeros, and what is written is nothing else.
  if (rows == 0 || columns == 0) return void(std::fill_n(outputs, static_cast<size_t>(routes.rows) * rows, 0.0f));
  std::vector<Slot> slots;
  slots.reserve(routes.rows);
  for (int row = 0; row < routes.rows; ++row) {
    const int64_t matrix = routes.matrices ? routes.matrices[row] : 0;
    float* output = outputs + static_cast<int64_t>(row) * rows;
    if (matrix < 0 || matrix >= batch) {
      std::fill_n(output, rows, 0.0f);
      continue;
    }
    const int64_t input = routes.inputs ? routes.inputs[row] : row / routes.inputs_per;
    slots.push_back({static_cast<int>(matrix), row, inputs + input * columns, output});
  }
  if (routes.matrices)
    std::stable_sort(slots.begin(), slots.end(), [](const Slot& a, const Slot& b) { return a.matrix < b.matrix; });
  if (!level.tiles) return slots.empty() ? void() : apply(slots, level, threads);
  std::vector<Slot> few;
  std::vector<TileSlot> many;
  for (const Group& group : groups_of(slots))
    for (int i = group.begin; i < group.end; ++i) {
      if (group.end - group.begin <= few_slots()) few.push_back(slots[i]);
      else many.push_back({slots[i].matrix, slots[i].input, slots[i].output});
    }
  if (!few.empty()) apply(few, level, threads);
  if (!many.empty()) multiply_tiles(*this, many, rows, level, threads);
}

int Factor::unpack(int matrix, uint16_t* out, const Level& level, int threads) const {
  const int count = unpacked_rows(matrix), width = unpacked_width();
  for_each(tasks_of(count, kUnpackedRowsPerTask), threads, [&](int task) {
    const int begin = task * kUnpackedRowsPerTask, end = std::min(count, begin + kUnpackedRowsPerTask);
    for (int row = begin; row < end; ++row) unpack_row(matrix, row, out + static_cast<size_t>(row) * width, level);
  });
  return count;
}

}  // namespace moebius
