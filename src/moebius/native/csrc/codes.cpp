// moebius.formats.graded, and integers with a scale for each row.
#include <algorithm>
#include <array>

#include "buffers.h"
#include "factors.h"
#include "numbers.h"
#include "quantized.h"
#include "slots.h"
#include "threads.h"

namespace moebius {
namespace {

constexpr int kLanesPerTask = 1024;     // of outputs
constexpr int kCodeRowsPerTask = 64;    // rows of a shared factor
constexpr float kCodesCentre = 127.5f;  // of bytes that stand for codes

// A matrix of codes, one scale per direction, levels symmetric around zero: scale · (code − (2^bits − 1) / 2).
class CodeRows : public Factor {
 public:
  CodeRows(const CodesTensors& tensors, int rows, int columns) : Factor(1, rows, columns), t_(tensors) {
    size_t at = 0;
    int direction = 0;
    for (const Grade& grade : t_.grades) {
      const size_t stride = bytes_of(t_.entries, grade.bits);
      for (int row = 0; row < grade.count; row += kCodeRowsPerTask) tasks_.push_back({static_cast<int>(runs_.size()), row});
      runs_.push_back({direction, {t_.codes + at, t_.codes + t_.bytes, stride, grade.bits, grade.count}});
      at += stride * grade.count;
      direction += grade.count;
    }
  }

  int few_slots() const override { return kFewInputs; }

  void tile_rows(int, int row, int rows, int first, int width, const TileLoops& loops, uint8_t* out,
                 size_t stride) const override {
    for (const Run& run : runs_) {
      const int begin = std::max(row, run.first), end = std::min(row + rows, run.first + run.codes.rows);
      if (begin >= end) continue;
      Codes codes = run.codes;
      codes.codes += (begin - run.first) * codes.stride;
      codes.rows = end - begin;
      const auto shift = static_cast<uint8_t>(128 - (1 << (codes.bits - 1)));
      loops.spread_codes(codes, first, width, shift, out + (begin - row) * stride, stride);
    }
  }

 protected:
  struct Run {
    int first;
    Codes codes;
  };

  int unpacked_rows(int) const override { return t_.directions; }
  int unpacked_width() const override { return t_.entries; }

  void unpack_row(int, int row, uint16_t* out, const Level& level) const override {
    size_t run = 0;
    while (row >= runs_[run].first + runs_[run].codes.rows) ++run;
    level.expand_codes(runs_[run].codes, row - runs_[run].first, t_.entries, out);
  }

  // Consecutive rows of as many bits each, few enough for many tasks.
  Run part_of(int task) const {
    const auto [run, row] = tasks_[task];
    Run part = runs_[run];
    part.first += row;
    part.codes.codes += row * part.codes.stride;
    part.codes.rows = std::min(kCodeRowsPerTask, part.codes.rows - row);
    return part;
  }

  const CodesTensors t_;
  std::vector<Run> runs_;
  std::vector<std::array<int, 2>> tasks_;  // run, first row in it
};

class CodesInput final : public CodeRows {
 public:
  explicit CodesInput(const CodesTensors& t) : CodeRows(t, t.directions, t.entries) {}

  Shape tile_shape(int) const override { return {t_.entries, t_.directions, false, kCodesCentre}; }
  void scale_inputs(int, const float* from, const Level&, float* out) const override { std::copy_n(from, t_.entries, out); }
  void output_scales(int, int first, int count, const Level&, float* out) const override {
    std::copy_n(t_.scales + first, count, out);
  }

 protected:
  void apply(const std::vector<Slot>& slots, const Level& level, int threads) const override {
    const int count = static_cast<int>(slots.size());
    auto& values = kept<Quantized>(count);
    for_each(count, threads, [&](int i) { values[i].for_codes(slots[i].input, t_.entries, level); });
    for_each(static_cast<int>(tasks_.size()), threads, [&](int task) {
      const auto [first, part] = part_of(task);
      std::array<int32_t, kCodeRowsPerTask> sums;
      for (int i = 0; i < count; ++i) {
        level.dot_codes(part, values[i].values.data(), t_.entries, sums.data());
        const int64_t centre = values[i].total * ((1 << part.bits) - 1);
        for (int r = 0; r < part.rows; ++r) {
          const auto twice = static_cast<float>(2 * static_cast<int64_t>(sums[r]) - centre);
          slots[i].output[first + r] = 0.5f * values[i].step * t_.scales[first + r] * twice;
        }
      }
    });
  }
};

class CodesOutput final : public CodeRows {
 public:
  explicit CodesOutput(const CodesTensors& t) : CodeRows(t, t.entries, t.directions) {}

  Shape tile_shape(int) const override { return {t_.directions, t_.entries, true, kCodesCentre}; }
  void scale_inputs(int, const float* from, const Level& level, float* out) const override {
    level.multiply(from, t_.scales, t_.directions, 1, out);
  }
  void output_scales(int, int, int count, const Level&, float* out) const override { std::fill_n(out, count, 1.0f); }

 protected:
  void apply(const std::vector<Slot>& slots, const Level& level, int threads) const override {
    const int count = static_cast<int>(slots.size());
    auto& values = kept<Quantized>(count);
    for_each(count, threads, [&](int i) {
      auto& floats = kept<float>(t_.directions);
      level.multiply(slots[i].input, t_.scales, t_.directions, 1, floats.data());
      values[i].for_codes(floats.data(), t_.directions, level);
    });
    // Each task reads whole rows, which lie together, and has sums of its own, which are put together afterwards.
    const size_t parts = tasks_.size(), width = t_.entries;
    auto& sums = kept<int32_t>(parts * count * width);
    for_each(static_cast<int>(parts), threads, [&](int task) {
      const Run part = part_of(task);
      for (int i = 0; i < count; ++i) {
        int32_t* mine = sums.data() + (i * parts + task) * width;
        std::fill_n(mine, width, 0);
        level.add_codes(part.codes, values[i].values.data() + part.first, 0, t_.entries, mine);
      }
    });
    const int blocks = tasks_of(t_.entries, kLanesPerTask);
    for_each(count * blocks, threads, [&](int task) {
      const int i = task / blocks, first = task % blocks * kLanesPerTask, lanes = std::min(kLanesPerTask, t_.entries - first);
      std::array<int32_t, kLanesPerTask> total;
      std::fill_n(total.begin(), lanes, 0);
      for (size_t part = 0; part < parts; ++part) {
        const int32_t* more = sums.data() + (i * parts + part) * width + first;
        for (int j = 0; j < lanes; ++j) total[j] += more[j];
      }
      const int64_t centre = centre_of(values[i]);
      float* output = slots[i].output + first;
      for (int j = 0; j < lanes; ++j)
        output[j] = 0.5f * values[i].step * static_cast<float>(2 * static_cast<int64_t>(total[j]) - centre);
    });
  }

 private:
  // Twice what the levels are shifted by, over all directions.
  int64_t centre_of(const Quantized& values) const {
    int64_t centre = 0;
    for (const Run& run : runs_) {
      int64_t total = 0;
      for (int k = run.first; k < run.first + run.codes.rows; ++k) total += values.values[k];
      centre += total * ((1 << run.codes.bits) - 1);
    }
    return centre;
  }
};

}  // namespace

std::unique_ptr<Factor> codes_input(const CodesTensors& t) { return std::make_unique<CodesInput>(t); }
std::unique_ptr<Factor> codes_output(const CodesTensors& t) { return std::make_unique<CodesOutput>(t); }

}  // namespace moebius
