// Sets of instructions: which there are, which is in use, and their loops over integers, for tests.
#include "border.h"
#include "numbers.h"
#include "tiles.h"

#include <atomic>

namespace moebius {
namespace {

// Levels that were compiled and that this processor runs, the best first.
std::vector<const Level*> levels() {
  std::vector<const Level*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  if (avx512 && avx512_level()) found.push_back(avx512_level());
  if (avx2 && avx2_level()) found.push_back(avx2_level());
#endif
  found.push_back(scalar_level());
  return found;
}

// Whether products of bf16 matrices are faster here than those of float32.
bool multiplies_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

std::atomic<const Level*>& in_use() {
  static std::atomic<const Level*> level{levels().front()};
  return level;
}

const Level& level_of(const std::string& name) {
  for (const Level* level : levels())
    if (level->name == name) return *level;
  throw BorderError("instruction level: got " + name + ", which this processor does not have");
}

// Rows of codes of `bits` bits, (rows, bytes).
Codes codes_of(const Array& codes, int bits, int columns) {
  require(bits >= 1 && bits <= 8, "codes: got " + std::to_string(bits) + " bits, wanted 1 to 8");
  check("codes", codes, Kind::u8, {kAny, static_cast<int64_t>(bytes_of(columns, bits))});
  const auto* begin = pointer<uint8_t>(codes);
  const size_t stride = codes.shape(1);
  return {begin, begin + stride * codes.shape(0), stride, bits, size_of("codes", codes, 0)};
}

void add_signs(const Level& level, const Array& signs, const Array& values, int lanes, const Array& sums) {
  check("signs", signs, Kind::u8, {kAny, static_cast<int64_t>(bytes_of(size_of("lanes", lanes), 1))});
  const int rows = size_of("signs", signs, 0);
  check("values", values, Kind::i16, {rows});
  check("sums", sums, Kind::i32, {kAny});
  require(sums.shape(0) >= static_cast<size_t>(lanes), "sums: got fewer than lanes");
  level.add_signs(pointer<uint8_t>(signs), signs.shape(1), rows, pointer<int16_t>(values), lanes, 0, pointer<int32_t>(sums));
}

void dot_signs(const Level& level, const Array& signs, const Array& values, int columns, const Array& sums) {
  check("signs", signs, Kind::u8, {kAny, static_cast<int64_t>(bytes_of(size_of("columns", columns), 1))});
  const int rows = size_of("signs", signs, 0);
  check("values", values, Kind::i16, {padded(columns)});
  check("sums", sums, Kind::i32, {kAny});
  require(sums.shape(0) >= signs.shape(0), "sums: got fewer than rows");
  const auto* begin = pointer<uint8_t>(signs);
  level.dot_signs(begin, begin + signs.shape(1) * rows, signs.shape(1), rows, pointer<int16_t>(values), columns,
                  pointer<int32_t>(sums));
}

void dot_codes(const Level& level, const Array& codes, int bits, const Array& values, int columns, const Array& sums) {
  const Codes all = codes_of(codes, bits, size_of("columns", columns));
  check("values", values, Kind::i16, {padded(columns)});
  check("sums", sums, Kind::i32, {kAny});
  require(sums.shape(0) >= codes.shape(0), "sums: got fewer than rows");
  level.dot_codes(all, pointer<int16_t>(values), columns, pointer<int32_t>(sums));
}

void add_codes(const Level& level, const Array& codes, int bits, const Array& values, int columns, int first, int lanes,
               const Array& sums) {
  const Codes all = codes_of(codes, bits, size_of("columns", columns));
  require(first >= 0 && first % kPadding == 0 && lanes >= 0 && first + lanes <= columns, "lanes: got some beyond the columns");
  check("values", values, Kind::i16, {all.rows});
  check("sums", sums, Kind::i32, {kAny});
  require(sums.shape(0) >= static_cast<size_t>(lanes), "sums: got fewer than lanes");
  level.add_codes(all, pointer<int16_t>(values), first, lanes, pointer<int32_t>(sums));
}

}  // namespace

const Level& current_level() { return *in_use().load(std::memory_order_relaxed); }

void bind_levels(nb::module_& m) {
  nb::class_<Level>(m, "Level")
      .def("add_signs", &add_signs, nb::arg("signs"), nb::arg("values"), nb::arg("lanes"), nb::arg("sums"))
      .def("dot_signs", &dot_signs, nb::arg("signs"), nb::arg("values"), nb::arg("columns"), nb::arg("sums"))
      .def("dot_codes", &dot_codes, nb::arg("codes"), nb::arg("bits"), nb::arg("values"), nb::arg("columns"), nb::arg("sums"))
      .def("add_codes", &add_codes, nb::arg("codes"), nb::arg("bits"), nb::arg("values"), nb::arg("columns"), nb::arg("first"),
           nb::arg("lanes"), nb::arg("sums"));
  m.def("loops", &level_of, nb::arg("name"), nb::rv_policy::reference);
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Level* level : levels()) names.emplace_back(level->name);
    return names;
  });
  m.def("level", [] { return std::string(current_level().name); });
  m.def("use_level", [](const std::string& name) { in_use() = &level_of(name); }, nb::arg("name"));
  m.def("has_tiles", [] { return current_level().tiles != nullptr; });
  m.def("multiplies_bf16", &multiplies_bf16);
  m.attr("FEW_INPUTS") = kFewInputs;
}

}  // namespace moebius
