#include "contents.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace moebius {
namespace {

constexpr size_t kLanes = 8;                                                 // which do not wait for each other
constexpr uint64_t kSpread = 0x9e3779b97f4a7c15, kMix = 0xbf58476d1ce4e5b9;  // odd: no two words give the same

using Lanes = std::array<uint64_t, kLanes>;

inline uint64_t turned(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

// One-to-one in the lane and in the word: a change of a single word is always seen.
inline uint64_t taken_in(uint64_t lane, uint64_t word) { return turned(lane + word * kSpread, 31) * kMix; }

void take_in(Lanes& lanes, const uint8_t* bytes) {
  Lanes words;
  std::memcpy(words.data(), bytes, sizeof words);
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = taken_in(lanes[i], words[i]);
}

void take_in(Lanes& lanes, const Bytes& part) {
  const size_t whole = part.count / sizeof(Lanes) * sizeof(Lanes);
  for (size_t at = 0; at < whole; at += sizeof(Lanes)) take_in(lanes, part.at + at);
  uint8_t rest[sizeof(Lanes)] = {};  // filled up with zeros, which the count tells from zeros of the tensor
  std::copy(part.at + whole, part.at + part.count, rest);
  take_in(lanes, rest);
  lanes[0] = taken_in(lanes[0], part.count);
}

}  // namespace

uint64_t fingerprint(const std::vector<Bytes>& parts) {
  Lanes lanes{1, 2, 3, 4, 5, 6, 7, 8};
  for (const Bytes& part : parts) take_in(lanes, part);
  uint64_t all = 0;
  for (const uint64_t lane : lanes) all = taken_in(all, lane);
  return all;
}

}  // namespace moebius
