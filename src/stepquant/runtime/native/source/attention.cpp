// Attention in integers: codes of query and key, softmax in float32, codes of the probabilities, times codes of value.
//
// Keys and values hold their codes less 128, as signed weights; zero points are taken out of the sums exactly:
//   sum (q - zq)(k - zk) = sum q k - zq sum k - zk sum q + d zq zk.
#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"
#include "product.h"

namespace {

constexpr float LOG2E = 1.44269504f;

Quantizer quantizer_of(const OperandGrid& grid, int64_t sample) {
  return Quantizer(grid.scale, grid.zero_point, grid.per_sample ? sample : 0, grid.top);
}

// Codes of one row of `size` values, and their sum.
int32_t code_row(const Heads& h, int64_t at, int64_t size, const Quantizer& q, uint8_t* out) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t c = 0; c < size; c += 16) {
    const __mmask16 mask = first(size - c);
    const __m128i codes = _mm_maskz_mov_epi8(mask, q(load16(h.x, h.type, at + c, mask)));
    sum = _mm512_add_epi32(sum, _mm512_cvtepu8_epi32(codes));
    _mm_mask_storeu_epi8(out + c, mask, codes);
  }
  return _mm512_reduce_add_epi32(sum);
}

// Codes to columns, less 128 each: values of a row are four products of one column (transposed: keys), or a row of
// products (values).
void pack_keys(const uint8_t* codes, int64_t stride, int64_t length, int64_t size, int64_t pieces, int8_t* out) {
  const __m512i down = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(64));
  const __m512i middle = _mm512_set1_epi8((char)128);
  for (int64_t k = 0; k < length; k++) {
    int8_t* tile = out + k / 16 * pieces * TILE + k % 16 * 4;
    for (int64_t c = 0; c < size; c += 64, tile += TILE) {
      const __mmask64 mask = size - c >= 64 ? ~0ull : (1ull << (size - c)) - 1;
      const __m512i row = _mm512_maskz_loadu_epi8(mask, codes + k * stride + c);
      _mm512_i32scatter_epi32(tile, down, _mm512_xor_si512(row, _mm512_maskz_mov_epi8(mask, middle)), 1);
    }
  }
}

void pack_values(const uint8_t* codes, int64_t stride, int64_t length, int64_t size, int64_t pieces, int8_t* out) {
  const __m128i middle = _mm_set1_epi8((char)128);
  for (int64_t k = 0; k < length; k += 4) {
    for (int64_t c = 0; c < size; c += 16) {
      const __mmask16 mask = first(size - c);
      __m128i row[4];
      for (int64_t i = 0; i < 4; i++) {
        const __mmask16 real = k + i < length ? mask : 0;
        row[i] = _mm_xor_si128(_mm_maskz_loadu_epi8(real, codes + (k + i) * stride + c), _mm_maskz_mov_epi8(real, middle));
      }
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

// 2^(x - top) of a row in place, and their sum. The row is as long as whole vectors of 16.
float powers(float* row, int64_t length) {
  const int64_t whole = length / 16 * 16;
  const __mmask16 rest = first(length - whole);
  __m512 largest = _mm512_set1_ps(-INFINITY);
  for (int64_t c = 0; c < whole; c += 16) largest = _mm512_max_ps(largest, _mm512_loadu_ps(row + c));
  if (rest) largest = _mm512_mask_max_ps(largest, rest, largest, _mm512_loadu_ps(row + whole));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < length; c += 16) {
    const __m512 e = exp2_16_below(_mm512_sub_ps(_mm512_loadu_ps(row + c), top));
    _mm512_storeu_ps(row + c, e);
    total = _mm512_mask_add_ps(total, c < whole ? 0xFFFF : rest, total, e);
  }
  return _mm512_reduce_add_ps(total);
}

// Codes of share * row, none of which is negative, and the sum of the codes.
int32_t probability_codes(const float* row, int64_t length, float share, const Quantizer& q, uint8_t* out) {
  const __m512 factor = _mm512_set1_ps(share / q.scale);
  const int64_t whole = length / 16 * 16;
  __m128i sums = _mm_setzero_si128();
  for (int64_t c = 0; c < length; c += 16) {
    const __mmask16 mask = c < whole ? 0xFFFF : first(length - whole);
    const __m512 steps = _mm512_min_ps(_mm512_mul_ps(_mm512_loadu_ps(row + c), factor), q.high);
    const __m128i codes = _mm_maskz_mov_epi8(mask, _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(steps), q.zero)));
    sums = _mm_add_epi64(sums, _mm_sad_epu8(codes, _mm_setzero_si128()));
    _mm_storeu_si128((__m128i*)(out + c), codes);
  }
  return (int32_t)(_mm_extract_epi64(sums, 0) + _mm_extract_epi64(sums, 1));
}

}  // namespace

extern "C" void sq_attention(const Attention* given) {
  const Attention a = *given;
  const int64_t pieces = (a.size + 63) / 64, deep = pieces * 64;                    // of a query
  const int64_t key_tiles = (a.key_length + 31) / 32 * 2, wide = key_tiles * 16;    // keys, rounded up
  const int64_t key_pieces = (a.key_length + 63) / 64, long_ = key_pieces * 64;     // of a row of probabilities
  const int64_t value_tiles = (a.size + 31) / 32 * 2, channels = value_tiles * 16;
  const int64_t key_bytes = key_tiles * pieces * TILE, value_bytes = value_tiles * key_pieces * TILE;
  const int64_t pairs = a.batch * a.heads, blocks = (a.length + 31) / 32;
  std::vector<int8_t> packed(pairs * (key_bytes + value_bytes) + 64);
  std::vector<int32_t> starts(pairs * (wide + channels));
  int8_t* const base = (int8_t*)(((uintptr_t)packed.data() + 63) / 64 * 64);
  const Product product = product_for(a.amx);
  const int64_t zero_tap = 0;
#pragma omp parallel num_threads(a.threads)
  {
    begin_products(a.amx);
    std::vector<uint8_t> codes(std::max(a.key_length * a.size, 32 * (deep + long_)) + 64);
    std::vector<float> scores(32 * wide);
    alignas(64) int32_t sums[4 * 256];
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++) {
      const int64_t b = pair / a.heads, h = pair % a.heads;
      const Quantizer q = quantizer_of(a.grids[0], b), k = quantizer_of(a.grids[1], b), v = quantizer_of(a.grids[2], b),
                      p = quantizer_of(a.grids[3], b);
      int8_t *keys = base + pair * (key_bytes + value_bytes), *values = keys + key_bytes;
      int32_t *key_start = starts.data() + pair * (wide + channels), *value_start = key_start + wide;
      for (int64_t i = 0; i < a.key_length; i++) {
        const int32_t sum =
            code_row(a.key, b * a.key.image + i * a.key.row + h * a.key.head, a.size, k, codes.data() + i * a.size);
        key_start[i] = -q.zero_point * (sum - 128 * (int32_t)a.size) +
                       (int32_t)a.size * q.zero_point * (k.zero_point - 128);
      }
      pack_keys(codes.data(), a.size, a.key_length, a.size, pieces, keys);
      for (int64_t i = 0; i < a.key_length; i++) {
        uint8_t* row = codes.data() + i * a.size;
        code_row(a.value, b * a.value.image + i * a.value.row + h * a.value.head, a.size, v, row);
        for (int64_t c = 0; c < a.size; c++) value_start[c] -= p.zero_point * ((int32_t)row[c] - v.zero_point);
      }
      pack_values(codes.data(), a.size, a.key_length, a.size, key_pieces, values);
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < pairs * blocks; block++) {
      const int64_t pair = block / blocks, start = block % blocks * 32, many = std::min<int64_t>(32, a.length - start);
      const int64_t b = pair / a.heads, h = pair % a.heads;
      const Quantizer q = quantizer_of(a.grids[0], b), k = quantizer_of(a.grids[1], b), v = quantizer_of(a.grids[2], b),
                      p = quantizer_of(a.grids[3], b);
      const int8_t *keys = base + pair * (key_bytes + value_bytes), *values = keys + key_bytes;
      const int32_t *key_start = starts.data() + pair * (wide + channels), *value_start = key_start + wide;
      uint8_t *queries = codes.data(), *probabilities = queries + 32 * deep;
      int32_t row_term[32] = {};
      memset(queries, 0, 32 * deep);
      for (int64_t i = 0; i < many; i++) {
        const int64_t at = b * a.query.image + (start + i) * a.query.row + h * a.query.head;
        row_term[i] = -(k.zero_point - 128) * code_row(a.query, at, a.size, q, queries + i * deep);
      }
      Operand operand{{queries, queries + 16 * deep}, deep, &zero_tap, 1, pieces};
      const __m512 factor = _mm512_set1_ps(q.scale * k.scale * a.factor * LOG2E);  // so that e^x is 2^score
      for (int64_t n = 0; n < key_tiles; n += 2) {
        const int32_t *left = key_start + n * 16, *right = left + 16;
        product(operand, {{keys + n * pieces * TILE, keys + (n + 1) * pieces * TILE}, {{left, right}, {left, right}}}, sums);
        for (int64_t t = 0; t < 4; t++) {
          for (int64_t i = 0; i < 16; i++) {
            const int64_t row = t / 2 * 16 + i;
            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + t * 256 + i * 16), _mm512_set1_epi32(row_term[row]));
            _mm512_storeu_ps(scores.data() + row * wide + (n + t % 2) * 16, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor));
          }
        }
      }
      int32_t code_sum[32] = {};
      memset(probabilities, 0, 32 * long_);
      for (int64_t i = 0; i < many; i++) {
        float* row = scores.data() + i * wide;
        if (a.mask) {
          const float* extra = a.mask + b * a.mask_image + h * a.mask_head + (start + i) * a.mask_row;
          for (int64_t c = 0; c < a.key_length; c += 16) {
            const __m512 more = _mm512_maskz_loadu_ps(first(a.key_length - c), extra + c);
            _mm512_storeu_ps(row + c, _mm512_fmadd_ps(more, _mm512_set1_ps(LOG2E), _mm512_loadu_ps(row + c)));
          }
        }
        const float total = powers(row, a.key_length);
        const int32_t sum = probability_codes(row, a.key_length, 1.0f / total, p, probabilities + i * long_);
        code_sum[i] = -(v.zero_point - 128) * sum;
      }
      operand = {{probabilities, probabilities + 16 * long_}, long_, &zero_tap, 1, key_pieces};
      const __m512 scale = _mm512_set1_ps(p.scale * v.scale);
      for (int64_t n = 0; n < value_tiles; n += 2) {
        const int32_t *left = value_start + n * 16, *right = left + 16;
        product(operand,
                {{values + n * key_pieces * TILE, values + (n + 1) * key_pieces * TILE}, {{left, right}, {left, right}}}, sums);
        for (int64_t t = 0; t < 4; t++) {
          const int64_t c = (n + t % 2) * 16;
          if (c >= a.size) continue;
          for (int64_t i = 0; i < 16 && t / 2 * 16 + i < many; i++) {
            const int64_t row = t / 2 * 16 + i;
            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + t * 256 + i * 16), _mm512_set1_epi32(code_sum[row]));
            store16(a.y, a.y_type, b * a.y_image + (start + row) * a.y_row + h * a.y_head + c, first(a.size - c),
                    _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
          }
        }
      }
    }
    end_products(a.amx);
  }
}
