// moebius.formats.signs: signs between scales of rows and of columns, and second ones in the salient columns.
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

constexpr int kRowsPerTask = 256;

class Signs final : public Factor {
 public:
  explicit Signs(const SignsTensors& t) : Factor(t.batch, t.rows, t.columns), t_(t) {}

  // The salient columns follow the others, from a tile of their own on.
  Shape tile_shape(int) const override {
    return {t_.salient ? salient_begin() + t_.salient : t_.columns, t_.rows, false, kSignsCentre};
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
    const uint8_t* corner =
        all + (static_cast<size_t>(e) * t_.rows + row) * bytes + (salient ? first - salient_begin() : first) / 8;
    const uint8_t *end = all + static_cast<size_t>(t_.batch) * t_.rows * bytes, step = 2;
    loops.spread_signs(&corner, 1, end, bytes, rows, width, kSignsCentre - 1, &step, out, stride);
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
    const uint16_t table[16] = {bf16_of(-1), bf16_of(1)};
    const uint8_t* signs = t_.signs + (static_cast<size_t>(e) * t_.rows + row) * bytes_of(t_.columns, 1);
    level.look_up(&signs, 1, table, t_.columns, out);
  }

  int salient_begin() const { return tasks_of(t_.columns, kTileInputs) * kTileInputs; }

  const SignsTensors t_;
};

}  // namespace

std::unique_ptr<Factor> signs(const SignsTensors& t) { return std::make_unique<Signs>(t); }

}  // namespace moebius
