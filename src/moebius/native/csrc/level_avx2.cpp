// AVX2 with BMI2 (Haswell, Zen and later).
#include "portable.h"

#if defined(__AVX2__) && defined(__BMI2__)
#include <immintrin.h>

namespace moebius {
namespace {

constexpr int kWords = 16;  // 16-bit lanes of a register

// 16 bits to 16 lanes: all ones where the bit is set.
inline __m256i lanes_of(uint16_t bits, __m256i each) {
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<short>(bits)), each), each);
}

inline __m256i each_bit() {
  return _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, static_cast<short>(0x8000));
}

template <int kRegisters>
inline void add_block(const uint8_t* signs, size_t stride, int rows, const int16_t* values, size_t ahead, int32_t* sums) {
  const __m256i each = each_bit();
  __m256i total[kRegisters];
  for (int i = 0; i < kRegisters; ++i) total[i] = _mm256_setzero_si256();
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = signs + r * stride;
    const __m256i value = _mm256_set1_epi16(values[r]);
    _mm_prefetch(reinterpret_cast<const char*>(row + ahead), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; ++i) {
      uint16_t bits;
      std::memcpy(&bits, row + 2 * i, sizeof bits);
      total[i] = _mm256_add_epi16(total[i], _mm256_and_si256(value, lanes_of(bits, each)));
    }
  }
  for (int i = 0; i < kRegisters; ++i) {
    __m256i* at = reinterpret_cast<__m256i*>(sums + i * kWords);
    const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(total[i]));
    const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(total[i], 1));
    _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), low));
    _mm256_storeu_si256(at + 1, _mm256_add_epi32(_mm256_loadu_si256(at + 1), high));
  }
}

void add_signs(const uint8_t* signs, size_t stride, int rows, const int16_t* values, int lanes, int ahead, int32_t* sums) {
  const size_t distance = ahead * stride;
  int j = 0;
  for (; j + 8 * kWords <= lanes; j += 8 * kWords) add_block<8>(signs + j / 8, stride, rows, values, distance, sums + j);
  for (; j + kWords <= lanes; j += kWords) add_block<1>(signs + j / 8, stride, rows, values, distance, sums + j);
  if (j < lanes) portable_add_signs(signs + j / 8, stride, rows, values, lanes - j, 0, sums + j);
}

inline int32_t total_of(__m256i words) {
  const __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

template <int kRows>
inline void dot_rows(const uint8_t* signs, size_t stride, const int16_t* values, int columns, int32_t* sums) {
  const __m256i each = each_bit();
  __m256i total[kRows];
  for (int i = 0; i < kRows; ++i) total[i] = _mm256_setzero_si256();
  for (int j = 0; j < columns; j += kWords) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + j));
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      uint16_t bits;
      std::memcpy(&bits, signs + i * stride + j / 8, sizeof bits);
      total[i] = _mm256_add_epi16(total[i], _mm256_and_si256(value, lanes_of(bits, each)));
    }
  }
  for (int i = 0; i < kRows; ++i) sums[i] += total_of(total[i]);
}

void dot_signs(const uint8_t* signs, const uint8_t* end, size_t stride, int rows, const int16_t* values, int columns,
               int32_t* sums) {
  const int whole = columns / kWords * kWords;
  int r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<4>(signs + r * stride, stride, values, whole, sums + r);
  for (; r < rows; ++r) dot_rows<1>(signs + r * stride, stride, values, whole, sums + r);
  if (whole < columns) portable_dot_signs(signs + whole / 8, end, stride, rows, values + whole, columns - whole, sums);
}

// `count` codes to bytes, eight at a time; what follows up to a multiple of eight is whatever the bytes hold.
inline void spread(const uint8_t* at, const uint8_t* end, int bits, int count, uint8_t* out) {
  const uint64_t low = 0x0101010101010101u * static_cast<uint64_t>((1 << bits) - 1);
  for (int j = 0; j < count; j += 8, at += bits) {
    uint64_t packed = 0;
    std::memcpy(&packed, at, end - at >= 8 ? 8 : end > at ? end - at : 0);
    const uint64_t codes = _pdep_u64(packed, low);
    std::memcpy(out + j, &codes, 8);
  }
}

constexpr int kChunk = 512;  // codes that are bytes at a time

inline __m256i words_at(const uint8_t* codes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

void dot_codes(const Codes& codes, const int16_t* values, int columns, int32_t* sums) {
  alignas(32) uint8_t bytes[kChunk + 16] = {};
  for (int r = 0; r < codes.rows; ++r) {
    const uint8_t* row = codes.codes + r * codes.stride;
    __m256i total = _mm256_setzero_si256();
    for (int begin = 0; begin < columns; begin += kChunk) {
      const int count = columns - begin < kChunk ? columns - begin : kChunk;
      spread(row + static_cast<size_t>(begin) / 8 * codes.bits, codes.end, codes.bits, count, bytes);
      for (int j = 0; j < count; j += kWords) {
        const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + begin + j));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(words_at(bytes + j), value));
      }
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sums[r] = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
  }
}

// Two directions at a time: words of both, interleaved, so that one instruction sums over the pair.
void add_codes(const Codes& codes, const int16_t* values, int first, int lanes, int32_t* sums) {
  alignas(32) uint8_t one[kChunk + 16] = {}, other[kChunk + 16] = {};
  for (int begin = 0; begin < lanes; begin += kChunk) {
    const int count = lanes - begin < kChunk ? lanes - begin : kChunk, whole = count / kWords * kWords;
    for (int r = 0; r < codes.rows; r += 2) {
      const uint8_t* at = codes.codes + r * codes.stride + static_cast<size_t>(first + begin) / 8 * codes.bits;
      const bool both = r + 1 < codes.rows;
      spread(at, codes.end, codes.bits, count, one);
      if (both) spread(at + codes.stride, codes.end, codes.bits, count, other);
      const int16_t second = both ? values[r + 1] : int16_t{0};
      const uint32_t pair = static_cast<uint16_t>(values[r]) | static_cast<uint32_t>(static_cast<uint16_t>(second)) << 16;
      const __m256i factor = _mm256_set1_epi32(static_cast<int>(pair));
      for (int j = 0; j < whole; j += kWords) {
        const __m256i a = words_at(one + j), b = words_at(other + j);
        const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), factor);   // entries 0-3 and 8-11
        const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), factor);  // entries 4-7 and 12-15
        __m256i* to = reinterpret_cast<__m256i*>(sums + begin + j);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_permute2x128_si256(low, high, 0x20)));
        _mm256_storeu_si256(to + 1, _mm256_add_epi32(_mm256_loadu_si256(to + 1), _mm256_permute2x128_si256(low, high, 0x31)));
      }
      for (int j = whole; j < count; ++j) sums[begin + j] += values[r] * one[j] + second * other[j];
    }
  }
}

// Sixteen words by index: their low and high bytes come from two tables of bytes.
void look_up(const uint8_t* const* planes, int count, const uint16_t* table, int lanes, uint16_t* out) {
  if (count > 4) return portable_look_up(planes, count, table, lanes, out);  // more values than a register holds
  alignas(16) uint8_t low[16], high[16];
  for (int i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>(table[i]), high[i] = static_cast<uint8_t>(table[i] >> 8);
  const __m256i lows = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low)));
  const __m256i highs = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)));
  const __m256i each = each_bit();
  int j = 0;
  for (; j + kWords <= lanes; j += kWords) {
    __m256i index = _mm256_setzero_si256();
    for (int p = 0; p < count; ++p) {
      uint16_t bits;
      std::memcpy(&bits, planes[p] + j / 8, sizeof bits);
      const __m256i place = _mm256_set1_epi16(static_cast<short>(1 << p));
      index = _mm256_or_si256(index, _mm256_and_si256(lanes_of(bits, each), place));
    }
    // The upper byte of each word asks for byte 0, and is then cleared or shifted out.
    const __m256i bottom = _mm256_and_si256(_mm256_shuffle_epi8(lows, index), _mm256_set1_epi16(0xff));
    const __m256i top = _mm256_slli_epi16(_mm256_shuffle_epi8(highs, index), 8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), _mm256_or_si256(bottom, top));
  }
  const uint8_t* rest[4];
  for (int p = 0; p < count; ++p) rest[p] = planes[p] + j / 8;
  portable_look_up(rest, count, table, lanes - j, out + j);
}

void expand_codes(const Codes& codes, int row, int lanes, uint16_t* out) {
  alignas(32) uint8_t bytes[kChunk + 16];
  for (int begin = 0; begin < lanes; begin += kChunk) {
    const int count = lanes - begin < kChunk ? lanes - begin : kChunk;
    const uint8_t* at = codes.codes + row * codes.stride + static_cast<size_t>(begin) / 8 * codes.bits;
    spread(at, codes.end, codes.bits, count, bytes);
    for (int j = 0; j < count; ++j) out[begin + j] = portable_bf16(2 * bytes[j] - ((1 << codes.bits) - 1));
  }
}

}  // namespace

const Level* avx2_level() {
  static const Level level{"avx2",  add_signs,    dot_signs,      dot_codes,         add_codes,
                           look_up, expand_codes, portable_round, portable_multiply, nullptr};
  return &level;
}

}  // namespace moebius

#else

namespace moebius {
const Level* avx2_level() { return nullptr; }
}  // namespace moebius

#endif
