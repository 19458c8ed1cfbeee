// What Python sees. Tensors come as addresses: cpu.py checks shapes and types, holds the tensors, and asks for no copies.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "factors.h"
#include "level.h"
#include "linear.h"

namespace nb = nanobind;
using namespace moebius;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

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

const Level& level_of(const std::string& name) {
  for (const Level* level : levels())
    if (level->name == name) return *level;
  throw std::invalid_argument("no level " + name + " on this processor");
}

void apply(const Factor& factor, uintptr_t inputs, uintptr_t outputs, uintptr_t matrices, uintptr_t input_rows,
           uintptr_t output_rows, int rows, int inputs_per, const Level& level, int threads) {
  nb::gil_scoped_release unlocked;
  const Routes routes{at<const int64_t>(matrices), rows, inputs_per, at<const int64_t>(input_rows), at<const int64_t>(output_rows)};
  factor.apply(at<const float>(inputs), at<float>(outputs), routes, level, threads);
}

CodesTensors codes_tensors(int directions, int entries, const std::vector<std::pair<int, int>>& grades, uintptr_t codes,
                           int64_t bytes, uintptr_t scales) {
  CodesTensors tensors{directions, entries, {}, at<const uint8_t>(codes), bytes, at<const float>(scales)};
  for (const auto& [bits, count] : grades) tensors.grades.push_back({bits, count});
  return tensors;
}

}  // namespace

NB_MODULE(_cpu, m) {
  nb::class_<Level>(m, "Level")
      .def_prop_ro("name", [](const Level& level) { return std::string(level.name); })
      .def_prop_ro("tiles", [](const Level& level) { return level.tiles != nullptr; })
      .def("add_signs",
           [](const Level& level, uintptr_t signs, size_t stride, int rows, uintptr_t values, int lanes, uintptr_t sums) {
             level.add_signs(at<const uint8_t>(signs), stride, rows, at<const int16_t>(values), lanes, 0, at<int32_t>(sums));
           })
      .def("dot_signs",
           [](const Level& level, uintptr_t signs, size_t stride, int rows, uintptr_t values, int columns, uintptr_t sums) {
             const auto* begin = at<const uint8_t>(signs);
             level.dot_signs(begin, begin + stride * rows, stride, rows, at<const int16_t>(values), columns, at<int32_t>(sums));
           })
      .def("dot_codes",
           [](const Level& level, uintptr_t codes, size_t stride, int bits, int rows, uintptr_t values, int columns,
              uintptr_t sums) {
             const auto* begin = at<const uint8_t>(codes);
             const Codes all{begin, begin + stride * rows, stride, bits, rows};
             level.dot_codes(all, at<const int16_t>(values), columns, at<int32_t>(sums));
           })
      .def("add_codes", [](const Level& level, uintptr_t codes, size_t stride, int bits, int rows, uintptr_t values, int first,
                           int lanes, uintptr_t sums) {
        const auto* begin = at<const uint8_t>(codes);
        const Codes all{begin, begin + stride * rows, stride, bits, rows};
        level.add_codes(all, at<const int16_t>(values), first, lanes, at<int32_t>(sums));
      });
  nb::class_<Factor>(m, "Factor")
      .def_ro("batch", &Factor::batch)
      .def_ro("rows", &Factor::rows)
      .def_ro("columns", &Factor::columns)
      .def("apply", &apply)
      .def("unpack", [](const Factor& factor, int matrix, uintptr_t out, const Level& level, int threads) {
        nb::gil_scoped_release unlocked;
        return factor.unpack(matrix, at<uint16_t>(out), level, threads);
      });

  // A linear layer: shape, bits, columns that share a scale, addresses of codes and of scales in fp16.
  nb::class_<PackedLinear>(m, "PackedLinear")
      .def("__init__",
           [](PackedLinear* self, int rows, int columns, int bits, int group_size, uintptr_t codes, uintptr_t scales) {
             new (self) PackedLinear(rows, columns, bits, group_size, at<const uint8_t>(codes), at<const uint16_t>(scales));
           })
      .def("apply",
           [](const PackedLinear& linear, uintptr_t inputs, uintptr_t outputs, int count, bool bf16, const Level& level,
              int threads) {
             nb::gil_scoped_release unlocked;
             linear.apply(at<const void>(inputs), at<void>(outputs), count, bf16, level, threads);
           })
      .def("unpack", [](const PackedLinear& linear, int first, int count, uintptr_t out, bool bf16, const Level& level,
                        int threads) {
        nb::gil_scoped_release unlocked;
        linear.unpack(first, count, at<void>(out), bf16, level, threads);
      });

  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Level* level : levels()) names.emplace_back(level->name);
    return names;
  });
  // Whether products of bf16 matrices are faster here than those of float32.
  m.def("multiplies_bf16", [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return false;
#endif
  });
  m.def("level", &level_of, nb::rv_policy::reference);
  m.def("planes", [](bool input, int batch, int directions, int entries, int planes, uintptr_t widths, uintptr_t signs,
                     int64_t sign_rows, uintptr_t entry_scales, uintptr_t direction_scales) {
    const PlanesTensors tensors{batch,     directions, entries, planes, at<const int16_t>(widths), at<const uint8_t>(signs),
                                sign_rows, at<const float>(entry_scales), at<const float>(direction_scales)};
    return input ? planes_input(tensors) : planes_output(tensors);
  });
  m.def("signs", [](int batch, int rows, int columns, int salient, uintptr_t signs_at, uintptr_t row_scales,
                    uintptr_t column_scales, uintptr_t picked, uintptr_t salient_signs, uintptr_t salient_scales) {
    return signs({batch, rows, columns, salient, at<const uint8_t>(signs_at), at<const float>(row_scales),
                  at<const float>(column_scales), at<const int32_t>(picked), at<const uint8_t>(salient_signs),
                  at<const float>(salient_scales)});
  });
  m.def("codes", [](bool input, int directions, int entries, const std::vector<std::pair<int, int>>& grades, uintptr_t codes,
                    int64_t bytes, uintptr_t scales) {
    const CodesTensors tensors = codes_tensors(directions, entries, grades, codes, bytes, scales);
    return input ? codes_input(tensors) : codes_output(tensors);
  });
}
