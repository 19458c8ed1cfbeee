// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
//
// Signs are masks as they lie in memory: 32 bits are one mask of an addition of 32 values. That runs at one mask per cycle,
// which is as fast as memory brings them, and needs no other layout than that of the files. Tables for groups of signs
// are several times as fast from a cache and twice as fast from memory, but need a copy of the weights in another order.
#include "portable.h"
#include "tiles.h"

#ifdef __AVX512VBMI__
#include <immintrin.h>

#include "spread_avx512.h"

namespace moebius {
namespace {

constexpr int kWords = 32;  // 16-bit lanes of a register

inline void add_to(int32_t* sums, __m512i words) {
  const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(words));
  const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, 1));
  _mm512_storeu_si512(sums, _mm512_add_epi32(_mm512_loadu_si512(sums), low));
  _mm512_storeu_si512(sums + 16, _mm512_add_epi32(_mm512_loadu_si512(sums + 16), high));
}

template <int kRegisters>
inline void add_block(const uint8_t* signs, size_t stride, int rows, const int16_t* values, size_t ahead, int32_t* sums) {
  __m512i total[kRegisters];
  for (int i = 0; i < kRegisters; ++i) total[i] = _mm512_setzero_si512();
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = signs + r * stride;
    const __m512i value = _mm512_set1_epi16(values[r]);
    _mm_prefetch(reinterpret_cast<const char*>(row + ahead), _MM_HINT_T0);
#pragma GCC unroll 16
    for (int i = 0; i < kRegisters; ++i) {
      uint32_t mask;
      std::memcpy(&mask, row + 4 * i, sizeof mask);
      total[i] = _mm512_mask_add_epi16(total[i], mask, total[i], value);
    }
  }
  for (int i = 0; i < kRegisters; ++i) add_to(sums + i * kWords, total[i]);
}

void add_signs(const uint8_t* signs, size_t stride, int rows, const int16_t* values, int lanes, int ahead, int32_t* sums) {
  const size_t distance = ahead * stride;
  int j = 0;
  for (; j + 16 * kWords <= lanes; j += 16 * kWords) add_block<16>(signs + j / 8, stride, rows, values, distance, sums + j);
  for (; j + 4 * kWords <= lanes; j += 4 * kWords) add_block<4>(signs + j / 8, stride, rows, values, distance, sums + j);
  for (; j + kWords <= lanes; j += kWords) add_block<1>(signs + j / 8, stride, rows, values, distance, sums + j);
  if (j < lanes) portable_add_signs(signs + j / 8, stride, rows, values, lanes - j, 0, sums + j);
}

// Sixteen registers of sixteen sums to one register of their totals.
inline __m512i totals(__m512i* parts) {
  for (int i = 0; i < 8; ++i) {
    const __m512i a = parts[2 * i], b = parts[2 * i + 1];
    parts[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = parts[2 * i], b = parts[2 * i + 1];
    parts[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512i a = parts[2 * i], b = parts[2 * i + 1];
    parts[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }
  return _mm512_add_epi32(_mm512_shuffle_i32x4(parts[0], parts[1], 0x88), _mm512_shuffle_i32x4(parts[0], parts[1], 0xdd));
}

void dot_signs(const uint8_t* signs, const uint8_t* end, size_t stride, int rows, const int16_t* values, int columns,
               int32_t* sums) {
  constexpr int kRows = 16;
  const __m512i ones = _mm512_set1_epi16(1);
  int r = 0;
  for (; r + kRows <= rows; r += kRows) {
    const uint8_t* first = signs + r * stride;
    __m512i total[kRows];
    for (int i = 0; i < kRows; ++i) total[i] = _mm512_setzero_si512();
    for (size_t at = 0; at < kRows * stride; at += 64)
      _mm_prefetch(reinterpret_cast<const char*>(first + 2 * kRows * stride + at), _MM_HINT_T0);
    int j = 0;
    // Whole masks; the last one of the very last row may not be read beyond its end.
    for (; j < columns && first + (kRows - 1) * stride + j / 8 + 4 <= end; j += kWords) {
      const __m512i value = _mm512_loadu_si512(values + j);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        uint32_t mask;
        std::memcpy(&mask, first + i * stride + j / 8, sizeof mask);
        total[i] = _mm512_mask_add_epi16(total[i], mask, total[i], value);
      }
    }
    for (int i = 0; i < kRows; ++i) total[i] = _mm512_madd_epi16(total[i], ones);
    _mm512_storeu_si512(sums + r, _mm512_add_epi32(_mm512_loadu_si512(sums + r), totals(total)));
    if (j < columns) portable_dot_signs(first + j / 8, end, stride, kRows, values + j, columns - j, sums + r);
  }
  for (; r < rows; ++r) {
    const uint8_t* row = signs + r * stride;
    __m512i total = _mm512_setzero_si512();
    int j = 0;
    for (; j < columns && row + j / 8 + 4 <= end; j += kWords) {
      uint32_t mask;
      std::memcpy(&mask, row + j / 8, sizeof mask);
      total = _mm512_mask_add_epi16(total, mask, total, _mm512_loadu_si512(values + j));
    }
    sums[r] += _mm512_reduce_add_epi32(_mm512_madd_epi16(total, ones));
    if (j < columns) portable_dot_signs(row + j / 8, end, stride, 1, values + j, columns - j, sums + r);
  }
}

// values = 128 · high + low, digits of 7 bits and a sign.
inline void digits(const int16_t* values, __m512i& high, __m512i& low) {
  const __m512i a = _mm512_loadu_si512(values), b = _mm512_loadu_si512(values + 32), half = _mm512_set1_epi16(64);
  const __m512i a_high = _mm512_srai_epi16(_mm512_add_epi16(a, half), 7);
  const __m512i b_high = _mm512_srai_epi16(_mm512_add_epi16(b, half), 7);
  const auto join = [](__m512i x, __m512i y) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(x)), _mm512_cvtepi16_epi8(y), 1);
  };
  high = join(a_high, b_high);
  low = join(_mm512_sub_epi16(a, _mm512_slli_epi16(a_high, 7)), _mm512_sub_epi16(b, _mm512_slli_epi16(b_high, 7)));
}

void dot_codes(const Codes& codes, const int16_t* values, int columns, int32_t* sums) {
  constexpr int kRows = 8, kChunks = 32;  // 2048 columns at a time have their digits at hand
  const Spread spread(codes.bits);
  for (int r = 0; r < codes.rows; ++r) sums[r] = 0;
  for (int begin = 0; begin < columns; begin += kChunks * 64) {
    const int chunks = (columns - begin + 63) / 64 < kChunks ? (columns - begin + 63) / 64 : kChunks;
    __m512i high[kChunks], low[kChunks];
    for (int c = 0; c < chunks; ++c) digits(values + begin + 64 * c, high[c], low[c]);
    for (int r = 0; r < codes.rows; r += kRows) {
      const int rows = codes.rows - r < kRows ? codes.rows - r : kRows;
      for (int i = 0; i < rows; ++i) {
        const uint8_t* row = codes.codes + (r + i) * codes.stride + static_cast<size_t>(begin) / 8 * codes.bits;
        __m512i coarse = _mm512_setzero_si512(), fine = _mm512_setzero_si512();
        for (int c = 0; c < chunks; ++c) {
          const uint8_t* at = row + c * spread.width;
          _mm_prefetch(reinterpret_cast<const char*>(at + 4 * codes.stride), _MM_HINT_T0);
          const __m512i code = spread.load(at, spread.within(at, codes.end));
          coarse = _mm512_dpbusd_epi32(coarse, code, high[c]);
          fine = _mm512_dpbusd_epi32(fine, code, low[c]);
        }
        sums[r + i] += _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(coarse, 7), fine));
      }
    }
  }
}

// Four directions, 64 entries of each: their bytes are interleaved so that one instruction sums over the directions.
inline void add_four(const __m512i* code, __m512i high, __m512i low, __m512i* coarse, __m512i* fine) {
  const __m512i ab_low = _mm512_unpacklo_epi8(code[0], code[1]), ab_high = _mm512_unpackhi_epi8(code[0], code[1]);
  const __m512i cd_low = _mm512_unpacklo_epi8(code[2], code[3]), cd_high = _mm512_unpackhi_epi8(code[2], code[3]);
  const __m512i quads[4] = {_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
                            _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)};
  for (int m = 0; m < 4; ++m) {
    coarse[m] = _mm512_dpbusd_epi32(coarse[m], quads[m], high);
    fine[m] = _mm512_dpbusd_epi32(fine[m], quads[m], low);
  }
}

// Register m holds entries 16·L + 4·m + i at block L, place i: back to order, and onto the sums.
inline void add_entries(const __m512i* coarse, const __m512i* fine, int lanes, int32_t* sums) {
  __m512i sum[4];
  for (int m = 0; m < 4; ++m) sum[m] = _mm512_add_epi32(_mm512_slli_epi32(coarse[m], 7), fine[m]);
  const __m512i a = _mm512_shuffle_i32x4(sum[0], sum[1], 0x44), b = _mm512_shuffle_i32x4(sum[2], sum[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(sum[0], sum[1], 0xee), d = _mm512_shuffle_i32x4(sum[2], sum[3], 0xee);
  const __m512i ordered[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
                              _mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)};
  for (int m = 0; m < 4 && 16 * m < lanes; ++m) {
    const int left = lanes - 16 * m;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    _mm512_mask_storeu_epi32(sums + 16 * m, mask, _mm512_add_epi32(_mm512_maskz_loadu_epi32(mask, sums + 16 * m), ordered[m]));
  }
}

void add_codes(const Codes& codes, const int16_t* values, int first, int lanes, int32_t* sums) {
  constexpr int kRows = 16;  // rows that pass through the nearest cache together, while the next ones are fetched
  const Spread spread(codes.bits);
  for (int begin = 0; begin < codes.rows; begin += kRows) {
    const int rows = codes.rows - begin < kRows ? codes.rows - begin : kRows;
    uint32_t high[kRows / 4], low[kRows / 4];
    for (int q = 0; 4 * q < rows; ++q) {
      high[q] = low[q] = 0;
      for (int i = 0; i < 4 && 4 * q + i < rows; ++i) {
        const int value = values[begin + 4 * q + i], coarse = (value + 64) >> 7;
        high[q] |= static_cast<uint32_t>(coarse & 0xff) << (8 * i);
        low[q] |= static_cast<uint32_t>((value - coarse * 128) & 0xff) << (8 * i);
      }
    }
    for (int j = 0; j < lanes; j += 64) {
      const uint8_t* corner = codes.codes + begin * codes.stride + static_cast<size_t>(first + j) / 8 * codes.bits;
      __m512i coarse[4], fine[4];
      for (int m = 0; m < 4; ++m) coarse[m] = fine[m] = _mm512_setzero_si512();
      for (int q = 0; 4 * q < rows; ++q) {
        __m512i code[4];
        for (int i = 0; i < 4; ++i) {
          const int row = 4 * q + i < rows ? 4 * q + i : rows - 1;  // the last one again, times zero
          const uint8_t* at = corner + row * codes.stride;
          _mm_prefetch(reinterpret_cast<const char*>(at + kRows * codes.stride), _MM_HINT_T0);
          code[i] = spread.load(at, spread.within(at, codes.end));
        }
        add_four(code, _mm512_set1_epi32(static_cast<int>(high[q])), _mm512_set1_epi32(static_cast<int>(low[q])), coarse, fine);
      }
      add_entries(coarse, fine, lanes - j, sums + j);
    }
  }
}

template <int kPlanes>
inline int look_up_whole(const uint8_t* const* planes, const uint16_t* table, int lanes, uint16_t* out) {
  const __m512i values = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
  int j = 0;
  for (; j + kWords <= lanes; j += kWords) {
    __m512i index = _mm512_setzero_si512();
    for (int p = 0; p < kPlanes; ++p) {
      uint32_t mask;
      std::memcpy(&mask, planes[p] + j / 8, sizeof mask);
      index = _mm512_mask_add_epi16(index, mask, index, _mm512_set1_epi16(static_cast<short>(1 << p)));
    }
    _mm512_storeu_si512(out + j, _mm512_permutexvar_epi16(index, values));
  }
  return j;
}

void look_up(const uint8_t* const* planes, int count, const uint16_t* table, int lanes, uint16_t* out) {
  if (count > 4) return portable_look_up(planes, count, table, lanes, out);  // more values than a register holds
  const auto whole = count == 1   ? look_up_whole<1>
                     : count == 2 ? look_up_whole<2>
                     : count == 3 ? look_up_whole<3>
                                  : look_up_whole<4>;
  const int done = whole(planes, table, lanes, out);
  const uint8_t* rest[4];
  for (int p = 0; p < count; ++p) rest[p] = planes[p] + done / 8;
  portable_look_up(rest, count, table, lanes - done, out + done);
}

void expand_codes(const Codes& codes, int row, int lanes, uint16_t* out) {
  const Spread spread(codes.bits);
  const __m512i most = _mm512_set1_epi32((1 << codes.bits) - 1);
  const uint8_t* at = codes.codes + row * codes.stride;
  for (int j = 0; j < lanes; j += 64, at += spread.width) {
    alignas(64) uint8_t bytes[64];
    _mm512_store_si512(bytes, spread.load(at, spread.within(at, codes.end)));
    for (int i = 0; i < 64 && j + i < lanes; i += 16) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes + i)));
      const __m512 number = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(code, code), most));
      const int left = lanes - j - i;
      const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
      const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(number), 16);
      _mm512_mask_cvtepi32_storeu_epi16(out + j + i, mask, upper);
    }
  }
}

}  // namespace

const Level* avx512_level() {
  static const Level level{"avx512", add_signs,    dot_signs,      dot_codes,         add_codes,
                           look_up,  expand_codes, portable_round, portable_multiply, avx512_tile_loops()};
  return &level;
}

}  // namespace moebius

#else

namespace moebius {
const Level* avx512_level() { return nullptr; }
}  // namespace moebius

#endif
