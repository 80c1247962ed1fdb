// Convolution and linear on codes: y = (sum of code * weight - zero_point * sum of weight) * scale + bias (+ more).
//
// A convolution is a product whose rows are windows: along a row of the image a window's bytes are contiguous, and the
// window of the next pixel starts `stride` bytes further, so that nothing is copied.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"
#include "product.h"
#include "scratch.h"

namespace {

// Unpacks rows of 64 weights of a tile: byte i of 32 holds the codes of weights i (low) and i + 32 (high).
void unpack(const uint8_t* codes, int64_t rows, const uint8_t* zero_point, int8_t* out) {
  alignas(64) uint8_t zero[64];  // four weights of a column are adjacent
  for (int i = 0; i < 64; i++) zero[i] = zero_point[i / 4];
  const __m256i first_zero = _mm256_load_si256((const __m256i*)zero), last_zero = _mm256_load_si256((const __m256i*)zero + 1);
  const __m256i nibble = _mm256_set1_epi8(0xF);
  for (int64_t i = 0; i < rows; i++) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)(codes + i * 32));
    const __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    _mm256_storeu_si256((__m256i*)(out + i * 64), _mm256_sub_epi8(low, first_zero));
    _mm256_storeu_si256((__m256i*)(out + i * 64) + 1, _mm256_sub_epi8(high, last_zero));
  }
}

void multiply(const Call call) {
  const Layer& l = call.layer;
  const Positions& p = call.positions;
  const int64_t wide = (l.outputs + 31) / 32 * 32, column_blocks = wide / 32;
  const uint8_t* const nan = call.codes + call.plane.nan;
  const bool any_nan = std::any_of(nan, nan + p.batch, [](uint8_t flag) { return flag != 0; });
  const bool per_sample = call.per_sample || call.channel_add || call.gate || any_nan;
  const int64_t samples = per_sample ? p.batch : 1;
  std::vector<int32_t> initial(samples * wide);
  std::vector<float> scale(samples * wide), offset(samples * wide);
  for (int64_t b = 0; b < samples; b++) {
    const int64_t at = call.per_sample ? b : 0;
    for (int64_t o = 0; o < wide; o++) {
      initial[b * wide + o] = -call.zero_point[at] * l.weight_sum[o];
      const float factor = call.gate && o < l.outputs ? call.gate[b * l.outputs + o] * call.factor : call.factor;
      scale[b * wide + o] = call.scale[at] * l.weight_scale[o] * factor;
      const float added = (l.bias ? l.bias[o] : 0) + (call.channel_add && o < l.outputs ? call.channel_add[b * l.outputs + o] : 0);
      offset[b * wide + o] = any_nan && nan[b] ? NAN : added * factor;
    }
  }
  const int64_t row_tiles = p.flat ? 0 : (p.width + 15) / 16;
  const int64_t image_tiles = p.flat ? (p.height * p.flat + 15) / 16 : p.height * row_tiles;
  const int64_t tiles = p.batch * image_tiles, row_blocks = (tiles + 1) / 2;
  const int64_t column_bytes = 2 * l.tap_count * l.pieces * TILE;
  // All rows times as many columns as fit into the second-level cache, then times the next ones. Columns that have to be
  // unpacked are processed one block at a time.
  const int64_t together = l.zero_point ? 1 : std::clamp<int64_t>((1 << 20) / column_bytes, 1, column_blocks);
  const int64_t blocks = row_blocks * column_blocks;
  const Product product = product_for(call.extension, *std::max_element(call.top, call.top + (call.per_sample ? p.batch : 1)), l.largest);
  static thread_local Scratch scratch;
  int8_t* const unpacked_columns = l.zero_point ? (int8_t*)scratch.of(call.threads * column_bytes) : nullptr;
#pragma omp parallel num_threads(call.threads)
  {
    begin_products(call.extension);
    alignas(64) int32_t sums[4 * 256];
    int64_t pixel[2][16], image[2];
    Operand a{{nullptr, nullptr}, p.pixel_bytes, l.taps, l.tap_count, l.pieces, 64};
    int64_t ready = -1, unpacked = -1;
    int8_t* const columns_of_block = unpacked_columns + (l.zero_point ? omp_get_thread_num() * column_bytes : 0);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t group = block / (row_blocks * together), inside = block % (row_blocks * together);
      const int64_t width = std::min(together, column_blocks - group * together);
      const int64_t rb = inside / width, cb = group * together + inside % width;
      if (rb != ready) {
        ready = rb;
        for (int t = 0; t < 2; t++) {
          const int64_t tile = rb * 2 + t;
          const int64_t real = std::min(tile, tiles - 1), b = real / image_tiles, index = real % image_tiles;
          image[t] = b;
          int64_t y, x;
          if (p.flat) {
            y = index * 16 / p.flat, x = index * 16 % p.flat;
          } else {
            y = index / row_tiles, x = index % row_tiles * 16;
          }
          a.rows[t] = call.codes + b * p.image_bytes + y * p.row_bytes + x * p.pixel_bytes;
          for (int i = 0; i < 16; i++, x++) {
            if (p.flat && x == p.flat) x = 0, y++;
            pixel[t][i] = tile < tiles && x < p.width && y < p.height ? (b * p.height + y) * p.width + x : -1;
          }
        }
      }
      const int64_t tile_bytes = column_bytes / 2;
      if (l.zero_point && cb != unpacked) {
        unpacked = cb;
        for (int64_t n = 0; n < 2; n++) {
          const uint8_t* packed = (const uint8_t*)l.weight + (cb * 2 + n) * tile_bytes / 2;
          unpack(packed, tile_bytes / 64, l.zero_point + cb * 32 + n * 16, columns_of_block + n * tile_bytes);
        }
      }
      const int8_t* first_column = l.zero_point ? columns_of_block : l.weight + cb * column_bytes;
      Columns columns;
      for (int n = 0; n < 2; n++) {
        columns.tiles[n] = first_column + n * tile_bytes;
        for (int t = 0; t < 2; t++) {
          columns.initial[t][n] = initial.data() + (per_sample ? image[t] : 0) * wide + cb * 32 + n * 16;
        }
      }
      product(a, columns, four_tiles(sums));
      for (int n = 0; n < 2; n++) {
        const int64_t o = cb * 32 + n * 16;
        if (o >= l.outputs) break;
        const Mask mask = first(l.outputs - o);
        for (int t = 0; t < 2; t++) {
          const int64_t at = (per_sample ? image[t] : 0) * wide + o;
          const Floats s = load(scale.data() + at), z = load(offset.data() + at);
          const int32_t* from = sums + (t * 2 + n) * 256;
          for (int i = 0; i < 16; i++) {
            if (pixel[t][i] < 0) continue;
            Floats v = fma(to_floats(load(from + i * 16)), s, z);
            if (call.residual) {
              const Floats other = load16(call.residual, call.residual_type, pixel[t][i] * l.outputs + o, mask);
              v = fma(other, set(call.factor), v);
            }
            store16(call.y, call.y_type, pixel[t][i] * l.outputs + o, mask, v);
          }
        }
      }
    }
    end_products(call.extension);
  }
}

}  // namespace

extern "C" int32_t sq_layer(const Call* call) { return guarded([=] { multiply(*call); }); }
