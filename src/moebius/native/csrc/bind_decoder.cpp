// Decoder layers and their parts as Python hands them over.
#include "border.h"
#include "decoder.h"

namespace moebius {
namespace {

std::string product_of(const char* name, int rows, int columns) {
  return std::string(name) + " of (" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

// Throws unless a matrix is (rows, columns).
void check_matrix(const char* name, const Matrix& matrix, int64_t rows, int64_t columns) {
  require(matrix.rows == rows && matrix.columns == columns, "decoder layer: got a matrix " +
                                                                product_of(name, matrix.rows, matrix.columns) + ", wanted (" +
                                                                std::to_string(rows) + ", " + std::to_string(columns) + ")");
}

void construct_matrix(Matrix* self, const PackedLinear* packed, const OptionalArray& weight, const OptionalArray& bias) {
  require((packed != nullptr) != weight.has_value(), "matrix: got both or none of packed and dense, wanted one");
  const bool bf16 = weight && check_floats("weight", *weight, {kAny, kAny});
  const int rows = packed ? packed->rows() : size_of("weight", *weight, 0),
            columns = packed ? packed->columns() : size_of("weight", *weight, 1);
  if (bias) check("bias", *bias, Kind::f32, {rows});
  new (self) Matrix{packed, pointer<void>(weight), bf16, rows, columns, pointer<float>(bias)};
}

void apply_matrix(const Matrix& matrix, const Array& inputs, const Array& outputs, int threads) {
  check("inputs", inputs, Kind::f32, {kAny, matrix.columns});
  const int count = size_of("inputs", inputs, 0);
  check("outputs", outputs, Kind::f32, {count, matrix.rows});
  const auto* from = pointer<float>(inputs);
  auto* to = pointer<float>(outputs);
  nb::gil_scoped_release unlocked;
  matrix.apply(from, to, count, current_level(), threads);
}

// One factor behind another, which may be missing: what the first gives is what the second takes.
void check_meeting(const char* name, const Factor* first, const Factor* second) {
  if (!first || !second) return;
  require(first->rows == second->columns, std::string("experts: got a factor that gives ") + std::to_string(first->rows) +
                                              " before " + name + ", which takes " + std::to_string(second->columns));
}

void construct_experts(Experts* self, const Factor* gate_up_right, const Factor& gate_up, const Factor* gate_up_left,
                       const Factor* down_right, const Factor& down, const Factor* down_left) {
  for (const Factor* shared : {gate_up_right, gate_up_left, down_right, down_left})
    require(!shared || shared->batch == 1, "experts: got shared factors of several matrices, wanted one");
  require(gate_up.batch == down.batch, "experts: got " + std::to_string(gate_up.batch) + " of gate_up and " +
                                           std::to_string(down.batch) + " of down, wanted as many");
  check_meeting("gate_up", gate_up_right, &gate_up);
  check_meeting("gate_up.left", &gate_up, gate_up_left);
  check_meeting("down", down_right, &down);
  check_meeting("down.left", &down, down_left);
  const Experts experts{gate_up_right, &gate_up, gate_up_left, down_right, &down, down_left};
  const int channels = gate_up_left ? gate_up_left->rows : gate_up.rows;
  require(channels == 2 * int64_t{experts.units()}, "experts: got " + std::to_string(channels) + " channels for " +
                                                        std::to_string(experts.units()) + " units, wanted twice as many");
  new (self) Experts(experts);
}

void apply_experts(const Experts& experts, const Array& inputs, const Array& chosen, const Array& weights, const Array& outputs,
                   int threads) {
  check("hidden states", inputs, Kind::f32, {kAny, experts.inputs()});
  const int count = size_of("hidden states", inputs, 0);
  check("indices of experts", chosen, Kind::i64, {count, kAny});
  const int top_k = size_of("indices of experts", chosen, 1);
  size_of("indices of experts", int64_t{count} * top_k);
  check("weights of experts", weights, Kind::f32, {count, top_k});
  check("outputs", outputs, Kind::f32, {count, experts.hidden()});
  const auto *from = pointer<float>(inputs), *counts = pointer<float>(weights);
  const auto* which = pointer<int64_t>(chosen);
  auto* to = pointer<float>(outputs);
  nb::gil_scoped_release unlocked;
  experts.apply(from, which, counts, count, top_k, to, current_level(), threads);
}

void construct_layer(DecoderLayer* self, const Array& attention_norm, const Array& mlp_norm, float epsilon, const Matrix& query,
                     const Matrix& key, const Matrix& value, const Matrix& output, const OptionalArray& query_norm,
                     const OptionalArray& key_norm, int heads, int key_heads, int width, float scaling) {
  require(heads > 0 && key_heads > 0 && width > 0 && heads % key_heads == 0, "attention: got " + std::to_string(heads) +
                                                                                 " heads for " + std::to_string(key_heads) +
                                                                                 " of the keys, wanted a multiple");
  const int64_t all = int64_t{heads} * width, few = int64_t{key_heads} * width;
  const int hidden = query.columns;
  check_matrix("query", query, all, hidden);
  check_matrix("key", key, few, hidden);
  check_matrix("value", value, few, hidden);
  check_matrix("output", output, hidden, all);
  check("attention_norm", attention_norm, Kind::f32, {hidden});
  check("mlp_norm", mlp_norm, Kind::f32, {hidden});
  const bool by_head = query_norm && query_norm->ndim() == 1 && static_cast<int64_t>(query_norm->shape(0)) == width;
  if (query_norm) check("query_norm", *query_norm, Kind::f32, {by_head ? width : all});
  if (key_norm) check("key_norm", *key_norm, Kind::f32, {by_head ? width : few});
  const Attention attention{query, key,       value, output, pointer<float>(query_norm), pointer<float>(key_norm), by_head,
                            heads, key_heads, width, scaling};
  new (self) DecoderLayer(pointer<float>(attention_norm), attention, pointer<float>(mlp_norm), epsilon);
}

GatedMlp gated_mlp(const DecoderLayer& layer, const Matrix& gate, const Matrix& up, const Matrix& down) {
  check_matrix("gate", gate, gate.rows, layer.hidden());
  check_matrix("up", up, gate.rows, layer.hidden());
  check_matrix("down", down, layer.hidden(), gate.rows);
  return {gate, up, down};
}

void set_routed(DecoderLayer& layer, const Matrix& router, int top_k, bool normalized, const Experts& experts) {
  check_matrix("router", router, experts.gate_up->batch, layer.hidden());
  require(top_k >= 1 && top_k <= router.rows,
          "router: got " + std::to_string(top_k) + " experts for each token, wanted 1 to " + std::to_string(router.rows));
  require(experts.inputs() == layer.hidden() && experts.hidden() == layer.hidden(),
          "experts: got " + std::to_string(experts.inputs()) + " inputs and " + std::to_string(experts.hidden()) +
              " outputs, wanted " + std::to_string(layer.hidden()));
  layer.routed = RoutedExperts{router, top_k, normalized, experts};
}

void set_shared(DecoderLayer& layer, const Matrix& gate, const Matrix& up, const Matrix& down, const Matrix& weigher) {
  check_matrix("gate of the shared expert", weigher, 1, layer.hidden());
  layer.shared = SharedExpert{gated_mlp(layer, gate, up, down), weigher};
}

CachePart cache_part(const Array& part) { return {part.data(), part.stride(0), part.stride(1)}; }

void step(const DecoderLayer& layer, const Array& states, const Array& cosines, const Array& sines, const Array& keys,
          const Array& values, int threads) {
  const Attention& attention = layer.attention;
  check("states", states, Kind::f32, {kAny, layer.hidden()});
  const int count = size_of("states", states, 0);
  check("cosines", cosines, Kind::f32, {1, attention.width});
  check("sines", sines, Kind::f32, {1, attention.width});
  const bool bf16 = check_floats("keys", keys, {count, attention.key_heads, kAny, attention.width}, 2);
  const auto tokens = static_cast<int64_t>(keys.shape(2));
  check("values", values, bf16 ? Kind::bf16 : Kind::f32, {count, attention.key_heads, tokens, attention.width}, 2);
  require(tokens >= 1, "keys: got no room for the token");
  const LayerCache cache{cache_part(keys), cache_part(values), bf16, size_of("keys", tokens) - 1};
  auto* mine = pointer<float>(states);
  const auto *cosine = pointer<float>(cosines), *sine = pointer<float>(sines);
  nb::gil_scoped_release unlocked;
  layer.step(mine, count, cosine, sine, cache, current_level(), threads);
}

void normalize_rows(const Array& inputs, const Array& weight, float epsilon, const Array& outputs, int threads) {
  check("inputs", inputs, Kind::f32, {kAny, kAny});
  const int count = size_of("inputs", inputs, 0), width = size_of("inputs", inputs, 1);
  check("weight", weight, Kind::f32, {width});
  check("outputs", outputs, Kind::f32, {count, width});
  const auto *from = pointer<float>(inputs), *weights = pointer<float>(weight);
  auto* to = pointer<float>(outputs);
  nb::gil_scoped_release unlocked;
  normalize(from, weights, epsilon, count, width, to, current_level(), threads);
}

void place(const Array& states, const Array& room, const OptionalArray& norm, float epsilon, const OptionalArray& cosines,
           const OptionalArray& sines, int threads) {
  const bool bf16 = check_floats("room", room, {kAny, kAny, kAny, kAny}, 2);
  const int texts = size_of("room", room, 0), heads = size_of("room", room, 1), length = size_of("room", room, 2),
            width = size_of("room", room, 3);
  check("states", states, Kind::f32, {kAny, int64_t{heads} * width});
  const int count = size_of("states", states, 0), tokens = texts ? count / texts : 0;
  require(int64_t{tokens} * texts == count && tokens <= length, "states: got " + std::to_string(count) + " tokens of " +
                                                                    std::to_string(texts) + " texts, with room for " +
                                                                    std::to_string(length) + " of each");
  if (norm) check("norm", *norm, Kind::f32, {width});
  require(cosines.has_value() == sines.has_value(), "positions: got one of cosines and sines, wanted both");
  if (cosines) check("cosines", *cosines, Kind::f32, {tokens, width}), check("sines", *sines, Kind::f32, {tokens, width});
  const Heads all{heads, width, pointer<float>(norm), epsilon, pointer<float>(cosines), pointer<float>(sines)};
  auto* mine = pointer<float>(states);
  const CachePart part = cache_part(room);
  nb::gil_scoped_release unlocked;
  place_heads(mine, all, texts, tokens, part, bf16, length - tokens, current_level(), threads);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  // A linear layer of any kind: packed or dense. Each class keeps its parts alive.
  nb::class_<Matrix>(m, "Matrix")
      .def("__init__", &construct_matrix, nb::arg("packed").none(), nb::arg("weight").none(), nb::arg("bias").none(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def("apply", &apply_matrix, nb::arg("inputs"), nb::arg("outputs"), nb::arg("threads"));
  nb::class_<Experts>(m, "Experts")
      .def("__init__", &construct_experts, nb::arg("gate_up_right").none(), nb::arg("gate_up"), nb::arg("gate_up_left").none(),
           nb::arg("down_right").none(), nb::arg("down"), nb::arg("down_left").none(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
           nb::keep_alive<1, 7>())
      .def_prop_ro("outputs", &Experts::hidden)
      .def("apply", &apply_experts, nb::arg("inputs"), nb::arg("chosen"), nb::arg("weights"), nb::arg("outputs"),
           nb::arg("threads"));
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def("__init__", &construct_layer, nb::arg("attention_norm"), nb::arg("mlp_norm"), nb::arg("epsilon"), nb::arg("query"),
           nb::arg("key"), nb::arg("value"), nb::arg("output"), nb::arg("query_norm").none(), nb::arg("key_norm").none(),
           nb::arg("heads"), nb::arg("key_heads"), nb::arg("width"), nb::arg("scaling"), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(),
           nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>())
      .def(
          "set_dense",
          [](DecoderLayer& layer, const Matrix& gate, const Matrix& up, const Matrix& down) {
            layer.dense = gated_mlp(layer, gate, up, down);
          },
          nb::arg("gate"), nb::arg("up"), nb::arg("down"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
          nb::keep_alive<1, 4>())
      .def("set_routed", &set_routed, nb::arg("router"), nb::arg("top_k"), nb::arg("normalized"), nb::arg("experts"),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 5>())
      .def("set_shared", &set_shared, nb::arg("gate"), nb::arg("up"), nb::arg("down"), nb::arg("weigher"),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("step", &step, nb::arg("states"), nb::arg("cosines"), nb::arg("sines"), nb::arg("keys"), nb::arg("values"),
           nb::arg("threads"));
  m.def("normalize", &normalize_rows, nb::arg("inputs"), nb::arg("weight"), nb::arg("epsilon"), nb::arg("outputs"),
        nb::arg("threads"));
  m.def("place_heads", &place, nb::arg("states"), nb::arg("room"), nb::arg("norm").none(), nb::arg("epsilon"),
        nb::arg("cosines").none(), nb::arg("sines").none(), nb::arg("threads"));
}

}  // namespace moebius
