// Tiles with AVX-512 VNNI: four inputs of sixteen outputs are one instruction.
#include "tiles.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "spread_avx512.h"

namespace moebius {
namespace {

constexpr int kBytes = 64;  // of a register
constexpr int kQuads = kTileInputs / 4, kRegisters = kTileOutputs / 16;

template <bool kInside>
inline uint64_t mask_at(const uint8_t* at, const uint8_t* end) {
  uint64_t mask = 0;
  const ptrdiff_t left = kInside ? 8 : end - at;
  if (left >= 8) std::memcpy(&mask, at, 8);
  else if (left > 0) std::memcpy(&mask, at, static_cast<size_t>(left));
  return mask;
}

template <int kPlanes, bool kInside>
inline void spread_rows(const uint8_t* const* planes, const uint8_t* end, size_t stride, int rows, int width, uint8_t base,
                        const uint8_t* steps, uint8_t* out, size_t out_stride) {
  const __m512i start = _mm512_set1_epi8(static_cast<char>(base));
  __m512i step[kPlanes];
  for (int p = 0; p < kPlanes; ++p) step[p] = _mm512_set1_epi8(static_cast<char>(steps[p]));
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < width; j += kBytes) {
      __m512i bytes = start;
      for (int p = 0; p < kPlanes; ++p)
        bytes = _mm512_mask_add_epi8(bytes, mask_at<kInside>(planes[p] + r * stride + j / 8, end), bytes, step[p]);
      _mm512_store_si512(out + r * out_stride + j, bytes);
    }
}

void spread_signs(const uint8_t* const* planes, int count, const uint8_t* end, size_t stride, int rows, int width, uint8_t base,
                  const uint8_t* steps, uint8_t* out, size_t out_stride) {
  // The last plane lies last: whole masks may be read of all if they may be read of its last row.
  const bool inside = planes[count - 1] + (rows - 1) * stride + (width + kBytes - 1) / kBytes * 8 <= end;
  const auto go = [&](auto spread_inside, auto spread_at_end) {
    (inside ? spread_inside : spread_at_end)(planes, end, stride, rows, width, base, steps, out, out_stride);
  };
  if (count == 1) go(spread_rows<1, true>, spread_rows<1, false>);
  if (count == 2) go(spread_rows<2, true>, spread_rows<2, false>);
  if (count == 3) go(spread_rows<3, true>, spread_rows<3, false>);
  if (count == 4) go(spread_rows<4, true>, spread_rows<4, false>);
  if (count == 5) go(spread_rows<5, true>, spread_rows<5, false>);
  if (count == 6) go(spread_rows<6, true>, spread_rows<6, false>);
  if (count == 7) go(spread_rows<7, true>, spread_rows<7, false>);
}

void spread_codes(const Codes& codes, int first, int width, uint8_t shift, uint8_t* out, size_t out_stride) {
  const Spread spread(codes.bits);
  const __m512i more = _mm512_set1_epi8(static_cast<char>(shift));
  for (int r = 0; r < codes.rows; ++r) {
    const uint8_t* at = codes.codes + r * codes.stride + static_cast<size_t>(first) / 8 * codes.bits;
    for (int j = 0; j < width; j += kBytes, at += spread.width)
      _mm512_store_si512(out + r * out_stride + j, _mm512_add_epi8(spread.load(at, spread.within(at, codes.end)), more));
  }
}

// Four rows of 64 outputs to four registers of 16 outputs, each output with its four inputs.
void order_inputs(const uint8_t* rows, uint8_t* tile) {
  // Interleaving works within quarters of a register: words are first put where their outputs will be wanted.
  const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int quad = 0; quad < kQuads; ++quad, rows += 4 * kTileOutputs, tile += 4 * kBytes) {
    __m512i row[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm512_permutexvar_epi32(turned, _mm512_load_si512(rows + i * kTileOutputs));
    const __m512i ab_low = _mm512_unpacklo_epi8(row[0], row[1]), ab_high = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i cd_low = _mm512_unpacklo_epi8(row[2], row[3]), cd_high = _mm512_unpackhi_epi8(row[2], row[3]);
    _mm512_store_si512(tile, _mm512_unpacklo_epi16(ab_low, cd_low));
    _mm512_store_si512(tile + kBytes, _mm512_unpackhi_epi16(ab_low, cd_low));
    _mm512_store_si512(tile + 2 * kBytes, _mm512_unpacklo_epi16(ab_high, cd_high));
    _mm512_store_si512(tile + 3 * kBytes, _mm512_unpackhi_epi16(ab_high, cd_high));
  }
}

// Sixteen registers of sixteen words, transposed.
inline void transpose(__m512i* rows) {
  __m512i pairs[16], quads[16];
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      quads[4 * i + 2 * half] = _mm512_unpacklo_epi64(pairs[4 * i + half], pairs[4 * i + 2 + half]);
      quads[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[4 * i + half], pairs[4 * i + 2 + half]);
    }
  // quads[4 i + c], quarter q: word 4 q + c of rows 4 i to 4 i + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x88),
                  b = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xdd),
                  e = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
    rows[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
  }
}

void order_outputs(const uint8_t* rows, uint8_t* tile) {
  for (int group = 0; group < kRegisters; ++group)
    for (int part = 0; part < kTileInputs / kBytes; ++part) {
      __m512i words[16];
      for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(rows + (16 * group + i) * kTileInputs + part * kBytes);
      transpose(words);
      for (int quad = 0; quad < 16; ++quad)
        _mm512_store_si512(tile + ((16 * part + quad) * kRegisters + group) * kBytes, words[quad]);
    }
}

int round(const float* values, int8_t* out, float* step) {
  constexpr int kFloats = 16, kParts = kTileInputs / kFloats;
  __m512 value[kParts];
  __m512i largest = _mm512_setzero_si512();  // of the bits without the sign: what is not finite is larger than all else
  for (int i = 0; i < kParts; ++i) {
    value[i] = _mm512_loadu_ps(values + i * kFloats);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(value[i]), _mm512_set1_epi32(0x7fffffff)));
  }
  const int bits = _mm512_reduce_max_epi32(largest);
  float most;
  std::memcpy(&most, &bits, sizeof most);
  const bool usable = most > 1e-35f && most < 3e38f;
  *step = most > 1e-35f || most != most ? most / 127 : 0;
  const __m512 scale = _mm512_set1_ps(usable ? 127 / most : 0);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < kParts; ++i) {
    const __m512i whole = usable ? _mm512_cvtps_epi32(_mm512_mul_ps(value[i], scale)) : _mm512_setzero_si512();
    total = _mm512_add_epi32(total, whole);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * kFloats), _mm512_cvtepi32_epi8(whole));
  }
  return _mm512_reduce_add_epi32(total);
}

// sum += four products in each word. Written out because GCC copies the sum to and fro around its own intrinsic.
inline void add_products(__m512i& sum, __m512i bytes, __m512i values) {
#ifdef __GNUC__
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(values));
#else
  sum = _mm512_dpbusd_epi32(sum, bytes, values);
#endif
}

inline void add_scaled(float* sums, __m512i part, __m512 scale, __m512 less) {
  const __m512 sum = _mm512_sub_ps(_mm512_cvtepi32_ps(part), less);
  _mm512_storeu_ps(sums, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(sums)));
}

// The outputs of one token, in registers.
struct Sums {
  __m512i part[kRegisters];

  void clear() { part[0] = part[1] = part[2] = part[3] = _mm512_setzero_si512(); }

  void add(const __m512i* weights, const int8_t* four_values) {
    int32_t four;
    std::memcpy(&four, four_values, sizeof four);
    const __m512i value = _mm512_set1_epi32(four);
    add_products(part[0], weights[0], value);
    add_products(part[1], weights[1], value);
    add_products(part[2], weights[2], value);
    add_products(part[3], weights[3], value);
  }

  void add_to(float* sums, float step, float correction) const {
    const __m512 scale = _mm512_set1_ps(step), less = _mm512_set1_ps(correction);
    add_scaled(sums, part[0], scale, less);
    add_scaled(sums + 16, part[1], scale, less);
    add_scaled(sums + 32, part[2], scale, less);
    add_scaled(sums + 48, part[3], scale, less);
  }
};

// Some tokens at once, their sums in registers: for that every index has to be a constant before anything is optimized.
template <size_t... kToken>
inline void multiply_some(std::index_sequence<kToken...>, const uint8_t* tile, const int8_t* values, const float* steps,
                          const float* corrections, float* sums) {
  Sums total[sizeof...(kToken)];
  (total[kToken].clear(), ...);
  for (int quad = 0; quad < kQuads; ++quad, tile += kRegisters * kBytes, values += 4) {
    const __m512i weights[kRegisters] = {_mm512_load_si512(tile), _mm512_load_si512(tile + kBytes),
                                         _mm512_load_si512(tile + 2 * kBytes), _mm512_load_si512(tile + 3 * kBytes)};
    (total[kToken].add(weights, values + kToken * kTileInputs), ...);
  }
  (total[kToken].add_to(sums + kToken * kTileOutputs, steps[kToken], corrections[kToken]), ...);
}

void multiply(const uint8_t* tile, const int8_t* values, const float* steps, const float* corrections, int tokens,
              float* sums) {
  const auto go = [&](auto some) {
    constexpr size_t kCount = decltype(some)::size();
    multiply_some(some, tile, values, steps, corrections, sums);
    values += kCount * kTileInputs, steps += kCount, corrections += kCount, sums += kCount * kTileOutputs;
  };
  for (; tokens >= 6; tokens -= 6) go(std::make_index_sequence<6>());
  switch (tokens) {
    case 5: return go(std::make_index_sequence<5>());
    case 4: return go(std::make_index_sequence<4>());
    case 3: return go(std::make_index_sequence<3>());
    case 2: return go(std::make_index_sequence<2>());
    case 1: return go(std::make_index_sequence<1>());
  }
}

}  // namespace

const TileLoops* avx512_tile_loops() {
  static const TileLoops loops{spread_signs, spread_codes, order_inputs, order_outputs, round, multiply};
  return &loops;
}

}  // namespace moebius

#else

namespace moebius {
const TileLoops* avx512_tile_loops() { return nullptr; }
}  // namespace moebius

#endif
