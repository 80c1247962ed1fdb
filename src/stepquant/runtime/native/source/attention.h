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

// Multiplies the probabilities of up to 32 queries by the packed values and stores (sums + code_sum) * scale of each query,
// the first at `y` elements. The sums of 16 channels start at `initial`, and the next `step` further. Rows of probabilities
// from `many` on hold leftovers, which are finite; their results are not stored.
inline void store_mixed(const Attention& a, Product mix, const Operand& probabilities, const int8_t* values,
                        const int32_t* initial, int64_t step, int64_t y, int64_t many, const float* scale,
                        const int32_t* code_sum) {
  alignas(64) int32_t sums[4 * 256];
  const int64_t column_bytes = probabilities.pieces * TILE;
  for (int64_t n = 0; n * 16 < a.size; n += 2) {
    const int32_t *left = initial + n * step, *right = left + step;
    const int8_t* columns = values + n * column_bytes;
    mix(probabilities, {{columns, columns + column_bytes}, {{left, right}, {left, right}}}, four_tiles(sums));
    for (int64_t t = 0; t < 4; t++) {
      const int64_t c = (n + t % 2) * 16;
      if (c >= a.size) continue;
      for (int64_t i = 0; i < 16 && t / 2 * 16 + i < many; i++) {
        const int64_t row = t / 2 * 16 + i;
        const Floats sum = to_floats(load(sums + t * 256 + i * 16) + set(code_sum[row]));
        store16(a.y, a.y_type, y + row * a.y_row + c, first(a.size - c), sum * set(scale[row]));
      }
    }
  }
}
