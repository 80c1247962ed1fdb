// What attention with stored and with dynamic grids have in common.
#pragma once
#include <algorithm>

#include "call.h"
#include "product.h"

constexpr float LOG2E = 1.44269504f;

void attend_dynamic(const Attention& a);

// The fastest product of an operand's codes and those of the other, which may be any.
inline Product product_of(int32_t extension, const OperandGrid& grid, int64_t batch) {
  return product_for(extension, *std::max_element(grid.top, grid.top + (grid.per_sample ? batch : 1)), 128);
}

// From codes to packed columns of code - 128. The channels of a key are the products of one column; the channels of a
// value are one product each of as many columns.
inline void pack_keys(const uint8_t* codes, int64_t stride, int64_t length, int64_t size, int64_t pieces, int8_t* out) {
  for (int64_t k = 0; k < length; k++) {
    int8_t* tile = out + k / 16 * pieces * TILE + k % 16 * 4;
    for (int64_t c = 0; c < size; c += 64, tile += TILE) spread_fours(codes + k * stride + c, size - c, tile);
  }
}

// code - 128 of up to 16 codes; 0 beyond `count`.
inline __m128i centered(const uint8_t* codes, int64_t count) {
  const __m128i middle = _mm_set1_epi8((char)128);
  if (count >= 16) return _mm_xor_si128(_mm_loadu_si128((const __m128i*)codes), middle);
  __m128i padded = middle;
  memcpy(&padded, codes, count);
  return _mm_xor_si128(padded, middle);
}

inline void pack_values(const uint8_t* codes, int64_t stride, int64_t length, int64_t size, int64_t pieces, int8_t* out) {
  for (int64_t k = 0; k < length; k += 4) {
    for (int64_t c = 0; c < size; c += 16) {
      __m128i row[4];
      for (int64_t i = 0; i < 4; i++) row[i] = k + i < length ? centered(codes + (k + i) * stride + c, size - c) : _mm_setzero_si128();
      const __m128i low = _mm_unpacklo_epi8(row[0], row[1]), high = _mm_unpackhi_epi8(row[0], row[1]);
      const __m128i low2 = _mm_unpacklo_epi8(row[2], row[3]), high2 = _mm_unpackhi_epi8(row[2], row[3]);
      __m128i* to = (__m128i*)(out + c / 16 * pieces * TILE + k / 4 * 64);
      _mm_storeu_si128(to, _mm_unpacklo_epi16(low, low2));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low, low2));
      _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high, high2));
      _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high, high2));
    }
  }
}
