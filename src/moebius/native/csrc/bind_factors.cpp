// Packed factors as Python hands them over.
#include "border.h"
#include "factors.h"
#include "numbers.h"

namespace moebius {
namespace {

// What places are read at comes from the file: damage there must not reach beyond the tensors.
void check_widths(const PlanesTensors& t) {
  int64_t total = 0;
  bool falling = true;
  for (int e = 0; e < t.batch; ++e)
    for (int p = 0, before = t.directions; p < t.planes; ++p) {
      const int width = t.widths[e * t.planes + p];
      falling &= 0 <= width && width <= before;
      total += before = width;
    }
  if (!falling || total != t.sign_rows)
    throw DamageError("planes: got widths that add up to " + std::to_string(total) + " rows, wanted " +
                      std::to_string(t.sign_rows) + ", none wider than the one before, and " + std::to_string(t.directions) +
                      " directions at most; the file is damaged, fetch it again");
}

std::unique_ptr<Factor> planes(bool input, const Array& widths, const Array& signs_at, const Array& entry_scales,
                               const Array& direction_scales, const Array& amplitudes) {
  check("widths", widths, Kind::i16, {kAny, kAny});
  const int batch = size_of("widths", widths, 0), count = size_of("widths", widths, 1);
  if (count > kMostPlanes)
    throw DamageError("planes: got " + std::to_string(count) + " planes, wanted " + std::to_string(kMostPlanes) +
                      " at most; the file is damaged, fetch it again");
  check("entry_scales", entry_scales, Kind::f32, {batch, kAny});
  check("direction_scales", direction_scales, Kind::f32, {batch, kAny});
  const int entries = size_of("entry_scales", entry_scales, 1), directions = size_of("direction_scales", direction_scales, 1);
  check("signs", signs_at, Kind::u8, {kAny, static_cast<int64_t>(bytes_of(entries, 1))});
  check("amplitudes", amplitudes, Kind::f32, {kMostPlanes + 1, kMostPlanes});
  PlanesTensors tensors{batch,
                        directions,
                        entries,
                        count,
                        pointer<int16_t>(widths),
                        pointer<uint8_t>(signs_at),
                        static_cast<int64_t>(signs_at.shape(0)),
                        pointer<float>(entry_scales),
                        pointer<float>(direction_scales),
                        {}};
  std::memcpy(&tensors.amplitudes, amplitudes.data(), sizeof tensors.amplitudes);
  check_widths(tensors);
  return input ? planes_input(tensors) : planes_output(tensors);
}

std::unique_ptr<Factor> signs_of(int columns, const Array& signs_at, const Array& row_scales, const Array& column_scales,
                                 const OptionalArray& picked, const OptionalArray& salient_signs,
                                 const OptionalArray& salient_scales) {
  check("row_scales", row_scales, Kind::f32, {kAny, kAny});
  const int batch = size_of("row_scales", row_scales, 0), rows = size_of("row_scales", row_scales, 1);
  check("column_scales", column_scales, Kind::f32, {batch, size_of("columns", columns)});
  check("signs", signs_at, Kind::u8, {batch, rows, static_cast<int64_t>(bytes_of(columns, 1))});
  int salient = 0;
  if (picked) {
    require(salient_signs && salient_scales, "salient columns: got no signs or no scales, wanted both");
    check("picked", *picked, Kind::i32, {batch, kAny});
    salient = size_of("picked", *picked, 1);
    check("salient_signs", *salient_signs, Kind::u8, {batch, rows, static_cast<int64_t>(bytes_of(salient, 1))});
    check("salient_scales", *salient_scales, Kind::f32, {batch, salient});
    // The kernels lay them out in rooms as wide as a matrix.
    require(salient <= columns, "picked: got more salient columns than columns");
    for (int64_t i = 0; i < int64_t{batch} * salient; ++i)
      require(pointer<int32_t>(picked)[i] >= 0 && pointer<int32_t>(picked)[i] < columns,
              "picked: got a column that no matrix has");
  }
  return signs({batch, rows, columns, salient, pointer<uint8_t>(signs_at), pointer<float>(row_scales),
                pointer<float>(column_scales), pointer<int32_t>(picked), pointer<uint8_t>(salient_signs),
                pointer<float>(salient_scales)});
}

std::unique_ptr<Factor> codes(bool input, int64_t entries, const std::vector<std::pair<int64_t, int64_t>>& grades,
                              const Array& codes_at, const Array& scales) {
  check("scales", scales, Kind::f32, {kAny});
  check("codes", codes_at, Kind::u8, {kAny});
  const int directions = size_of("scales", scales, 0);
  CodesTensors tensors{directions,
                       size_of("entries", entries),
                       {},
                       pointer<uint8_t>(codes_at),
                       static_cast<int64_t>(codes_at.shape(0)),
                       pointer<float>(scales)};
  int64_t rows = 0, bytes = 0;
  for (const auto& [bits, count] : grades) {
    require(bits >= 1 && bits <= 8 && count >= 0 && count <= directions - rows,
            "codes: got " + std::to_string(count) + " directions of " + std::to_string(bits) +
                " bits, wanted 1 to 8 bits and " + std::to_string(directions) + " directions in all");
    tensors.grades.push_back({static_cast<int>(bits), static_cast<int>(count)});
    rows += count;
    bytes += static_cast<int64_t>(bytes_of(tensors.entries, static_cast<int>(bits))) * count;
  }
  require(rows == directions && bytes == tensors.bytes, "codes: got " + std::to_string(tensors.bytes) + " bytes for " +
                                                            std::to_string(rows) + " directions, wanted " +
                                                            std::to_string(bytes) + " for " + std::to_string(directions));
  return input ? codes_input(tensors) : codes_output(tensors);
}

void apply(const Factor& factor, const Array& inputs, const Array& outputs, const OptionalArray& matrices, int inputs_per,
           int threads) {
  check("inputs", inputs, Kind::f32, {kAny, factor.columns});
  require(inputs_per >= 1, "outputs for each input: got none");
  const int64_t rows = static_cast<int64_t>(inputs.shape(0)) * inputs_per;
  check("outputs", outputs, Kind::f32, {rows, factor.rows});
  if (matrices) check("matrices", *matrices, Kind::i64, {rows});
  const Routes routes{pointer<int64_t>(matrices), size_of("outputs", rows), inputs_per, nullptr};
  const auto* from = pointer<float>(inputs);
  auto* to = pointer<float>(outputs);
  nb::gil_scoped_release unlocked;
  factor.apply(from, to, routes, current_level(), threads);
}

int unpack(const Factor& factor, int matrix, const Array& out, int threads) {
  require(matrix >= 0 && matrix < factor.batch,
          "matrix: got " + std::to_string(matrix) + ", wanted less than " + std::to_string(factor.batch));
  const int64_t rows = factor.unpacked_rows(matrix), width = factor.unpacked_width();
  check("out", out, Kind::bf16, {kAny});
  require(static_cast<int64_t>(out.shape(0)) >= rows * width,
          "out: got room for " + std::to_string(out.shape(0)) + " numbers, wanted " + std::to_string(rows * width));
  auto* to = pointer<uint16_t>(out);
  nb::gil_scoped_release unlocked;
  return factor.unpack(matrix, to, current_level(), threads);
}

}  // namespace

void bind_factors(nb::module_& m) {
  nb::class_<Factor>(m, "Factor")
      .def_ro("batch", &Factor::batch)
      .def_ro("rows", &Factor::rows)
      .def_ro("columns", &Factor::columns)
      .def("apply", &apply, nb::arg("inputs"), nb::arg("outputs"), nb::arg("matrices").none(), nb::arg("inputs_per"),
           nb::arg("threads"))
      .def("unpack", &unpack, nb::arg("matrix"), nb::arg("out"), nb::arg("threads"));
  // Each keeps its tensors alive.
  m.def("planes", &planes, nb::arg("input"), nb::arg("widths"), nb::arg("signs"), nb::arg("entry_scales"),
        nb::arg("direction_scales"), nb::arg("amplitudes"), nb::keep_alive<0, 2>(), nb::keep_alive<0, 3>(),
        nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>());
  m.def("signs", &signs_of, nb::arg("columns"), nb::arg("signs"), nb::arg("row_scales"), nb::arg("column_scales"),
        nb::arg("picked").none(), nb::arg("salient_signs").none(), nb::arg("salient_scales").none(), nb::keep_alive<0, 2>(),
        nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>(), nb::keep_alive<0, 6>(), nb::keep_alive<0, 7>());
  m.def("codes", &codes, nb::arg("input"), nb::arg("entries"), nb::arg("grades"), nb::arg("codes"), nb::arg("scales"),
        nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>());
}

}  // namespace moebius
