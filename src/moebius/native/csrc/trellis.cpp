// Viterbi's algorithm for tail-biting trellises: the best path of every sequence of a batch.
//
// The state after a sample is the last `log2(states)` bits of the sequence, which slides by `rate` bits per sample, and stands
// for a value of the table. A state has 2^rate predecessors that differ in the bits that slide out, shared by as many
// successors: the best of them is found once for all. Every comparison is the same on every machine, so the bytes are too.
#include "trellis.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace moebius {
namespace {

constexpr int kStates = kTrellisStates;
constexpr int kOverlap = 32;  // samples on either side of the seam that settle the state there

// The widest version that the processor has is chosen when the module is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define MOEBIUS_WIDEST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define MOEBIUS_WIDEST
#endif

// One sample after the other: `cost` of every state, and by which branch its group of successors was reached.
template <int Rate>
MOEBIUS_WIDEST void step_through(const float* __restrict values, const float* __restrict scales, int length,
                                 const float* __restrict table, float* __restrict cost, uint8_t* __restrict back) {
  constexpr int kBranches = 1 << Rate, kGroups = kStates / kBranches;
  alignas(64) float now[kStates], least[kGroups], apart[kStates], levels[kStates];
  alignas(64) int32_t from[kGroups];
  for (int group = 0; group < kGroups; ++group)
    for (int code = 0; code < kBranches; ++code) levels[code * kGroups + group] = table[group * kBranches + code];
  for (int state = 0; state < kStates; ++state) now[state] = cost[state];
  for (int i = 0; i < length; ++i) {
    const float value = values[i], scale = scales[i];
    for (int group = 0; group < kGroups; ++group) least[group] = now[group];
    for (int group = 0; group < kGroups; ++group) from[group] = 0;
    for (int branch = 1; branch < kBranches; ++branch)
      for (int group = 0; group < kGroups; ++group) {
        const float other = now[branch * kGroups + group], best = least[group];
        from[group] = other < best ? branch : from[group];
        least[group] = other < best ? other : best;
      }
    for (int group = 0; group < kGroups; ++group) back[group] = (uint8_t)from[group];
    back += kGroups;
    for (int code = 0; code < kBranches; ++code)
      for (int group = 0; group < kGroups; ++group) {
        const float error = value - scale * levels[code * kGroups + group];
        apart[code * kGroups + group] = least[group] + error * error;
      }
    for (int group = 0; group < kGroups; ++group)
      for (int code = 0; code < kBranches; ++code) now[group * kBranches + code] = apart[code * kGroups + group];
  }
  for (int state = 0; state < kStates; ++state) cost[state] = now[state];
}

template <int Rate>
class Viterbi {
  static constexpr int kBranches = 1 << Rate, kGroups = kStates / kBranches;

 public:
  Viterbi(const float* table, int length) : table_(table), back_((size_t)std::max(length, 2 * kOverlap) * kGroups) {}

  // Codes of one sequence of values, which path values times `scales` should come near to.
  void best(const float* values, const float* scales, int length, uint8_t* codes) {
    if (length * Rate < 16) return shortest(values, scales, length, codes);
    const int around = std::min(kOverlap, length / 2);
    std::vector<float> seam, seam_scales;
    for (int i = length - around; i < length + around; ++i) {
      seam.push_back(values[i % length]);
      seam_scales.push_back(scales[i % length]);
    }
    start(-1);
    forward(seam.data(), seam_scales.data(), 2 * around);
    int state = cheapest();
    for (int i = 2 * around - 1; i >= around; --i) state = before(state, i);
    start(state);
    forward(values, scales, length);
    trace(state, length, codes);
  }

 private:
  // Every seam is tried: there are sequences too short for some of them.
  void shortest(const float* values, const float* scales, int length, uint8_t* codes) {
    float least = std::numeric_limits<float>::infinity();
    for (int state = 0; state < kStates; ++state) {
      start(state);
      forward(values, scales, length);
      if (cost_[state] < least) {
        least = cost_[state];
        trace(state, length, codes);
      }
    }
  }

  void start(int state) {
    std::fill_n(cost_, kStates, state < 0 ? 0.0f : std::numeric_limits<float>::infinity());
    if (state >= 0) cost_[state] = 0;
  }

  void forward(const float* values, const float* scales, int length) {
    step_through<Rate>(values, scales, length, table_, cost_, back_.data());
  }

  int cheapest() const { return (int)(std::min_element(cost_, cost_ + kStates) - cost_); }

  int before(int state, int i) const {
    const int group = state >> Rate;
    return group | back_[(size_t)i * kGroups + group] * kGroups;
  }

  void trace(int state, int length, uint8_t* codes) const {
    for (int i = length - 1; i >= 0; --i) {
      codes[i] = (uint8_t)(state & (kBranches - 1));
      state = before(state, i);
    }
  }

  const float* table_;
  alignas(64) float cost_[kStates];
  std::vector<uint8_t> back_;
};

template <int Rate>
void all(const TrellisSearch& search) {
  Viterbi<Rate> viterbi(search.table, search.length);
  for (int row = 0; row < search.count; ++row) {
    const size_t at = (size_t)row * search.length;
    viterbi.best(search.values + at, search.scales + at, search.length, search.codes + at);
  }
}

}  // namespace

void search_trellis(const TrellisSearch& search, int rate) {
  switch (rate) {
    case 1: return all<1>(search);
    case 2: return all<2>(search);
    case 3: return all<3>(search);
    default: return all<4>(search);
  }
}

}  // namespace moebius
