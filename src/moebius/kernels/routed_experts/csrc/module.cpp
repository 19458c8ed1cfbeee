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

#include "decoder.h"
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

void apply(const Factor& factor, uintptr_t inputs, uintptr_t outputs, uintptr_t matrices, int rows, int inputs_per,
           const Level& level, int threads) {
  nb::gil_scoped_release unlocked;
  const Routes routes{at<const int64_t>(matrices), rows, inputs_per, nullptr};
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

  // A linear layer of any kind: packed, or else address, bf16; shape; address of the bias or 0.
  nb::class_<Matrix>(m, "Matrix")
      .def("__init__",
           [](Matrix* self, const PackedLinear* packed, uintptr_t weight, bool bf16, int rows, int columns, uintptr_t bias) {
             new (self) Matrix{packed, at<const void>(weight), bf16, rows, columns, at<const float>(bias)};
           },
           nb::arg("packed").none(), nb::arg("weight"), nb::arg("bf16"), nb::arg("rows"), nb::arg("columns"), nb::arg("bias"))
      .def("apply", [](const Matrix& matrix, uintptr_t inputs, uintptr_t outputs, int count, const Level& level, int threads) {
        nb::gil_scoped_release unlocked;
        matrix.apply(at<const float>(inputs), at<float>(outputs), count, level, threads);
      });
  nb::class_<Experts>(m, "Experts")
      .def("__init__",
           [](Experts* self, const Factor* gate_up_right, const Factor& gate_up, const Factor* gate_up_left, const Factor* down_right,
              const Factor& down, const Factor* down_left) {
             new (self) Experts{gate_up_right, &gate_up, gate_up_left, down_right, &down, down_left};
           },
           nb::arg("gate_up_right").none(), nb::arg("gate_up"), nb::arg("gate_up_left").none(), nb::arg("down_right").none(),
           nb::arg("down"), nb::arg("down_left").none())
      .def("apply", [](const Experts& experts, uintptr_t inputs, uintptr_t chosen, uintptr_t weights, int count, int top_k,
                       uintptr_t outputs, const Level& level, int threads) {
        nb::gil_scoped_release unlocked;
        experts.apply(at<const float>(inputs), at<const int64_t>(chosen), at<const float>(weights), count, top_k, at<float>(outputs),
                      level, threads);
      });
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def("__init__",
           [](DecoderLayer* self, uintptr_t attention_norm, uintptr_t mlp_norm, float epsilon, const Matrix& query, const Matrix& key,
              const Matrix& value, const Matrix& output, uintptr_t query_norm, uintptr_t key_norm, bool norm_by_head, int heads,
              int key_heads, int width, float scaling) {
             const Attention attention{query,     key,   value,     output, at<const float>(query_norm), at<const float>(key_norm), norm_by_head,
                                       heads, key_heads, width,  scaling};
             new (self) DecoderLayer(at<const float>(attention_norm), attention, at<const float>(mlp_norm), epsilon);
           })
      .def("set_dense", [](DecoderLayer& layer, const Matrix& gate, const Matrix& up, const Matrix& down) { layer.dense = GatedMlp{gate, up, down}; })
      .def("set_shared", [](DecoderLayer& layer, const Matrix& gate, const Matrix& up, const Matrix& down,
                            const Matrix& weigher) { layer.shared = SharedExpert{{gate, up, down}, weigher}; })
      .def("set_routed", [](DecoderLayer& layer, const Matrix& router, int top_k, bool normalized,
                            const Experts& experts) { layer.routed = RoutedExperts{router, top_k, normalized, experts}; })
      // Keys and values: address, strides of a text and of a head.
      .def("step", [](const DecoderLayer& layer, uintptr_t states, int count, uintptr_t cosines, uintptr_t sines, uintptr_t keys,
                      int64_t key_text, int64_t key_head, uintptr_t values, int64_t value_text, int64_t value_head, bool bf16,
                      int length, const Level& level, int threads) {
        nb::gil_scoped_release unlocked;
        const LayerCache cache{{at<void>(keys), key_text, key_head}, {at<void>(values), value_text, value_head}, bf16, length};
        layer.step(at<float>(states), count, at<const float>(cosines), at<const float>(sines), cache, level, threads);
      });
  m.def("normalize", [](uintptr_t inputs, uintptr_t weight, float epsilon, int count, int width, uintptr_t outputs,
                        const Level& level, int threads) {
    nb::gil_scoped_release unlocked;
    normalize(at<const float>(inputs), at<const float>(weight), epsilon, count, width, at<float>(outputs), level, threads);
  });
  // Norm, cosines and sines: addresses or 0. Where to: address, strides of a text and of a head, whether in bf16, first token.
  m.def("place_heads", [](uintptr_t values, int heads, int width, uintptr_t norm, float epsilon, uintptr_t cosines, uintptr_t sines,
                          int texts, int tokens, uintptr_t to, int64_t text_stride, int64_t head_stride, bool bf16, int first,
                          const Level& level, int threads) {
    nb::gil_scoped_release unlocked;
    const Heads all{heads, width, at<const float>(norm), epsilon, at<const float>(cosines), at<const float>(sines)};
    place_heads(at<float>(values), all, texts, tokens, {at<void>(to), text_stride, head_stride}, bf16, first, level, threads);
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
