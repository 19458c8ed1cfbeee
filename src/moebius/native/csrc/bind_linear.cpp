// Packed linear layers as Python hands them over.
#include "border.h"
#include "linear.h"
#include "numbers.h"

namespace moebius {
namespace {

void construct(PackedLinear* self, int columns, int bits, int group_size, const Array& codes, const Array& scales) {
  require((bits == 4 || bits == 8) && columns >= 0, "bits: got " + std::to_string(bits) + ", wanted 4 or 8");
  check("codes", codes, Kind::u8, {kAny, static_cast<int64_t>(bytes_of(columns, bits))});
  const int rows = size_of("codes", codes, 0);
  const bool blocks = group_size == 32 || group_size == 64 || group_size == 128 || group_size == 256 || group_size == 512;
  require(bits == 8 ? group_size > 0 && group_size >= columns : blocks,
          "columns that share a scale: got " + std::to_string(group_size) + ", wanted all at 8 bits, and 32 to 512 at 4 bits");
  const int64_t groups = (int64_t{columns} + group_size - 1) / group_size;
  check("scales", scales, Kind::f16, {rows, groups});
  new (self) PackedLinear(rows, columns, bits, group_size, pointer<uint8_t>(codes), pointer<uint16_t>(scales));
}

void apply(const PackedLinear& linear, const Array& inputs, const Array& outputs, int threads) {
  const bool bf16 = check_floats("inputs", inputs, {kAny, linear.columns()});
  const int count = size_of("inputs", inputs, 0);
  check("outputs", outputs, bf16 ? Kind::bf16 : Kind::f32, {count, linear.rows()});
  const void* from = inputs.data();
  void* to = outputs.data();
  nb::gil_scoped_release unlocked;
  linear.apply(from, to, count, bf16, current_level(), threads);
}

void unpack(const PackedLinear& linear, int first, const Array& out, int threads) {
  const bool bf16 = check_floats("out", out, {kAny, linear.columns()});
  const int count = size_of("out", out, 0);
  require(first >= 0 && first <= linear.rows() - count, "rows: got some that the matrix does not have");
  void* to = out.data();
  nb::gil_scoped_release unlocked;
  linear.unpack(first, count, to, bf16, current_level(), threads);
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<PackedLinear>(m, "PackedLinear")
      .def("__init__", &construct, nb::arg("columns"), nb::arg("bits"), nb::arg("group_size"), nb::arg("codes"),
           nb::arg("scales"), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
      .def("apply", &apply, nb::arg("inputs"), nb::arg("outputs"), nb::arg("threads"))
      .def("unpack", &unpack, nb::arg("first"), nb::arg("out"), nb::arg("threads"));
}

}  // namespace moebius
