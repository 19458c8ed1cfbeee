// moebius.formats.planes: every direction has a sum of signed amplitudes.
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

constexpr int kLanesPerTask = 1024;  // of an expert's outputs, along rows of signs
constexpr int kRowsPerTask = 256;    // of signs, across them
constexpr int kBytesAhead = 16384;   // fetched before they are used

// Amplitudes as integers of about the same size for any number of planes, which add up to 127 at most, and their unit. They
// are off by 0.02, 0.16 and 0.31 % for two planes to four, and exact beyond, where each is half of the one before.
constexpr int kWhole[kMostPlanes + 1][kMostPlanes] = {
    {}, {75}, {65, 35}, {65, 34, 17}, {62, 32, 16, 8}, {64, 32, 16, 8, 4}, {64, 32, 16, 8, 4, 2}, {64, 32, 16, 8, 4, 2, 1}};
constexpr float kUnits[kMostPlanes + 1] = {0,           0.01063846f, 0.01510323f, 0.01781549f,
                                           0.02143751f, 0.02351735f, 0.02601575f, 0.02843384f};

class Planes : public Factor {
 public:
  Planes(const PlanesTensors& tensors, int rows, int columns)
      : Factor(tensors.batch, rows, columns),
        t_(tensors),
        stride_(bytes_of(tensors.entries, 1)),
        widths_(tensors.widths, tensors.widths + static_cast<size_t>(tensors.batch) * tensors.planes),
        first_(tensors.batch + 1) {
    for (int e = 0; e < t_.batch; ++e) {
      first_[e + 1] = first_[e];
      for (int p = 0; p < t_.planes; ++p) first_[e + 1] += width(e, p);
    }
  }

 protected:
  int width(int e, int p) const { return p < t_.planes ? widths_[static_cast<size_t>(e) * t_.planes + p] : 0; }
  int sign_rows(int e) const { return static_cast<int>(first_[e + 1] - first_[e]); }
  const uint8_t* signs(int e) const { return t_.signs + first_[e] * stride_; }
  const float* entry_scales(int e) const { return t_.entry_scales + static_cast<size_t>(e) * t_.entries; }
  const float* direction_scales(int e) const { return t_.direction_scales + static_cast<size_t>(e) * t_.directions; }

  // visit(directions begin, end, row of signs of the first of them, amplitude) for every plane where the number of planes,
  // and with it the amplitude, stays the same.
  template <typename Visit>
  void for_each_stretch(int e, Visit visit) const {
    for (int count = t_.planes; count > 0; --count) {
      const int begin = width(e, count), end = width(e, count - 1);
      for (int p = 0, row = 0; p < count && begin < end; row += width(e, p++))
        visit(begin, end, row + begin, t_.amplitudes[count][p]);
    }
  }

  int unpacked_rows(int e) const override { return width(e, 0); }
  int unpacked_width() const override { return t_.entries; }

  // A direction has at most 128 values: all sums of its signed amplitudes, times its scale.
  void unpack_row(int e, int direction, uint16_t* out, const Level& level) const override {
    const uint8_t* rows[kMostPlanes];
    int count = 0;
    for (const uint8_t* plane = signs(e); count < t_.planes && direction < width(e, count);
         plane += width(e, count++) * stride_)
      rows[count] = plane + direction * stride_;
    uint16_t table[1 << kMostPlanes] = {};
    for (int index = 0; index < 1 << count; ++index) {
      float value = 0;
      for (int p = 0; p < count; ++p) value += index >> p & 1 ? t_.amplitudes[count][p] : -t_.amplitudes[count][p];
      table[index] = bf16_of(value * direction_scales(e)[direction]);
    }
    level.look_up(rows, count, table, t_.entries, out);
  }

  void tile_rows(int e, int row, int rows, int first, int bytes, const TileLoops& loops, uint8_t* out,
                 size_t stride) const override {
    for (int count = t_.planes; count > 0; --count) {
      const int begin = std::max(row, width(e, count)), end = std::min(row + rows, width(e, count - 1));
      if (begin >= end) continue;
      const uint8_t* planes[kMostPlanes];
      uint8_t steps[kMostPlanes], base = static_cast<uint8_t>(kSignsCentre);
      const uint8_t* plane = signs(e) + first / 8;
      for (int p = 0; p < count; plane += width(e, p++) * stride_) {
        planes[p] = plane + begin * stride_;
        steps[p] = static_cast<uint8_t>(2 * kWhole[count][p]);
        base = static_cast<uint8_t>(base - kWhole[count][p]);
      }
      const uint8_t* behind = t_.signs + t_.sign_rows * stride_;
      loops.spread_signs(planes, count, behind, stride_, end - begin, bytes, base, steps, out + (begin - row) * stride, stride);
    }
  }

  // Scales of directions [first, first + count) times `from`.
  void scale_directions(int e, const float* from, int first, int count, const Level& level, float* out) const {
    const float* scales = direction_scales(e);
    for (int planes = t_.planes; planes > 0; --planes) {
      const int begin = std::max(first, width(e, planes)), end = std::min(first + count, width(e, planes - 1));
      if (begin < end) level.multiply(from + begin - first, scales + begin, end - begin, kUnits[planes], out + begin - first);
    }
  }

  const PlanesTensors t_;
  const size_t stride_;
  const std::vector<int16_t> widths_;  // those that were checked, whatever is written to the tensor later
  std::vector<int64_t> first_;
};

// Directions are columns: every row of signs is added to all outputs, times what its direction and plane are worth.
class PlanesInput final : public Planes {
 public:
  explicit PlanesInput(const PlanesTensors& t) : Planes(t, t.entries, t.directions) {}

  Shape tile_shape(int e) const override { return {width(e, 0), t_.entries, true, kSignsCentre}; }
  void scale_inputs(int e, const float* from, const Level& level, float* out) const override {
    scale_directions(e, from, 0, width(e, 0), level, out);
  }
  void output_scales(int e, int first, int count, const Level&, float* out) const override {
    std::copy_n(entry_scales(e) + first, count, out);
  }

 protected:
  void apply(const std::vector<Slot>& slots, const Level& level, int threads) const override {
    const int count = static_cast<int>(slots.size());
    auto& values = kept<Quantized>(count);
    for_each(count, threads, [&](int i) { quantize(slots[i], level, values[i]); });
    const auto groups = groups_of(slots);
    const int blocks = tasks_of(t_.entries, kLanesPerTask);
    for_each(static_cast<int>(groups.size()) * blocks, threads, [&](int task) {
      const int first = task % blocks * kLanesPerTask, lanes = std::min(kLanesPerTask, t_.entries - first);
      const Group& group = groups[task / blocks];
      for (int i = group.begin; i < group.end; ++i) add(slots[i], values[i], first, lanes, level);
    });
  }

 private:
  void quantize(const Slot& slot, const Level& level, Quantized& values) const {
    const int e = slot.matrix, rows = sign_rows(e);
    auto& floats = kept<float>(rows);
    const float* scales = direction_scales(e);
    for_each_stretch(e, [&](int begin, int end, int row, float amplitude) {
      level.multiply(slot.input + begin, scales + begin, end - begin, amplitude, floats.data() + row);
    });
    values.for_rows(floats.data(), rows, level);
  }

  void add(const Slot& slot, const Quantized& values, int first, int lanes, const Level& level) const {
    std::array<int32_t, kLanesPerTask> sums;
    std::fill_n(sums.begin(), lanes, 0);
    const uint8_t* corner = signs(slot.matrix) + first / 8;
    const int ahead = static_cast<int>(kBytesAhead / stride_);
    for (size_t run = 0; run + 1 < values.runs.size(); ++run) {
      const int begin = values.runs[run], rows = values.runs[run + 1] - begin;
      level.add_signs(corner + begin * stride_, stride_, rows, values.values.data() + begin, lanes, ahead, sums.data());
    }
    const float* scales = entry_scales(slot.matrix) + first;
    const int32_t total = static_cast<int32_t>(values.total);
    for (int j = 0; j < lanes; ++j) slot.output[first + j] = static_cast<float>(2 * sums[j] - total) * values.step * scales[j];
  }
};

// Directions are rows: each plane of a direction is a sum over all inputs.
class PlanesOutput final : public Planes {
 public:
  explicit PlanesOutput(const PlanesTensors& t) : Planes(t, t.directions, t.entries) {}

  Shape tile_shape(int e) const override { return {t_.entries, width(e, 0), false, kSignsCentre}; }
  void scale_inputs(int e, const float* from, const Level& level, float* out) const override {
    level.multiply(from, entry_scales(e), t_.entries, 1, out);
  }
  void output_scales(int e, int first, int count, const Level& level, float* out) const override {
    std::fill_n(out, count, 1.0f);
    scale_directions(e, out, first, count, level, out);
  }

 protected:
  void apply(const std::vector<Slot>& slots, const Level& level, int threads) const override {
    const int count = static_cast<int>(slots.size());
    auto& values = kept<Quantized>(count);
    for_each(count, threads, [&](int i) {
      auto& floats = kept<float>(t_.entries);
      level.multiply(slots[i].input, entry_scales(slots[i].matrix), t_.entries, 1, floats.data());
      values[i].for_columns(floats.data(), t_.entries, level);
    });
    std::vector<size_t> place(count + 1, 0);
    for (int i = 0; i < count; ++i) place[i + 1] = place[i] + sign_rows(slots[i].matrix);
    auto& sums = kept<int32_t>(place[count]);
    std::vector<std::array<int, 2>> tasks;  // group, first row
    const auto groups = groups_of(slots);
    for (int g = 0; g < static_cast<int>(groups.size()); ++g)
      for (int row = 0; row < sign_rows(slots[groups[g].begin].matrix); row += kRowsPerTask) tasks.push_back({g, row});
    const uint8_t* end = t_.signs + t_.sign_rows * stride_;
    for_each(static_cast<int>(tasks.size()), threads, [&](int task) {
      const auto [g, row] = tasks[task];
      for (int i = groups[g].begin; i < groups[g].end; ++i) {
        const int rows = std::min(kRowsPerTask, sign_rows(slots[i].matrix) - row);
        int32_t* to = sums.data() + place[i] + row;
        std::fill_n(to, rows, 0);
        const Quantized& q = values[i];
        for (size_t run = 0; run + 1 < q.runs.size(); ++run) {
          const int first = q.runs[run], columns = q.runs[run + 1] - first;
          level.dot_signs(signs(slots[i].matrix) + row * stride_ + first / 8, end, stride_, rows, q.values.data() + first,
                          columns, to);
        }
      }
    });
    for_each(count, threads, [&](int i) { combine(slots[i], values[i], sums.data() + place[i]); });
  }

 private:
  void combine(const Slot& slot, const Quantized& values, const int32_t* sums) const {
    const float* scales = direction_scales(slot.matrix);
    const int32_t total = static_cast<int32_t>(values.total);
    std::fill_n(slot.output, t_.directions, 0.0f);
    for_each_stretch(slot.matrix, [&](int begin, int end, int row, float amplitude) {
      const float factor = amplitude * values.step;
      float* to = slot.output;
      const int32_t* from = sums + row - begin;
      for (int k = begin; k < end; ++k) to[k] += static_cast<float>(2 * from[k] - total) * scales[k] * factor;
    });
  }
};

}  // namespace

std::unique_ptr<Factor> planes_input(const PlanesTensors& t) { return std::make_unique<PlanesInput>(t); }
std::unique_ptr<Factor> planes_output(const PlanesTensors& t) { return std::make_unique<PlanesOutput>(t); }

}  // namespace moebius
