#include "linear_portable.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace moebius {
namespace {

constexpr int kAhead = 2048;  // bytes that are fetched early

inline void fetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0); }

inline __m256i words_at(const int16_t* values) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)); }

inline __m128i bytes_at(const uint8_t* codes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)); }

inline int32_t total_of(__m256i words) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

void dot_bytes(const LinearRows& rows, const int16_t* arranged, int64_t* sums) {
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* row = rows.codes + r * rows.stride;
    int64_t total = 0;
    for (int begin = 0; begin < rows.columns; begin += kByteRun) {
      const int end = rows.columns - begin < kByteRun ? rows.columns : begin + kByteRun;
      __m256i sum = _mm256_setzero_si256();
      int j = begin;
      for (; j + 16 <= end; j += 16) {
        if (j % 64 == 0) fetch(row + j);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes_at(row + j)), words_at(arranged + j)));
      }
      int32_t rest = 0;
      for (; j < end; ++j) rest += arranged[j] * row[j];
      total += total_of(sum) + int64_t{rest};
    }
    sums[r] = total;
  }
}

// Eight partial sums of a whole block.
inline __m256i block_of(const uint8_t* at, const int16_t* arranged) {
  const __m256i pairs = _mm256_cvtepu8_epi16(bytes_at(at));
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(pairs, _mm256_set1_epi16(15)), words_at(arranged));
  return _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(pairs, 4), words_at(arranged + kBlock / 2)));
}

// Eight blocks, with one scale each.
inline __m256 eight_blocks(const uint8_t* at, const int16_t* arranged, const int32_t* centres, __m256 scales) {
  __m256i parts[4];
  for (int i = 0; i < 4; ++i)
    parts[i] = _mm256_hadd_epi32(block_of(at + 32 * i, arranged + 2 * i * kBlock),
                                 block_of(at + 32 * i + 16, arranged + (2 * i + 1) * kBlock));
  const __m256i a = _mm256_hadd_epi32(parts[0], parts[1]), b = _mm256_hadd_epi32(parts[2], parts[3]);
  const __m256i sum = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  const __m256i centre = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(centres));
  return _mm256_mul_ps(scales, _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(sum, sum), centre)));
}

void dot_nibbles(const LinearRows& rows, const int16_t* arranged, const int32_t* centres, float* sums) {
  const int bytes = (rows.columns + 1) / 2, whole = bytes / 128 * 8;  // blocks, eight at a time
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* row = rows.codes + r * rows.stride;
    const uint16_t* scales = rows.scales + static_cast<size_t>(r) * rows.groups;
    __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int b = 0;
    for (; b < whole; b += 8) {
      float each[8];
      for (int i = 0; i < 8; ++i) each[i] = portable_half(scales[(b + i) / rows.blocks_per_scale]);
      const uint8_t* at = row + b * (kBlock / 2);
      fetch(at), fetch(at + 64);
      __m256& sum = lanes[b / 8 % 2];
      sum = _mm256_add_ps(sum, eight_blocks(at, arranged + b * kBlock, centres + b, _mm256_loadu_ps(each)));
    }
    float rest[kBlockLanes];
    _mm256_storeu_ps(rest, lanes[0]);
    _mm256_storeu_ps(rest + 8, lanes[1]);
    for (int at = b * (kBlock / 2); at < bytes; ++b, at += kBlock / 2) {
      const int count = bytes - at < kBlock / 2 ? bytes - at : kBlock / 2;
      const int32_t sum = portable_block(row + at, count, arranged + b * kBlock);
      const float product = portable_half(scales[b / rows.blocks_per_scale]) * static_cast<float>(2 * sum - centres[b]);
      rest[b % kBlockLanes] += product;
    }
    sums[r] = portable_lanes(rest);
  }
}

}  // namespace

const LinearLevel* avx2_linear() {
  static const LinearLevel level{portable_arrange, dot_bytes, dot_nibbles, portable_expand_floats, portable_expand_bf16};
  return &level;
}

}  // namespace moebius

#else

namespace moebius {
const LinearLevel* avx2_linear() { return nullptr; }
}  // namespace moebius

#endif
