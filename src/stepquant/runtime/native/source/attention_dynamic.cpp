// Attention in integers whose operands have dynamic grids: one for each token of a query, key or value, and for each row of
// probabilities.
//
// Keys and values are stored as signed weights, code - 128. With k' = k - 128 and zk' = zk - 128,
//   sum (q - zq)(k - zk) = sum q k' - zq sum k' - zk' (sum q - d zq),
// in float32, which is exact below 2^24. The scale of a value belongs to the index of the sum, so it is a factor of the
// probability before that is quantized: with share = scale / largest scale, the codes are those of 2^score * share, whose
// largest one becomes the largest code, and
//   y = sum code (v' - zv') * largest scale * peak / (top * sum 2^score).
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "scratch.h"

namespace {

struct Token {
  float scale;
  int32_t zero_point, sum;  // of the codes
  bool nan;
};

// Writes the codes of `size` values.
Token code_token(const Heads& h, int64_t at, int64_t size, int32_t top, uint8_t* out) {
  Floats low = set(0.0f), high = set(0.0f);
  for (int64_t c = 0; c < size; c += 16) {
    const Floats v = load16(h.x, h.type, at + c, first(size - c));
    low = min(v, low), high = max(v, high);  // not those of a NaN
  }
  const Range range(set(smallest(low)), set(largest(high)), top);
  const float scale = lane(range.scale);
  const int32_t zero_point = (int32_t)lane(range.zero_point);
  const Quantizer q(scale, lane(range.inverse), zero_point, top);
  Ints seen = set(0);
  for (int64_t c = 0; c < size; c += 16) {
    const Mask mask = first(size - c);
    store_codes(out + c, mask, q(load16(h.x, h.type, at + c, mask)), seen);
  }
  return {scale, zero_point, sum_of_bytes(out, size), any_nan(seen)};
}

// The keys and values of one head; arrays of [keys rounded up], 0 beyond the last.
struct Pair {
  float *sum, *zero_point, *scale;  // of a key
  float* share;                     // of a value
  int32_t* value_zero_point;
  float* most;  // the largest scale of a value; NaN if a key or value is NaN

  Pair(char* memory, int64_t wide) {
    sum = (float*)memory, zero_point = sum + wide, scale = zero_point + wide, share = scale + wide;
    value_zero_point = (int32_t*)(share + wide);
    most = share + 2 * wide;
  }
  static int64_t bytes(int64_t wide) { return aligned((5 * wide + 1) * 4); }
};

// Replaces a row of sums by scores, and returns the largest one; NaN if one is NaN. `added` may be null.
float scores_of(int32_t* row, int64_t length, const Pair& pair, const Token& query, int64_t size, float factor,
                const float* added) {
  const Floats zero = set((float)-query.zero_point), total = set((float)(size * query.zero_point - query.sum));
  const Floats unit = set(query.scale * factor);
  Floats most = set(-INFINITY);
  bool nan = false;
  for (int64_t c = 0; c < length; c += 16) {
    const Mask mask = first(length - c);
    Floats v = fma(zero, load(pair.sum + c), to_floats(load(row + c)));
    v = fma(total, load(pair.zero_point + c), v) * (load(pair.scale + c) * unit);
    if (added) {
      v = v + load(mask, added + c);
      nan |= has_nan(mask, v);
    }
    most = keep(mask, max(most, v), most);
    store((float*)(row + c), v);
  }
  return nan ? NAN : largest(most);
}

// Replaces scores by 2^(score - most) * share, whose largest is `peak`; returns the sum of 2^(score - most).
float powers(float* row, int64_t length, float most, const float* share, float& peak) {
  const Floats down = set(most), unit = set(LOG2E);
  Floats total = set(0.0f), top = set(0.0f);
  for (int64_t c = 0; c < length; c += 16) {
    const Mask mask = first(length - c);
    const Floats e = exp2_16_below((load(row + c) - down) * unit), v = e * load(share + c);
    total = keep(mask, total + e, total), top = keep(mask, max(top, v), top);
    store(row + c, v);
  }
  peak = largest(top);
  return sum(total);
}

// Writes the codes of factor * row in pieces of 64 that are `step` bytes apart; returns the sum of code * zero_point.
int32_t probability_codes(const float* row, int64_t length, float factor, const int32_t* zero_point, int32_t top, uint8_t* out,
                          int64_t step) {
  const Floats unit = set(factor), most = set((float)top);
  ByteSum unused;
  Ints total = set(0);
  for (int64_t c = 0; c < length; c += 64, out += step) {
    Ints four[4];
    for (int64_t i = 0; i < 4; i++) {
      const int64_t at = c + i * 16;
      const Mask mask = at < length ? first(length - at) : none();
      four[i] = keep(mask, to_ints(min(load(mask, row + at) * unit, most)));
      if (at < length) total = total + times_words(four[i], load(zero_point + at));
    }
    store_64_bytes(out, four, unused);
  }
  return sum(total);
}

}  // namespace

void attend_dynamic(const Attention& a) {
  const int64_t pieces = (a.size + 63) / 64, deep = pieces * 64;
  const int64_t key_tiles = (a.key_length + 31) / 32 * 2, wide = key_tiles * 16;
  const int64_t key_pieces = (a.key_length + 63) / 64, scores_stride = wide + 16;
  const int64_t value_tiles = (a.size + 31) / 32 * 2;
  const int64_t key_bytes = key_tiles * pieces * TILE, value_bytes = value_tiles * key_pieces * TILE;
  const int64_t pairs = a.batch * a.key_heads, together = a.heads / a.key_heads, blocks = (a.length + 31) / 32;
  const int64_t pair_bytes = key_bytes + value_bytes + Pair::bytes(wide), scores_bytes = 32 * scores_stride * 4;
  const int64_t code_bytes = std::max(a.key_length * a.size, 32 * (deep + key_pieces * 64));
  const int64_t thread_bytes = aligned(scores_bytes + code_bytes + 64);
  static thread_local Scratch scratch;
  char* const memory = scratch.of(pairs * pair_bytes + a.threads * thread_bytes);
  char* const thread_memory = memory + pairs * pair_bytes;
  const auto top_of = [&](int operand, int64_t b) { return a.grids[operand].top[a.grids[operand].per_sample ? b : 0]; };
  const Product score = product_of(a.extension, a.grids[0], a.batch), mix = product_of(a.extension, a.grids[3], a.batch);
  static const int32_t ZEROS[16] = {};
  const int64_t zero_tap = 0;
#pragma omp parallel num_threads(a.threads)
  {
    begin_products(a.extension);
    int32_t* const scores = (int32_t*)(thread_memory + omp_get_thread_num() * thread_bytes);
    uint8_t* const codes = (uint8_t*)scores + scores_bytes;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < pairs; index++) {
      const int64_t b = index / a.key_heads, h = index % a.key_heads;
      char* const own = memory + index * pair_bytes;
      memset(own, 0, pair_bytes);
      const Pair pair(own + key_bytes + value_bytes, wide);
      bool nan = false;
      for (int64_t i = 0; i < a.key_length; i++) {
        const int64_t at = b * a.key.image + i * a.key.row + h * a.key.head;
        const Token t = code_token(a.key, at, a.size, top_of(1, b), codes + i * a.size);
        pair.sum[i] = (float)(t.sum - 128 * a.size), pair.zero_point[i] = (float)(t.zero_point - 128), pair.scale[i] = t.scale;
        nan |= t.nan;
      }
      pack_keys(codes, a.size, a.key_length, a.size, pieces, (int8_t*)own);
      float most = 0;
      for (int64_t i = 0; i < a.key_length; i++) {
        const int64_t at = b * a.value.image + i * a.value.row + h * a.value.head;
        const Token t = code_token(a.value, at, a.size, top_of(2, b), codes + i * a.size);
        pair.value_zero_point[i] = t.zero_point - 128, pair.share[i] = t.scale;
        most = std::max(most, t.scale);
        nan |= t.nan;
      }
      for (int64_t i = 0; i < a.key_length; i++) pair.share[i] = pair.share[i] / most;
      pack_values(codes, a.size, a.key_length, a.size, key_pieces, (int8_t*)own + key_bytes);
      *pair.most = nan ? NAN : most;
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < a.batch * a.heads * blocks; block++) {
      const int64_t head = block / blocks, start = block % blocks * 32, many = std::min<int64_t>(32, a.length - start);
      const int64_t b = head / a.heads, h = head % a.heads;
      const int32_t top = top_of(3, b);
      char* const own = memory + head / together * pair_bytes;
      const Pair pair(own + key_bytes + value_bytes, wide);
      const int8_t *keys = (const int8_t*)own, *values = keys + key_bytes;
      uint8_t *queries = codes, *probabilities = queries + 32 * deep;
      memset(queries, 0, 32 * deep);
      Token query[32];
      for (int64_t i = 0; i < many; i++) {
        const int64_t at = b * a.query.image + (start + i) * a.query.row + h * a.query.head;
        query[i] = code_token(a.query, at, a.size, top_of(0, b), queries + i * deep);
      }
      const Operand operand{{queries, queries + 16 * deep}, deep, &zero_tap, 1, pieces, 64};
      for (int64_t n = 0; n < key_tiles; n += 2) {
        score(operand, {{keys + n * pieces * TILE, keys + (n + 1) * pieces * TILE}, {{ZEROS, ZEROS}, {ZEROS, ZEROS}}},
              {scores + n * 16, scores_stride, 16, 16 * scores_stride});
      }
      float scale[32];  // of a row of the output; NaN if the row depends on a NaN
      int32_t code_sum[32] = {};
      for (int64_t i = 0; i < many; i++) {
        int32_t* row = scores + i * scores_stride;
        const float* added = a.mask ? a.mask + b * a.mask_image + h * a.mask_head + (start + i) * a.mask_row : nullptr;
        const float most = scores_of(row, a.key_length, pair, query[i], a.size, a.factor, added);
        float peak;
        const float total = powers((float*)row, a.key_length, most, pair.share, peak);
        const float factor = (float)top / peak;
        const bool empty = most == -INFINITY || !(factor < INFINITY);  // every key is masked, or every value is 0
        code_sum[i] = -probability_codes((const float*)row, a.key_length, empty ? 0 : factor, pair.value_zero_point, top,
                                         probabilities + i * 64, 32 * 64);
        scale[i] = empty ? 0 : peak / ((float)top * total) * *pair.most;
        if (query[i].nan || !(most < INFINITY) || std::isnan(*pair.most)) scale[i] = NAN;
      }
      const Operand codes_of_row{{probabilities, probabilities + 16 * 64}, 64, &zero_tap, 1, key_pieces, 32 * 64};
      store_mixed(a, mix, codes_of_row, values, ZEROS, 0, b * a.y_image + start * a.y_row + h * a.y_head, many, scale, code_sum);
    }
    end_products(a.extension);
  }
}
