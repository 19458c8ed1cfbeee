#include "factors.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "buffers.h"
#include "threads.h"

namespace moebius {
namespace {

// Magnitudes of quantized values add up to this many runs at least, and to this on average: rounding then errs by a
// thousandth of the mean magnitude or less, and moving sums from 16 to 32 bits costs little.
constexpr float kLeastRuns = 0.7f;
constexpr float kMeanMagnitude = 320;
constexpr int kLanesPerTask = 1024;   // of an expert's outputs, along rows of signs
constexpr int kRowsPerTask = 256;     // of signs, across them
constexpr int kCodeRowsPerTask = 64;  // rows of a shared factor
constexpr int kUnpackedRowsPerTask = 64;
constexpr int kBytesAhead = 16384;  // fetched before they are used
constexpr float kLargestCode = 255;
constexpr float kSmallestStep = 1e-37f;  // what has a finite inverse

constexpr int kMostPlanes = 7;
// moebius.formats.planes.AMPLITUDES
constexpr float kAmplitudes[kMostPlanes + 1][kMostPlanes] = {
    {},
    {0.79788456f},
    {0.98159881f, 0.52881878f},
    {1.15784549f, 0.60694633f, 0.30104003f},
    {1.33061049f, 0.68568196f, 0.33885703f, 0.16955516f},
    {1.5051104f, 0.7525552f, 0.3762776f, 0.1881388f, 0.0940694f},
    {1.665008f, 0.832504f, 0.416252f, 0.208126f, 0.104063f, 0.0520315f},
    {1.81976576f, 0.90988288f, 0.45494144f, 0.22747072f, 0.11373536f, 0.05686768f, 0.02843384f}};

// Amplitudes as integers of about the same size for any number of planes, which add up to 127 at most, and their unit. They
// are off by 0.02, 0.16 and 0.31 % for two planes to four, and exact beyond, where each is half of the one before.
constexpr int kWhole[kMostPlanes + 1][kMostPlanes] = {
    {}, {75}, {65, 35}, {65, 34, 17}, {62, 32, 16, 8}, {64, 32, 16, 8, 4}, {64, 32, 16, 8, 4, 2}, {64, 32, 16, 8, 4, 2, 1}};
constexpr float kUnits[kMostPlanes + 1] = {0,           0.01063846f, 0.01510323f, 0.01781549f,
                                           0.02143751f, 0.02351735f, 0.02601575f, 0.02843384f};
constexpr float kTileCentre = 128, kCodesCentre = 127.5f;  // of bytes that stand for signs, and for codes

int padded(int count) { return (count + kPadding - 1) / kPadding * kPadding; }
size_t bytes_of(int values, int bits) { return (static_cast<size_t>(values) * bits + 7) / 8; }
int tasks_of(int count, int per_task) { return (count + per_task - 1) / per_task; }

// To the nearest, ties to even.
uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Magnitude {
  float sum, largest;
};

Magnitude magnitude(const float* values, int count) {
  constexpr int kParts = 16;  // sums in a fixed order that vectorizes
  std::array<float, kParts> sums{}, largest{};
  int j = 0;
  for (; j + kParts <= count; j += kParts)
    for (int i = 0; i < kParts; ++i) {
      const float size = std::fabs(values[j + i]);
      sums[i] += size;
      largest[i] = largest[i] < size ? size : largest[i];
    }
  for (; j < count; ++j) {
    sums[0] += std::fabs(values[j]);
    largest[0] = std::max(largest[0], std::fabs(values[j]));
  }
  float sum = 0, most = 0;
  for (int i = 0; i < kParts; ++i) sum += sums[i], most = std::max(most, largest[i]);
  return {sum, most};
}

// A vector in integers: values[j] · step, padded with zeros.
struct Quantized {
  std::vector<int16_t> values;
  std::vector<int> runs;  // where sums in 16 bits have to begin anew; the last one is the end
  float step = 0;
  int64_t total = 0;

  void round(const float* from, int count, float wanted_step, const Level& level) {
    // What is not finite must stay so: the step carries it to every output, as a product in floating point would.
    step = count == 0 || wanted_step < kSmallestStep ? 0 : wanted_step;
    values.assign(padded(count), 0);
    if (step > 0 && std::isfinite(step)) level.round(from, count, 1 / step, values.data());
    total = 0;
    int32_t part = 0;
    for (int j = 0; j < count; j += 4096, total += part) {
      part = 0;
      for (int i = j; i < std::min(count, j + 4096); ++i) part += values[i];
    }
  }

  // For sums over rows: runs of rows.
  void for_rows(const float* from, int count, const Level& level) {
    const Magnitude size = magnitude(from, count);
    const float wanted = std::max(kMeanMagnitude * static_cast<float>(count), kLeastRuns * kLargestRun);
    round(from, count, std::max(size.sum / wanted, size.largest / kLargestRun), level);
    runs.assign(1, 0);
    for (int j = 0, sum = 0; j < count; ++j) {
      const int value = std::abs(static_cast<int>(values[j]));
      if (sum + value > kLargestRun) runs.push_back(j), sum = 0;
      sum += value;
    }
    runs.push_back(count);
  }

  // For sums along rows: runs of columns, in each of which every lane holds its sum.
  void for_columns(const float* from, int count, const Level& level) {
    constexpr float kLargest = kLargestRun / (kPadding / kLanes);  // a lane can take what one run has at least
    const Magnitude size = magnitude(from, count);
    const float wanted = std::max(kMeanMagnitude * static_cast<float>(count), kLeastRuns * kLargestRun * kLanes);
    round(from, count, std::max(size.sum / wanted, size.largest / kLargest), level);
    runs.assign(1, 0);
    std::array<int32_t, kLanes> sums{};
    for (int j = 0; j < count; j += kPadding) {
      std::array<int32_t, kLanes> more{};
      for (int i = 0; i < kPadding; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) more[lane] += std::abs(static_cast<int>(values[j + i + lane]));
      int32_t worst = 0;
      for (int lane = 0; lane < kLanes; ++lane) worst = std::max(worst, sums[lane] + more[lane]);
      if (worst > kLargestRun) runs.push_back(j), sums = more;
      else
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += more[lane];
    }
    runs.push_back(count);
  }

  // For products with codes of up to 8 bits, summed in 32.
  void for_codes(const float* from, int count, const Level& level) {
    const Magnitude size = magnitude(from, count);
    const float by_sum = size.sum * 1.01f / (2147483648.0f / kLargestCode - 0.5f * static_cast<float>(count));
    round(from, count, std::max(by_sum, size.largest / kLargestDigits), level);
  }
};

struct Group {
  int begin, end;  // slots of one matrix
};

template <typename Slots>
std::vector<Group> groups_of(const Slots& slots) {
  std::vector<Group> groups;
  for (int i = 0; i < static_cast<int>(slots.size()); ++i) {
    if (i == 0 || slots[i].matrix != slots[i - 1].matrix) groups.push_back({i, i});
    groups.back().end = i + 1;
  }
  return groups;
}

class Planes : public Factor {
 public:
  Planes(const PlanesTensors& tensors, int rows, int columns)
      : Factor(tensors.batch, rows, columns), t_(tensors), stride_(bytes_of(tensors.entries, 1)), first_(tensors.batch + 1) {
    for (int e = 0; e < t_.batch; ++e) {
      first_[e + 1] = first_[e];
      for (int p = 0; p < t_.planes; ++p) first_[e + 1] += width(e, p);
    }
  }

 protected:
  int width(int e, int p) const { return p < t_.planes ? t_.widths[e * t_.planes + p] : 0; }
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
      for (int p = 0, row = 0; p < count && begin < end; row += width(e, p++)) visit(begin, end, row + begin, kAmplitudes[count][p]);
    }
  }

  int unpacked_rows(int e) const override { return width(e, 0); }
  int unpacked_width() const override { return t_.entries; }

  // A direction has at most 128 values: all sums of its signed amplitudes, times its scale.
  void unpack_row(int e, int direction, uint16_t* out, const Level& level) const override {
    const uint8_t* rows[kMostPlanes];
    int count = 0;
    for (const uint8_t* plane = signs(e); count < t_.planes && direction < width(e, count); plane += width(e, count++) * stride_)
      rows[count] = plane + direction * stride_;
    uint16_t table[1 << kMostPlanes] = {};
    for (int index = 0; index < 1 << count; ++index) {
      float value = 0;
      for (int p = 0; p < count; ++p) value += index >> p & 1 ? kAmplitudes[count][p] : -kAmplitudes[count][p];
      table[index] = bf16(value * direction_scales(e)[direction]);
    }
    level.look_up(rows, count, table, t_.entries, out);
  }

  void tile_rows(int e, int row, int rows, int first, int bytes, const TileLoops& loops, uint8_t* out,
                 size_t stride) const override {
    for (int count = t_.planes; count > 0; --count) {
      const int begin = std::max(row, width(e, count)), end = std::min(row + rows, width(e, count - 1));
      if (begin >= end) continue;
      const uint8_t* planes[kMostPlanes];
      uint8_t steps[kMostPlanes], base = static_cast<uint8_t>(kTileCentre);
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
  std::vector<int64_t> first_;
};

// Directions are columns: every row of signs is added to all outputs, times what its direction and plane are worth.
class PlanesInput final : public Planes {
 public:
  explicit PlanesInput(const PlanesTensors& t) : Planes(t, t.entries, t.directions) {}

  Shape tile_shape(int e) const override { return {width(e, 0), t_.entries, true, kTileCentre}; }
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

  Shape tile_shape(int e) const override { return {t_.entries, width(e, 0), false, kTileCentre}; }
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
          level.dot_signs(signs(slots[i].matrix) + row * stride_ + first / 8, end, stride_, rows, q.values.data() + first, columns, to);
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

class Signs final : public Factor {
 public:
  explicit Signs(const SignsTensors& t) : Factor(t.batch, t.rows, t.columns), t_(t) {}

  // The salient columns follow the others, from a tile of their own on.
  Shape tile_shape(int) const override {
    return {t_.salient ? salient_begin() + t_.salient : t_.columns, t_.rows, false, kTileCentre};
  }

  void scale_inputs(int matrix, const float* from, const Level& level, float* out) const override {
    const size_t e = matrix;
    level.multiply(from, t_.column_scales + e * t_.columns, t_.columns, 1, out);
    if (!t_.salient) return;
    std::fill(out + t_.columns, out + salient_begin(), 0.0f);
    const int32_t* picked = t_.picked + e * t_.salient;
    for (int j = 0; j < t_.salient; ++j) out[salient_begin() + j] = from[picked[j]] * t_.salient_scales[e * t_.salient + j];
  }

  void output_scales(int e, int first, int count, const Level&, float* out) const override {
    std::copy_n(t_.row_scales + static_cast<size_t>(e) * t_.rows + first, count, out);
  }

  void tile_rows(int e, int row, int rows, int first, int width, const TileLoops& loops, uint8_t* out,
                 size_t stride) const override {
    const bool salient = first >= salient_begin();
    const size_t bytes = bytes_of(salient ? t_.salient : t_.columns, 1);
    const uint8_t* all = salient ? t_.salient_signs : t_.signs;
    const uint8_t* corner = all + (static_cast<size_t>(e) * t_.rows + row) * bytes + (salient ? first - salient_begin() : first) / 8;
    const uint8_t* end = all + static_cast<size_t>(t_.batch) * t_.rows * bytes, step = 2;
    loops.spread_signs(&corner, 1, end, bytes, rows, width, kTileCentre - 1, &step, out, stride);
  }

 protected:
  void apply(const std::vector<Slot>& slots, const Level& level, int threads) const override {
    const int count = static_cast<int>(slots.size());
    auto& values = kept<Quantized>(2 * count);
    for_each(count, threads, [&](int i) { quantize(slots[i], level, values[2 * i], values[2 * i + 1]); });
    const auto groups = groups_of(slots);
    const int blocks = tasks_of(t_.rows, kRowsPerTask);
    for_each(static_cast<int>(groups.size()) * blocks, threads, [&](int task) {
      const int first = task % blocks * kRowsPerTask, rows = std::min(kRowsPerTask, t_.rows - first);
      const Group& group = groups[task / blocks];
      for (int i = group.begin; i < group.end; ++i) multiply(slots[i], values[2 * i], values[2 * i + 1], first, rows, level);
    });
  }

 private:
  void quantize(const Slot& slot, const Level& level, Quantized& every, Quantized& salient) const {
    const size_t e = slot.matrix;
    auto& floats = kept<float>(t_.columns);
    level.multiply(slot.input, t_.column_scales + e * t_.columns, t_.columns, 1, floats.data());
    every.for_columns(floats.data(), t_.columns, level);
    if (!t_.salient) return;
    const int32_t* picked = t_.picked + e * t_.salient;
    const float* scales = t_.salient_scales + e * t_.salient;
    for (int j = 0; j < t_.salient; ++j) floats[j] = slot.input[picked[j]] * scales[j];
    salient.for_columns(floats.data(), t_.salient, level);
  }

  // One plane of rows [first, first + rows): Σ_j ±values[j], in units of the step, into `sums`.
  void plane(const uint8_t* all, int columns, size_t matrix, int first, int rows, const Quantized& q, const Level& level,
             int32_t* sums) const {
    const size_t stride = bytes_of(columns, 1);
    const uint8_t* corner = all + (matrix * t_.rows + first) * stride;
    const uint8_t* end = all + static_cast<size_t>(t_.batch) * t_.rows * stride;
    std::fill_n(sums, rows, 0);
    for (size_t run = 0; run + 1 < q.runs.size(); ++run) {
      const int begin = q.runs[run], width = q.runs[run + 1] - begin;
      level.dot_signs(corner + begin / 8, end, stride, rows, q.values.data() + begin, width, sums);
    }
    for (int r = 0; r < rows; ++r) sums[r] = 2 * sums[r] - static_cast<int32_t>(q.total);
  }

  void multiply(const Slot& slot, const Quantized& every, const Quantized& salient, int first, int rows,
                const Level& level) const {
    std::array<int32_t, kRowsPerTask> one, two{};
    plane(t_.signs, t_.columns, slot.matrix, first, rows, every, level, one.data());
    if (t_.salient) plane(t_.salient_signs, t_.salient, slot.matrix, first, rows, salient, level, two.data());
    const float* scales = t_.row_scales + static_cast<size_t>(slot.matrix) * t_.rows + first;
    const float second = t_.salient ? salient.step : 0;
    for (int r = 0; r < rows; ++r)
      slot.output[first + r] = scales[r] * (static_cast<float>(one[r]) * every.step + static_cast<float>(two[r]) * second);
  }

  int unpacked_rows(int) const override { return t_.rows; }
  int unpacked_width() const override { return t_.columns; }

  void unpack_row(int e, int row, uint16_t* out, const Level& level) const override {
    const uint16_t table[16] = {bf16(-1), bf16(1)};
    const uint8_t* signs = t_.signs + (static_cast<size_t>(e) * t_.rows + row) * bytes_of(t_.columns, 1);
    level.look_up(&signs, 1, table, t_.columns, out);
  }

  int salient_begin() const { return tasks_of(t_.columns, kTileInputs) * kTileInputs; }

  const SignsTensors t_;
};

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

  int few_slots() const override { return 8; }

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
  void output_scales(int, int first, int count, const Level&, float* out) const override { std::copy_n(t_.scales + first, count, out); }

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

void Factor::apply(const float* inputs, float* outputs, const Routes& routes, const Level& level, int threads) const {
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
  if (routes.matrices) std::stable_sort(slots.begin(), slots.end(), [](const Slot& a, const Slot& b) { return a.matrix < b.matrix; });
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

std::unique_ptr<Factor> planes_input(const PlanesTensors& t) { return std::make_unique<PlanesInput>(t); }
std::unique_ptr<Factor> planes_output(const PlanesTensors& t) { return std::make_unique<PlanesOutput>(t); }
std::unique_ptr<Factor> signs(const SignsTensors& t) { return std::make_unique<Signs>(t); }
std::unique_ptr<Factor> codes_input(const CodesTensors& t) { return std::make_unique<CodesInput>(t); }
std::unique_ptr<Factor> codes_output(const CodesTensors& t) { return std::make_unique<CodesOutput>(t); }

}  // namespace moebius
