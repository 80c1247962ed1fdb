// Attention in integers: codes of query and key, softmax in float32, codes of the probabilities, times codes of value.
//
// Keys and values are stored as signed weights, code - 128. Zero points are subtracted from the sums exactly:
//   sum (q - zq)(k - zk) = sum q k - zq sum (k - zk) - zk sum q,
// where the last term is the same for all keys and does not change the softmax.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "scratch.h"

namespace {

Quantizer quantizer_of(const OperandGrid& grid, int64_t sample) {
  return Quantizer(grid.scale, grid.zero_point, grid.top, grid.per_sample ? sample : 0);
}

// Writes the codes of one row of `size` values; returns whether a value is NaN.
bool code_row(const Heads& h, int64_t at, int64_t size, const Quantizer& q, uint8_t* out) {
  Ints seen = set(0);
  for (int64_t c = 0; c < size; c += 16) {
    const Mask mask = first(size - c);
    store_codes(out + c, mask, q(load16(h.x, h.type, at + c, mask)), seen);
  }
  return any_nan(seen);
}

int32_t largest_of(const int32_t* row, int64_t length) {
  Ints top[4];
  for (auto& part : top) part = set(INT32_MIN);
  int64_t c = 0;
  for (; c + 64 <= length; c += 64) {
    for (int64_t i = 0; i < 4; i++) top[i] = max(top[i], load(row + c + i * 16));
  }
  for (; c < length; c += 16) top[0] = keep(first(length - c), max(top[0], load(row + c)), top[0]);
  return largest(max(max(top[0], top[1]), max(top[2], top[3])));
}

// Replaces a row of sums by the floats factor * (sum - top) + mask and returns the largest; NaN if one of them is NaN.
// The row is padded to whole vectors.
float masked_scores(int32_t* row, int64_t length, int32_t top, float factor, const float* added) {
  Floats most = set(-INFINITY);
  bool nan = false;
  for (int64_t c = 0; c < length; c += 16) {
    const Mask mask = first(length - c);
    const Floats score = fma(to_floats(load(row + c) - set(top)), set(factor), load(mask, added + c));
    nan |= has_nan(mask, score);
    most = keep(mask, max(most, score), most);
    store((float*)(row + c), score);
  }
  return nan ? NAN : largest(most);
}

// Replaces a row by 2^score(row) and returns the sum.
template <typename Score>
float powers(int32_t* row, int64_t length, Score score) {
  Floats total[2] = {set(0.0f), set(0.0f)};
  int64_t c = 0;
  for (; c + 32 <= length; c += 32) {
    for (int64_t i = 0; i < 2; i++) {
      const Floats e = exp2_16_below(score(load(row + c + i * 16)));
      store((float*)(row + c + i * 16), e);
      total[i] = total[i] + e;
    }
  }
  for (; c < length; c += 16) {
    const Floats e = exp2_16_below(score(load(row + c)));
    store((float*)(row + c), e);
    total[0] = keep(first(length - c), total[0] + e, total[0]);
  }
  return sum(total[0] + total[1]);
}

// Writes the codes of share * row, which is not negative, in pieces of 64 that are `step` bytes apart; returns their sum.
int32_t probability_codes(const float* row, int64_t length, float share, const Quantizer& q, uint8_t* out, int64_t step) {
  const Floats factor = set(share / q.scale);
  ByteSum sum;
  for (int64_t c = 0; c < length; c += 64, out += step) {
    Ints four[4];
    for (int64_t i = 0; i < 4; i++) {
      const int64_t at = c + i * 16;
      const Mask mask = at < length ? first(length - at) : none();
      four[i] = keep(mask, to_ints(min(load(mask, row + at) * factor, q.high)) + q.zero);
    }
    store_64_bytes(out, four, sum);
  }
  return sum.total();
}

void attend(const Attention a) {
  const int64_t pieces = (a.size + 63) / 64, deep = pieces * 64;                    // of a query
  const int64_t key_tiles = (a.key_length + 31) / 32 * 2, wide = key_tiles * 16;    // keys, rounded up
  const int64_t key_pieces = (a.key_length + 63) / 64;                              // of a row of probabilities
  // Not a power of two, or the rows of a tile would evict each other from the cache.
  const int64_t scores_stride = wide + 16;
  const int64_t value_tiles = (a.size + 31) / 32 * 2, channels = value_tiles * 16;
  const int64_t key_bytes = key_tiles * pieces * TILE, value_bytes = value_tiles * key_pieces * TILE;
  const int64_t pairs = a.batch * a.key_heads, together = a.heads / a.key_heads;  // query heads of one pair
  const int64_t blocks = (a.length + 31) / 32;
  const int64_t pair_bytes = key_bytes + value_bytes, code_bytes = std::max(a.key_length * a.size, 32 * (deep + key_pieces * 64));
  const int64_t starts_bytes = pairs * (wide + channels) * 4, scores_bytes = 32 * scores_stride * 4;
  const int64_t thread_bytes = aligned(scores_bytes + code_bytes + 64);
  static thread_local Scratch scratch;
  char* const memory = scratch.of(starts_bytes + pairs * pair_bytes + aligned(pairs) + a.threads * thread_bytes);
  int32_t* const starts = (int32_t*)memory;
  int8_t* const base = (int8_t*)(memory + starts_bytes);
  bool* const nan_of_pair = (bool*)(base + pairs * pair_bytes);  // whether a key or value is NaN
  char* const thread_memory = (char*)nan_of_pair + aligned(pairs);
  const Product score = product_of(a.extension, a.grids[0], a.batch);
  const Product mix = product_of(a.extension, a.grids[3], a.batch);
  const int64_t zero_tap = 0;
#pragma omp parallel num_threads(a.threads)
  {
    begin_products(a.extension);
    int32_t* const scores = (int32_t*)(thread_memory + omp_get_thread_num() * thread_bytes);
    uint8_t* const codes = (uint8_t*)scores + scores_bytes;
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++) {
      const int64_t b = pair / a.key_heads, h = pair % a.key_heads;
      const Quantizer q = quantizer_of(a.grids[0], b), k = quantizer_of(a.grids[1], b), v = quantizer_of(a.grids[2], b),
                      p = quantizer_of(a.grids[3], b);
      int8_t *keys = base + pair * pair_bytes, *values = keys + key_bytes;
      int32_t *key_start = starts + pair * (wide + channels), *value_start = key_start + wide;
      memset(key_start, 0, (wide + channels) * 4);
      memset(keys, 0, pair_bytes);
      bool nan = false;
      for (int64_t i = 0; i < a.key_length; i++) {
        uint8_t* row = codes + i * a.size;
        nan |= code_row(a.key, b * a.key.image + i * a.key.row + h * a.key.head, a.size, k, row);
        key_start[i] = -q.zero_point * (sum_of_bytes(row, a.size) - (int32_t)a.size * k.zero_point);
      }
      pack_keys(codes, a.size, a.key_length, a.size, pieces, keys);
      for (int64_t i = 0; i < a.key_length; i++) {
        uint8_t* row = codes + i * a.size;
        nan |= code_row(a.value, b * a.value.image + i * a.value.row + h * a.value.head, a.size, v, row);
        if (!p.zero_point) continue;
        for (int64_t c = 0; c < a.size; c++) value_start[c] -= p.zero_point * ((int32_t)row[c] - v.zero_point);
      }
      pack_values(codes, a.size, a.key_length, a.size, key_pieces, values);
      nan_of_pair[pair] = nan;
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < a.batch * a.heads * blocks; block++) {
      const int64_t head = block / blocks, start = block % blocks * 32, many = std::min<int64_t>(32, a.length - start);
      const int64_t b = head / a.heads, h = head % a.heads, pair = head / together;
      const Quantizer q = quantizer_of(a.grids[0], b), k = quantizer_of(a.grids[1], b), v = quantizer_of(a.grids[2], b),
                      p = quantizer_of(a.grids[3], b);
      const int8_t *keys = base + pair * pair_bytes, *values = keys + key_bytes;
      const int32_t *key_start = starts + pair * (wide + channels), *value_start = key_start + wide;
      uint8_t *queries = codes, *probabilities = queries + 32 * deep;
      memset(queries, 0, 32 * deep);
      float scale[32];  // of a row of the output; NaN if the row depends on a NaN
      for (int64_t i = 0; i < many; i++) {
        const int64_t at = b * a.query.image + (start + i) * a.query.row + h * a.query.head;
        const bool nan = code_row(a.query, at, a.size, q, queries + i * deep) || nan_of_pair[pair];
        scale[i] = nan ? NAN : p.scale * v.scale;
      }
      const Operand operand{{queries, queries + 16 * deep}, deep, &zero_tap, 1, pieces, 64};
      for (int64_t n = 0; n < key_tiles; n += 2) {
        const int32_t *left = key_start + n * 16, *right = left + 16;
        score(operand, {{keys + n * pieces * TILE, keys + (n + 1) * pieces * TILE}, {{left, right}, {left, right}}},
                {scores + n * 16, scores_stride, 16, 16 * scores_stride});
      }
      const float factor = q.scale * k.scale * a.factor;
      int32_t code_sum[32] = {};
      for (int64_t i = 0; i < many; i++) {
        int32_t* row = scores + i * scores_stride;
        // The zero point of keys adds the same to all scores of a row, which does not change the probabilities.
        const int32_t top = largest_of(row, a.key_length);
        float share;  // what turns a power into a probability
        if (a.mask) {
          const float* added = a.mask + b * a.mask_image + h * a.mask_head + (start + i) * a.mask_row;
          const float most = masked_scores(row, a.key_length, top, factor, added);
          const Floats down = set(most), unit = set(LOG2E);
          share = 1.0f / powers(row, a.key_length, [&](Ints x) { return (as_floats(x) - down) * unit; });
          if (most == -INFINITY) share = 0;  // every key is masked
          if (!(most < INFINITY)) scale[i] = NAN;
        } else {
          const Ints most = set(top);
          const Floats unit = set(factor * LOG2E);
          share = 1.0f / powers(row, a.key_length, [&](Ints x) { return to_floats(x - most) * unit; });
        }
        const int32_t sum =
            probability_codes((const float*)row, a.key_length, share, p, probabilities + i * 64, 32 * 64);
        code_sum[i] = -(v.zero_point - 128) * sum;
      }
      const Operand codes_of_row{{probabilities, probabilities + 16 * 64}, 64, &zero_tap, 1, key_pieces, 32 * 64};
      store_mixed(a, mix, codes_of_row, values, value_start, 16, b * a.y_image + start * a.y_row + h * a.y_head, many, scale, code_sum);
    }
    end_products(a.extension);
  }
}

}  // namespace

extern "C" int32_t sq_attention(const Attention* call) {
  return guarded([=] { call->grids[0].scale ? attend(*call) : attend_dynamic(*call); });
}
