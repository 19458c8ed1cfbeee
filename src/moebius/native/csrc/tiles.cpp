#include "tiles.h"

#include <algorithm>
#include <array>

#include "buffers.h"
#include "numbers.h"
#include "threads.h"

namespace moebius {
namespace {

constexpr int kSlotsPerTile = 128;    // that a tile is unpacked for: their sums stay in the cache
constexpr int kSlotsPerRounding = 8;  // of one task

// Inputs of all slots in integers: block after block of kTileInputs, slot after slot in it, so that what meets a tile is dense.
struct Rounded {
  int8_t* values;
  float *steps, *corrections;
  int slots;

  size_t place(int block, int slot) const { return static_cast<size_t>(block) * slots + slot; }
};

// Slots of one matrix, few enough that their sums stay in the cache.
struct Batch {
  int begin, end;
};

std::vector<Batch> batches_of(const std::vector<TileSlot>& slots) {
  std::vector<Batch> batches;
  for (int i = 0; i < static_cast<int>(slots.size()); ++i) {
    const bool next = i == 0 || slots[i].matrix != slots[i - 1].matrix || i - batches.back().begin == kSlotsPerTile;
    if (next) batches.push_back({i, i});
    batches.back().end = i + 1;
  }
  return batches;
}

void round_slot(const TileSource& source, const TileSlot& slot, const Rounded& all, int i, const Level& level) {
  const TileSource::Shape shape = source.tile_shape(slot.matrix);
  const int blocks = tasks_of(shape.inputs, kTileInputs);
  auto& floats = kept<float>(blocks * kTileInputs);
  source.scale_inputs(slot.matrix, slot.input, level, floats.data());
  std::fill_n(floats.begin() + shape.inputs, blocks * kTileInputs - shape.inputs, 0.0f);
  for (int b = 0; b < blocks; ++b) {
    const size_t at = all.place(b, i);
    const int total = level.tiles->round(floats.data() + b * kTileInputs, all.values + at * kTileInputs, all.steps + at);
    all.corrections[at] = shape.centre * static_cast<float>(total);
  }
}

// kTileOutputs outputs of one batch.
void multiply_panel(const TileSource& source, const std::vector<TileSlot>& slots, const Batch& batch, const Rounded& rounded,
                    int first, int rows, const Level& level) {
  const TileLoops& loops = *level.tiles;
  alignas(64) uint8_t bytes[kTileInputs * kTileOutputs], tile[kTileInputs * kTileOutputs];
  const int matrix = slots[batch.begin].matrix, count = batch.end - batch.begin;
  const TileSource::Shape shape = source.tile_shape(matrix);
  const int wanted = std::min(kTileOutputs, rows - first), outputs = std::clamp(shape.outputs - first, 0, wanted);
  auto& sums = kept<float>(static_cast<size_t>(kSlotsPerTile) * kTileOutputs);
  std::fill_n(sums.begin(), static_cast<size_t>(count) * kTileOutputs, 0.0f);
  for (int block = 0; outputs > 0 && block * kTileInputs < shape.inputs; ++block) {
    const int begin = block * kTileInputs, inputs = std::min(kTileInputs, shape.inputs - begin);
    if (shape.rows_are_inputs) {
      source.tile_rows(matrix, begin, inputs, first, outputs, loops, bytes, kTileOutputs);
      loops.order_inputs(bytes, tile);
    } else {
      source.tile_rows(matrix, first, outputs, begin, inputs, loops, bytes, kTileInputs);
      loops.order_outputs(bytes, tile);
    }
    const size_t at = rounded.place(block, batch.begin);
    loops.multiply(tile, rounded.values + at * kTileInputs, rounded.steps + at, rounded.corrections + at, count, sums.data());
  }
  std::array<float, kTileOutputs> scales{};
  source.output_scales(matrix, first, outputs, level, scales.data());
  for (int i = 0; i < count; ++i) {
    float* output = slots[batch.begin + i].output + first;
    level.multiply(sums.data() + static_cast<size_t>(i) * kTileOutputs, scales.data(), outputs, 1, output);
    std::fill(output + outputs, output + wanted, 0.0f);
  }
}

}  // namespace

void multiply_tiles(const TileSource& source, const std::vector<TileSlot>& slots, int rows, const Level& level, int threads) {
  const int count = static_cast<int>(slots.size());
  const std::vector<Batch> batches = batches_of(slots);
  int widest = 0;
  for (const Batch& batch : batches) widest = std::max(widest, source.tile_shape(slots[batch.begin].matrix).inputs);
  const int blocks = tasks_of(widest, kTileInputs);
  const size_t steps = static_cast<size_t>(count) * blocks;
  auto& floats = kept<float, 1>(2 * steps);
  const Rounded rounded{kept<int8_t>(steps * kTileInputs).data(), floats.data(), floats.data() + steps, count};
  for_each(tasks_of(count, kSlotsPerRounding), threads, [&](int task) {
    const int begin = task * kSlotsPerRounding, end = std::min(count, begin + kSlotsPerRounding);
    for (int i = begin; i < end; ++i) round_slot(source, slots[i], rounded, i, level);
  });
  const int panels = tasks_of(rows, kTileOutputs);
  for_each(static_cast<int>(batches.size()) * panels, threads, [&](int task) {
    multiply_panel(source, slots, batches[task / panels], rounded, task % panels * kTileOutputs, rows, level);
  });
}

}  // namespace moebius
