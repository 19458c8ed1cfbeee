#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "dense.h"
#include "linear_portable.h"
#include "numbers.h"
#include "threads.h"

namespace moebius {
namespace {

constexpr int kDenseRowsPerTask = 32, kVectorsPerTask = 16;
constexpr int kUnitsPerTask = 1024;  // of an activation
constexpr int kSlotsAtOnce = 512;    // that go through both projections together: what they compute stays in the cache
constexpr int kColumnsPerTask = 256, kFewSlots = 64;  // of a sum over experts, and slots that one thread adds up faster alone

// Room for what a thread computes between the matrices; it keeps its memory from call to call.
struct Workspace {
  std::vector<float> normed;                       // states after a norm
  std::vector<float> queries, keys, values;        // of the new tokens, all heads
  std::vector<float> scores;                       // of the queries of one head of the keys
  std::vector<float> attended;                     // values, weighed by the scores
  std::vector<float> outputs;                      // of a half of the layer, before they are added to the states
  std::vector<float> logits;                       // of the router
  std::vector<int> ranking;                        // experts of one token, the likeliest first
  std::vector<int64_t> chosen;                     // the likeliest experts of each token
  std::vector<float> chosen_weights;               // what they count for
  std::vector<float> shared_gates;                 // what the shared expert counts for
  std::vector<int> order;                          // of slots, by expert
  std::vector<int64_t> slot_experts, slot_tokens;  // of every slot in order
  std::vector<float> slot_weights;
  std::vector<float> coordinates;    // inputs in the basis that experts share
  std::vector<float> gates_and_ups;  // of an MLP that is not routed
  std::vector<float> products;       // of a factor of the experts
  std::vector<float> channels;       // gates and ups of the experts, where a shared factor makes them
  std::vector<float> units;          // after the activation
  std::vector<float> narrowed;       // the same in the basis that experts share
  std::vector<float> summed;         // outputs of the experts, before the shared factor
};

Workspace& workspace() {
  static thread_local Workspace mine;
  return mine;
}

// The beginning of a buffer with room for `count`; whatever was left there.
template <typename T>
T* room(std::vector<T>& buffer, size_t count) {
  if (buffer.size() < count) buffer.resize(count);
  return buffer.data();
}

const DenseLevel& dense_of(const Level& level) {
  if (&level == avx512_level()) return *avx512_dense();
  if (&level == avx2_level()) return *avx2_dense();
  return *scalar_dense();
}

void add(const float* from, size_t count, float* to) {
  for (size_t i = 0; i < count; ++i) to[i] += from[i];
}

// One vector of a cache.
void store(const CachePart& part, bool bf16, int text, int head, int token, int width, const float* values) {
  const int64_t at = text * part.text_stride + head * part.head_stride + int64_t{token} * width;
  if (bf16) std::transform(values, values + width, static_cast<uint16_t*>(part.at) + at, portable_rounded);
  else std::copy_n(values, width, static_cast<float*>(part.at) + at);
}

// The first half of a vector turned against the second.
void rotate(float* values, int width, const float* cosines, const float* sines) {
  const int half = width / 2;
  for (int j = 0; j < half; ++j) {
    const float a = values[j], b = values[j + half];
    values[j] = a * cosines[j] - b * sines[j];
    values[j + half] = b * cosines[j + half] + a * sines[j + half];
  }
}

// All heads of the vector of a token: their norm, if they have one of their own, and their position.
void place(float* values, const Heads& h, int token, const Level& level) {
  for (int head = 0; head < h.heads; ++head) {
    float* const mine = values + head * h.width;
    if (h.norm) normalize(mine, h.norm, h.epsilon, 1, h.width, mine, level, 1);
    if (h.cosines) rotate(mine, h.width, h.cosines + token * h.width, h.sines + token * h.width);
  }
}

// The queries of one head of the keys.
template <typename T>
void attend(const Attention& a, const LayerCache& cache, int text, int key_head, const float* queries, float* outputs,
            const DenseLevel& dense) {
  const int tokens = cache.length + 1, group = a.heads / a.key_heads;
  const T* keys = static_cast<const T*>(cache.keys.at) + text * cache.keys.text_stride + key_head * cache.keys.head_stride;
  const T* values =
      static_cast<const T*>(cache.values.at) + text * cache.values.text_stride + key_head * cache.values.head_stride;
  float* const scores = room(workspace().scores, static_cast<size_t>(tokens) * group);
  for (int t = 0; t < tokens; ++t)
    for (int g = 0; g < group; ++g) {
      const float* query = queries + g * a.width;
      if constexpr (sizeof(T) == 2)
        scores[g * tokens + t] = a.scaling * dense.dot_bf16(keys + int64_t{t} * a.width, query, a.width);
      else scores[g * tokens + t] = a.scaling * dense.dot_floats(keys + int64_t{t} * a.width, query, a.width);
    }
  for (int g = 0; g < group; ++g) {
    float* const mine = scores + g * tokens;
    const float sum = dense.exponentials(mine, tokens, *std::max_element(mine, mine + tokens));
    for (int t = 0; t < tokens; ++t) mine[t] /= sum;
  }
  std::fill_n(outputs, group * a.width, 0.0f);
  for (int t = 0; t < tokens; ++t)
    for (int g = 0; g < group; ++g) {
      float* const output = outputs + g * a.width;
      if constexpr (sizeof(T) == 2) dense.add_bf16(values + int64_t{t} * a.width, scores[g * tokens + t], a.width, output);
      else dense.add_floats(values + int64_t{t} * a.width, scores[g * tokens + t], a.width, output);
    }
}

void add_attention(const Attention& a, float epsilon, const float* inputs, float* states, int count, const float* cosines,
                   const float* sines, const LayerCache& cache, const Level& level, int threads) {
  const int all = a.heads * a.width, few = a.key_heads * a.width, hidden = a.output.rows;
  Workspace& w = workspace();
  float *queries = room(w.queries, static_cast<size_t>(count) * all), *keys = room(w.keys, static_cast<size_t>(count) * few),
        *values = room(w.values, static_cast<size_t>(count) * few);
  a.query.apply(inputs, queries, count, level, threads);
  a.key.apply(inputs, keys, count, level, threads);
  a.value.apply(inputs, values, count, level, threads);
  if (a.query_norm && !a.norm_by_head) normalize(queries, a.query_norm, epsilon, count, all, queries, level, threads);
  if (a.key_norm && !a.norm_by_head) normalize(keys, a.key_norm, epsilon, count, few, keys, level, threads);
  float* const attended = room(w.attended, static_cast<size_t>(count) * all);
  const DenseLevel& dense = dense_of(level);
  const int group = a.heads / a.key_heads;
  const Heads query_heads{group, a.width, a.norm_by_head ? a.query_norm : nullptr, epsilon, cosines, sines};
  const Heads key_head{1, a.width, a.norm_by_head ? a.key_norm : nullptr, epsilon, cosines, sines};
  for_each(count * a.key_heads, threads, [&](int task) {
    const int text = task / a.key_heads, head = task % a.key_heads;
    float *query = queries + text * all + head * group * a.width, *key = keys + text * few + head * a.width;
    place(query, query_heads, 0, level);
    place(key, key_head, 0, level);
    store(cache.keys, cache.bf16, text, head, cache.length, a.width, key);
    store(cache.values, cache.bf16, text, head, cache.length, a.width, values + text * few + head * a.width);
    float* const output = attended + text * all + head * group * a.width;
    if (cache.bf16) attend<uint16_t>(a, cache, text, head, query, output, dense);
    else attend<float>(a, cache, text, head, query, output, dense);
  });
  float* const outputs = room(w.outputs, static_cast<size_t>(count) * hidden);
  a.output.apply(attended, outputs, count, level, threads);
  add(outputs, static_cast<size_t>(count) * hidden, states);
}

// (count, 2 · units), or gates and ups apart, to (count, units).
void activate(const float* gates, const float* ups, int stride, int count, int units, float* out, const Level& level,
              int threads) {
  const DenseLevel& dense = dense_of(level);
  const int parts = tasks_of(units, kUnitsPerTask);
  for_each(count * parts, threads, [&](int task) {
    const int row = task / parts, first = task % parts * kUnitsPerTask;
    const int64_t from = int64_t{row} * stride + first;
    dense.silu(gates + from, ups + from, std::min(kUnitsPerTask, units - first), out + int64_t{row} * units + first);
  });
}

// (count, hidden) to the same, in a buffer that the next call writes to.
const float* apply_mlp(const GatedMlp& mlp, const float* inputs, int count, const Level& level, int threads) {
  const int units = mlp.gate.rows;
  Workspace& w = workspace();
  float* const both = room(w.gates_and_ups, 2 * static_cast<size_t>(count) * units);
  float *const ups = both + static_cast<size_t>(count) * units, *const between =
                                                                    room(w.units, static_cast<size_t>(count) * units);
  mlp.gate.apply(inputs, both, count, level, threads);
  mlp.up.apply(inputs, ups, count, level, threads);
  activate(both, ups, units, count, units, between, level, threads);
  float* const outputs = room(w.outputs, static_cast<size_t>(count) * mlp.down.rows);
  mlp.down.apply(between, outputs, count, level, threads);
  return outputs;
}

// The likeliest experts of each token, (count, top_k), and their weights.
void route(const RoutedExperts& r, const float* inputs, int count, int64_t* chosen, float* weights, const Level& level,
           int threads) {
  const int experts = r.router.rows;
  Workspace& w = workspace();
  float* const logits = room(w.logits, static_cast<size_t>(count) * experts);
  r.router.apply(inputs, logits, count, level, threads);
  int* const order = room(w.ranking, experts);
  for (int i = 0; i < count; ++i) {
    float* const mine = logits + i * experts;
    std::iota(order, order + experts, 0);
    std::partial_sort(order, order + r.top_k, order + experts,
                      [&](int a, int b) { return mine[a] != mine[b] ? mine[a] > mine[b] : a < b; });
    const float sum = dense_of(level).exponentials(mine, experts, mine[order[0]]);
    float total = 0;
    for (int k = 0; k < r.top_k; ++k) total += mine[order[k]];
    for (int k = 0; k < r.top_k; ++k) {
      chosen[i * r.top_k + k] = order[k];
      weights[i * r.top_k + k] = mine[order[k]] / (r.normalized ? total : sum);
    }
  }
}

// A shared factor times `count` vectors; the vectors themselves if there is none.
const float* through(const Factor* factor, const float* inputs, int count, std::vector<float>& buffer, const Level& level,
                     int threads) {
  if (!factor) return inputs;
  float* const outputs = room(buffer, static_cast<size_t>(count) * factor->rows);
  factor->apply(inputs, outputs, {nullptr, count, 1, nullptr}, level, threads);
  return outputs;
}

// Where a part of the slots ends that begins at `begin`: with a matrix, if one ends before there are too many.
int end_of_part(const int64_t* matrices, int begin, int slots) {
  if (slots <= kSlotsAtOnce) return slots;
  int last = begin;
  for (int i = begin + 1; i <= slots; ++i)
    if (i == slots || matrices[i] != matrices[i - 1]) {
      if (last > begin && i - begin > kSlotsAtOnce) return last;
      last = i;
    }
  return last;
}

void add_routed(const RoutedExperts& r, const float* inputs, float* states, int count, int hidden, const Level& level,
                int threads) {
  Workspace& w = workspace();
  int64_t* const chosen = room(w.chosen, static_cast<size_t>(count) * r.top_k);
  float* const weights = room(w.chosen_weights, static_cast<size_t>(count) * r.top_k);
  route(r, inputs, count, chosen, weights, level, threads);
  float* const outputs = room(w.outputs, static_cast<size_t>(count) * hidden);
  r.experts.apply(inputs, chosen, weights, count, r.top_k, outputs, level, threads);
  add(outputs, static_cast<size_t>(count) * hidden, states);
}

void add_shared(const SharedExpert& expert, const float* inputs, float* states, int count, int hidden, const Level& level,
                int threads) {
  float* const gates = room(workspace().shared_gates, count);
  expert.gate.apply(inputs, gates, count, level, threads);
  const float* outputs = apply_mlp(expert.mlp, inputs, count, level, threads);
  for (int i = 0; i < count; ++i)
    dense_of(level).add_floats(outputs + i * hidden, 1 / (1 + std::exp(-gates[i])), hidden, states + i * hidden);
}

}  // namespace

void Matrix::apply(const float* inputs, float* outputs, int count, const Level& level, int threads) const {
  if (packed) {
    packed->apply(inputs, outputs, count, false, level, threads);
  } else {
    const DenseLevel& dense = dense_of(level);
    for_each(tasks_of(rows, kDenseRowsPerTask), threads, [&](int task) {
      const int first = task * kDenseRowsPerTask, end = std::min(rows, first + kDenseRowsPerTask);
      for (int row = first; row < end; ++row)
        for (int i = 0; i < count; ++i) {
          const float* input = inputs + static_cast<size_t>(i) * columns;
          const size_t at = static_cast<size_t>(row) * columns;
          outputs[static_cast<size_t>(i) * rows + row] =
              bf16 ? dense.dot_bf16(static_cast<const uint16_t*>(weight) + at, input, columns)
                   : dense.dot_floats(static_cast<const float*>(weight) + at, input, columns);
        }
    });
  }
  if (bias)
    for (int i = 0; i < count; ++i) add(bias, rows, outputs + static_cast<size_t>(i) * rows);
}

void normalize(const float* inputs, const float* weight, float epsilon, int count, int width, float* outputs,
               const Level& level, int threads) {
  const DenseLevel& dense = dense_of(level);
  for_each(tasks_of(count, kVectorsPerTask), threads, [&](int task) {
    for (int i = task * kVectorsPerTask; i < std::min(count, (task + 1) * kVectorsPerTask); ++i) {
      const float* from = inputs + static_cast<size_t>(i) * width;
      const float mean = dense.dot_floats(from, from, width) / static_cast<float>(width);
      level.multiply(from, weight, width, 1 / std::sqrt(mean + epsilon), outputs + static_cast<size_t>(i) * width);
    }
  });
}

void place_heads(float* values, const Heads& h, int texts, int tokens, const CachePart& part, bool bf16, int first,
                 const Level& level, int threads) {
  const int count = texts * tokens;
  for_each(tasks_of(count, kVectorsPerTask), threads, [&](int task) {
    for (int i = task * kVectorsPerTask; i < std::min(count, (task + 1) * kVectorsPerTask); ++i) {
      const int token = i % tokens;
      float* const mine = values + static_cast<size_t>(i) * h.heads * h.width;
      place(mine, h, token, level);
      for (int head = 0; head < h.heads; ++head)
        store(part, bf16, i / tokens, head, first + token, h.width, mine + head * h.width);
    }
  });
}

void Experts::apply(const float* inputs, const int64_t* chosen, const float* weights, int count, int top_k, float* outputs,
                    const Level& level, int threads) const {
  Workspace& w = workspace();
  const float* shared = through(gate_up_right, inputs, count, w.coordinates, level, threads);
  float* const summed = down_left ? room(w.summed, static_cast<size_t>(count) * down->rows) : outputs;
  std::fill_n(summed, static_cast<size_t>(count) * down->rows, 0.0f);

  const int slots = count * top_k;
  int* const order = room(w.order, slots);
  std::iota(order, order + slots, 0);
  if (slots > kSlotsAtOnce) std::stable_sort(order, order + slots, [&](int a, int b) { return chosen[a] < chosen[b]; });
  int64_t *const matrices = room(w.slot_experts, slots), *const tokens = room(w.slot_tokens, slots);
  float* const factors = room(w.slot_weights, slots);
  for (int i = 0; i < slots; ++i) matrices[i] = chosen[order[i]], tokens[i] = order[i] / top_k, factors[i] = weights[order[i]];
  for (int begin = 0, end; begin < slots; begin = end) {
    end = end_of_part(matrices, begin, slots);
    add_slots(shared, matrices + begin, tokens + begin, factors + begin, end - begin, summed, level, threads);
  }
  if (down_left) down_left->apply(summed, outputs, {nullptr, count, 1, nullptr}, level, threads);
}

void Experts::add_slots(const float* shared, const int64_t* matrices, const int64_t* tokens, const float* factors, int slots,
                        float* summed, const Level& level, int threads) const {
  Workspace& w = workspace();
  const int units = this->units(), width = down->rows;
  if (width == 0) return;  // nothing to add
  float* const first = room(w.products, static_cast<size_t>(slots) * gate_up->rows);
  gate_up->apply(shared, first, {matrices, slots, 1, tokens}, level, threads);
  const float* both = through(gate_up_left, first, slots, w.channels, level, threads);
  float* const between = room(w.units, static_cast<size_t>(slots) * units);
  activate(both, both + units, 2 * units, slots, units, between, level, threads);
  const float* right = through(down_right, between, slots, w.narrowed, level, threads);
  float* const second = room(w.products, static_cast<size_t>(slots) * down->rows);
  down->apply(right, second, {matrices, slots, 1, nullptr}, level, threads);

  // Every thread has columns of its own: tokens meet their experts in the same order for any number of threads.
  const int columns = slots < kFewSlots ? width : kColumnsPerTask;
  for_each(tasks_of(width, columns), threads, [&](int task) {
    const int from = task * columns, several = std::min(columns, width - from);
    for (int i = 0; i < slots; ++i)
      dense_of(level).add_floats(second + static_cast<size_t>(i) * width + from, factors[i], several,
                                 summed + tokens[i] * width + from);
  });
}

DecoderLayer::DecoderLayer(const float* attention_norm, const Attention& attention, const float* mlp_norm, float epsilon)
    : attention(attention), attention_norm_(attention_norm), mlp_norm_(mlp_norm), epsilon_(epsilon) {}

void DecoderLayer::step(float* states, int count, const float* cosines, const float* sines, const LayerCache& cache,
                        const Level& level, int threads) const {
  const int hidden = this->hidden();
  float* const normed = room(workspace().normed, static_cast<size_t>(count) * hidden);
  normalize(states, attention_norm_, epsilon_, count, hidden, normed, level, threads);
  add_attention(attention, epsilon_, normed, states, count, cosines, sines, cache, level, threads);
  normalize(states, mlp_norm_, epsilon_, count, hidden, normed, level, threads);
  if (shared) add_shared(*shared, normed, states, count, hidden, level, threads);
  if (routed) add_routed(*routed, normed, states, count, hidden, level, threads);
  if (dense) add(apply_mlp(*dense, normed, count, level, threads), static_cast<size_t>(count) * hidden, states);
}

}  // namespace moebius
