// A decoder layer for one new token of each text, from its normalization to the sum of the experts, without leaving C++.
#pragma once

#include <cstdint>
#include <optional>

#include "factors.h"
#include "level.h"
#include "linear.h"

namespace moebius {

// A linear layer, y = W x + b: packed, or dense in float32 or bf16. All pointers stay the caller's.
struct Matrix {
  const PackedLinear* packed;  // or null, and then
  const void* weight;          // (rows, columns)
  bool bf16;
  int rows, columns;
  const float* bias;  // (rows,) or null

  // inputs: (count, columns), outputs: (count, rows); every output is written.
  void apply(const float* inputs, float* outputs, int count, const Level& level, int threads) const;
};

// x / √(mean x² + epsilon) · weight, for `count` vectors.
void normalize(const float* inputs, const float* weight, float epsilon, int count, int width, float* outputs,
               const Level& level, int threads);

struct Attention {
  Matrix query, key, value, output;
  const float *query_norm, *key_norm;  // or null; as wide as all heads, or as one
  bool norm_by_head;
  int heads, key_heads, width;
  float scaling;
};

struct GatedMlp {
  Matrix gate, up, down;
};

// The factors of a layer's experts; shared ones may be null. The activation is SiLU of the first half of gate_up times the
// second.
struct Experts {
  const Factor *gate_up_right, *gate_up, *gate_up_left, *down_right, *down, *down_left;

  int inputs() const { return gate_up_right ? gate_up_right->columns : gate_up->columns; }
  int units() const { return down_right ? down_right->columns : down->columns; }
  int hidden() const { return down_left ? down_left->rows : down->rows; }

  // inputs: (count, inputs), chosen and weights: (count, top_k), outputs: (count, hidden). What is no expert adds nothing.
  void apply(const float* inputs, const int64_t* chosen, const float* weights, int count, int top_k, float* outputs,
             const Level& level, int threads) const;

 private:
  // Onto sums of tokens: some slots, each with a matrix, the token it belongs to, and what its expert counts for that.
  void add_slots(const float* shared, const int64_t* matrices, const int64_t* tokens, const float* factors, int slots,
                 float* summed, const Level& level, int threads) const;
};

struct RoutedExperts {
  Matrix router;
  int top_k;
  bool normalized;  // weights of the chosen experts add up to one
  Experts experts;
};

struct SharedExpert {
  GatedMlp mlp;
  Matrix gate;  // one row: its sigmoid weighs the expert
};

// Keys or values of a layer: (texts, key heads, tokens, width), tokens one behind the other.
struct CachePart {
  void* at;
  int64_t text_stride, head_stride;
};

// What queries, keys or values become before they meet: each head with its norm and position, if it has them.
struct Heads {
  int heads, width;
  const float* norm;  // of each head, (width,), or null
  float epsilon;
  const float *cosines, *sines;  // (tokens, width), or null
};

// values: (texts · tokens, heads · width), changed in place. They are written from token `first` on.
void place_heads(float* values, const Heads& heads, int texts, int tokens, const CachePart& part, bool bf16, int first,
                 const Level& level, int threads);

struct LayerCache {
  CachePart keys, values;
  bool bf16;
  int length;  // tokens before this one; the new one goes behind them
};

class DecoderLayer {
 public:
  DecoderLayer(const float* attention_norm, const Attention& attention, const float* mlp_norm, float epsilon);

  int hidden() const { return attention.query.columns; }

  const Attention attention;
  // One of the two is set.
  std::optional<GatedMlp> dense;
  std::optional<RoutedExperts> routed;
  std::optional<SharedExpert> shared;

  // states: (count, hidden), changed in place. cosines and sines of the position: (width,).
  void step(float* states, int count, const float* cosines, const float* sines, const LayerCache& cache, const Level& level,
            int threads) const;

 private:
  const float *attention_norm_, *mlp_norm_;
  const float epsilon_;
};

}  // namespace moebius
