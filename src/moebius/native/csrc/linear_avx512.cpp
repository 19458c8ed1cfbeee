// Integers of the vector are two digits of 7 bits and a sign: the products with codes, which have none, are those of VNNI.
#include "linear_portable.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

namespace moebius {
namespace {

constexpr int kAhead = 4096;  // bytes that are fetched early

inline void fetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0); }

// 64 words to 64 coarse and 64 fine digits.
inline void digits(__m512i a, __m512i b, int8_t* coarse, int8_t* fine) {
  const __m512i half = _mm512_set1_epi16(64);
  const __m512i a_high = _mm512_srai_epi16(_mm512_add_epi16(a, half), 7),
                b_high = _mm512_srai_epi16(_mm512_add_epi16(b, half), 7);
  const auto join = [](__m512i x, __m512i y) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(x)), _mm512_cvtepi16_epi8(y), 1);
  };
  _mm512_storeu_si512(coarse, join(a_high, b_high));
  const __m512i a_low = _mm512_sub_epi16(a, _mm512_slli_epi16(a_high, 7)),
                b_low = _mm512_sub_epi16(b, _mm512_slli_epi16(b_high, 7));
  _mm512_storeu_si512(fine, join(a_low, b_low));
}

// Of every 64 columns the coarse digits and the fine ones; of nibbles, of every 128 the coarse digits of even and odd columns,
// and the fine ones.
void arrange(const int16_t* values, int padded, int bits, int16_t* out) {
  auto* to = reinterpret_cast<int8_t*>(out);
  if (bits == 8) {
    for (int j = 0; j < padded; j += 64, to += 128)
      digits(_mm512_loadu_si512(values + j), _mm512_loadu_si512(values + j + 32), to, to + 64);
    return;
  }
  for (int j = 0; j < padded; j += 128, to += 256) {
    __m512i pairs[4];
    for (int i = 0; i < 4; ++i) pairs[i] = _mm512_loadu_si512(values + j + 32 * i);
    const auto words = [](__m512i x, __m512i y) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(x)), _mm512_cvtepi32_epi16(y), 1);
    };
    const auto odd = [](__m512i x) { return _mm512_srli_epi32(x, 16); };
    digits(words(pairs[0], pairs[1]), words(pairs[2], pairs[3]), to, to + 128);
    digits(words(odd(pairs[0]), odd(pairs[1])), words(odd(pairs[2]), odd(pairs[3])), to + 64, to + 192);
  }
}

// 64 bytes, fewer at the end of the codes; what they hold behind the end of a row is multiplied by zero.
inline __m512i bytes_at(const uint8_t* at, const uint8_t* end) {
  const ptrdiff_t left = end - at;
  if (left >= 64) return _mm512_loadu_si512(at);
  return _mm512_maskz_loadu_epi8(left <= 0 ? 0 : (__mmask64{1} << left) - 1, at);
}

void dot_bytes(const LinearRows& rows, const int16_t* arranged, int64_t* sums) {
  const auto* digits = reinterpret_cast<const int8_t*>(arranged);
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* row = rows.codes + r * rows.stride;
    int64_t total = 0;
    for (int begin = 0; begin < rows.columns; begin += kByteRun) {
      const int end = rows.columns - begin < kByteRun ? rows.columns : begin + kByteRun;
      __m512i coarse = _mm512_setzero_si512(), fine = _mm512_setzero_si512();
      for (int j = begin; j < end; j += 64) {
        fetch(row + j);
        const __m512i code = bytes_at(row + j, rows.end);
        coarse = _mm512_dpbusd_epi32(coarse, code, _mm512_loadu_si512(digits + 2 * j));
        fine = _mm512_dpbusd_epi32(fine, code, _mm512_loadu_si512(digits + 2 * j + 64));
      }
      total += _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(coarse, 7), fine));
    }
    sums[r] = total;
  }
}

// 128 columns: sums of eight columns each, a block in every quarter of the register.
inline __m512i quads(__m512i codes, const int8_t* digits) {
  const __m512i low = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
  const __m512i even = _mm512_and_si512(codes, low), odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
  __m512i coarse = _mm512_dpbusd_epi32(zero, even, _mm512_loadu_si512(digits));
  __m512i fine = _mm512_dpbusd_epi32(zero, even, _mm512_loadu_si512(digits + 128));
  coarse = _mm512_dpbusd_epi32(coarse, odd, _mm512_loadu_si512(digits + 64));
  fine = _mm512_dpbusd_epi32(fine, odd, _mm512_loadu_si512(digits + 192));
  return _mm512_add_epi32(_mm512_slli_epi32(coarse, 7), fine);
}

// The sums of sixteen blocks, in order.
inline __m512i sixteen_blocks(const uint8_t* at, const uint8_t* end, const int8_t* digits) {
  __m512i parts[4];
  for (int i = 0; i < 4; ++i) {
    fetch(at + 64 * i);
    parts[i] = quads(bytes_at(at + 64 * i, end), digits + 256 * i);
  }
  const auto fold = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i a = fold(parts[0], parts[1]), b = fold(parts[2], parts[3]);
  const __m512i mixed = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, mixed);
}

void dot_nibbles(const LinearRows& rows, const int16_t* arranged, const int32_t* centres, float* sums) {
  const auto* digits = reinterpret_cast<const int8_t*>(arranged);
  const int chunks = (rows.columns + kLinearPadding - 1) / kLinearPadding, per_chunk = kBlockLanes / rows.blocks_per_scale;
  alignas(64) int32_t index[kBlockLanes];
  for (int b = 0; b < kBlockLanes; ++b) index[b] = b / rows.blocks_per_scale;
  const __m512i spread = _mm512_load_si512(index);
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* row = rows.codes + r * rows.stride;
    const uint16_t* scales = rows.scales + static_cast<size_t>(r) * rows.groups;
    __m512 total = _mm512_setzero_ps();
    for (int c = 0; c < chunks; ++c) {
      const __m512i sum = sixteen_blocks(row + c * (kLinearPadding / 2), rows.end, digits + 2 * c * kLinearPadding);
      const __m512i level = _mm512_sub_epi32(_mm512_add_epi32(sum, sum), _mm512_loadu_si512(centres + c * kBlockLanes));
      const int left = rows.groups - c * per_chunk, count = left < per_chunk ? left : per_chunk;
      const auto mask = static_cast<__mmask16>((1 << count) - 1);
      const __m512 of_groups = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales + c * per_chunk));
      total = _mm512_add_ps(total, _mm512_mul_ps(_mm512_permutexvar_ps(spread, of_groups), _mm512_cvtepi32_ps(level)));
    }
    alignas(64) float lanes[kBlockLanes];
    _mm512_store_ps(lanes, total);
    sums[r] = portable_lanes(lanes);
  }
}

}  // namespace

const LinearLevel* avx512_linear() {
  static const LinearLevel level{arrange, dot_bytes, dot_nibbles, portable_expand_floats, portable_expand_bf16};
  return &level;
}

}  // namespace moebius

#else

namespace moebius {
const LinearLevel* avx512_linear() { return nullptr; }
}  // namespace moebius

#endif
