// Codes to bytes with AVX-512 VBMI, for the files that are compiled for it. Internal linkage: see portable.h.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace moebius {
namespace {

// 64 codes of any width to bytes: each group of eight codes takes as many bytes as a code has bits.
struct Spread {
  __m512i bytes, shifts, low;
  __mmask64 present;
  int width;

  explicit Spread(int bits) : width(8 * bits) {
    alignas(64) uint8_t index[64], shift[64];
    for (int i = 0; i < 64; ++i) {
      const int byte = (i / 8) * bits + i % 8;
      index[i] = static_cast<uint8_t>(byte < 64 ? byte : 63);
      shift[i] = static_cast<uint8_t>((i % 8) * bits);
    }
    bytes = _mm512_load_si512(index);
    shifts = _mm512_load_si512(shift);
    low = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    present = bits == 8 ? ~__mmask64{0} : (__mmask64{1} << width) - 1;
  }

  __m512i load(const uint8_t* at, __mmask64 mask) const {
    const __m512i packed = _mm512_permutexvar_epi8(bytes, _mm512_maskz_loadu_epi8(mask, at));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, packed), low);
  }

  __mmask64 within(const uint8_t* at, const uint8_t* end) const {
    const ptrdiff_t left = end - at;
    return left >= width ? present : left <= 0 ? 0 : (__mmask64{1} << left) - 1;
  }
};

}  // namespace
}  // namespace moebius
