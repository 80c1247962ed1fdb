// Convolution and linear on codes: y = (sum of code * weight - zero_point * sum of weight) * scale + bias (+ more).
//
// A convolution is a product whose rows are windows: along a row of the picture a window's bytes are contiguous, and
// the next pixel's window starts `stride` bytes further, so that nothing is copied.
#include <algorithm>
#include <vector>

#include "product.h"

struct Layer {
  const int8_t* weight;         // packed [tiles of 16 outputs, even][taps][pieces][16][16][4]
  const int32_t* weight_sum;    // [outputs rounded up to 32]
  const float* weight_scale;    // [outputs rounded up to 32]
  const float* bias;            // [outputs rounded up to 32], or null
  const int64_t* taps;          // byte offsets
  int64_t tap_count, pieces, outputs;
};

struct Positions {
  int64_t batch, image_bytes;                 // of the codes
  int64_t row_bytes, pixel_bytes;             // from an output row, or pixel, to the next: in the codes
  int64_t height, width;                      // of the output
  int64_t flat;                               // > 0: rows are `flat` positions long, and tiles run across their ends
};

struct Scales {
  const float* input;         // [batch] or [1]
  const int32_t* zero_point;  // [batch] or [1]
  int32_t per_sample;
};

struct Ending {
  void* y;
  int32_t type, residual_type;
  int64_t pixel;              // elements from an output pixel to the next
  const float* channel_add;   // [batch, outputs] or null, added after the bias
  const float* gate;          // [batch, outputs] or null, multiplied before the residual is added
  const void* residual;       // or null; may be y
  int64_t residual_pixel;
  float factor;               // the result is multiplied by it
};

extern "C" void sq_layer(const Layer* layer, const Positions* positions, const uint8_t* codes, const Scales* scales,
                         const Ending* ending, int32_t amx, int32_t threads) {
  const Layer l = *layer;
  const Positions p = *positions;
  const Ending e = *ending;
  const int64_t wide = (l.outputs + 31) / 32 * 32, column_blocks = wide / 32;
  const bool per_sample = scales->per_sample || e.channel_add || e.gate;
  const int64_t samples = per_sample ? p.batch : 1;
  std::vector<int32_t> initial(samples * wide);
  std::vector<float> scale(samples * wide), offset(samples * wide);
  for (int64_t b = 0; b < samples; b++) {
    const int64_t at = scales->per_sample ? b : 0;
    for (int64_t o = 0; o < wide; o++) {
      initial[b * wide + o] = -scales->zero_point[at] * l.weight_sum[o];
      const float factor = e.gate && o < l.outputs ? e.gate[b * l.outputs + o] * e.factor : e.factor;
      scale[b * wide + o] = scales->input[at] * l.weight_scale[o] * factor;
      const float added = (l.bias ? l.bias[o] : 0) + (e.channel_add && o < l.outputs ? e.channel_add[b * l.outputs + o] : 0);
      offset[b * wide + o] = added * factor;
    }
  }
  const int64_t row_tiles = p.flat ? 0 : (p.width + 15) / 16;
  const int64_t image_tiles = p.flat ? (p.height * p.flat + 15) / 16 : p.height * row_tiles;
  const int64_t tiles = p.batch * image_tiles, row_blocks = (tiles + 1) / 2;
  const int64_t column_bytes = 2 * l.tap_count * l.pieces * TILE;
  // The side that does not fit the second-level cache is walked once.
  const bool rows_inside = column_blocks * column_bytes > (1 << 20) && row_blocks < 64;
  const int64_t blocks = row_blocks * column_blocks;
  const Product product = product_for(amx);
#pragma omp parallel num_threads(threads)
  {
    begin_products(amx);
    alignas(64) int32_t sums[4 * 256];
    int64_t pixel[2][16], image[2];
    Operand a{{nullptr, nullptr}, p.pixel_bytes, l.taps, l.tap_count, l.pieces};
    int64_t ready = -1;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t rb = rows_inside ? block % row_blocks : block / column_blocks;
      const int64_t cb = rows_inside ? block / row_blocks : block % column_blocks;
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
          a.rows[t] = codes + b * p.image_bytes + y * p.row_bytes + x * p.pixel_bytes;
          for (int i = 0; i < 16; i++, x++) {
            if (p.flat && x == p.flat) x = 0, y++;
            pixel[t][i] = tile < tiles && x < p.width && y < p.height ? (b * p.height + y) * p.width + x : -1;
          }
        }
      }
      Columns columns;
      for (int n = 0; n < 2; n++) {
        columns.tiles[n] = l.weight + (cb * 2 + n) * l.tap_count * l.pieces * TILE;
        for (int t = 0; t < 2; t++) {
          columns.initial[t][n] = initial.data() + (per_sample ? image[t] : 0) * wide + cb * 32 + n * 16;
        }
      }
      product(a, columns, sums);
      for (int n = 0; n < 2; n++) {
        const int64_t o = cb * 32 + n * 16;
        if (o >= l.outputs) break;
        const __mmask16 mask = first(l.outputs - o);
        for (int t = 0; t < 2; t++) {
          const int64_t at = (per_sample ? image[t] : 0) * wide + o;
          const __m512 s = _mm512_loadu_ps(scale.data() + at), z = _mm512_loadu_ps(offset.data() + at);
          const int32_t* from = sums + (t * 2 + n) * 256;
          for (int i = 0; i < 16; i++) {
            if (pixel[t][i] < 0) continue;
            __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(from + i * 16)), s, z);
            if (e.residual) {
              const __m512 other = load16(e.residual, e.residual_type, pixel[t][i] * e.residual_pixel + o, mask);
              v = _mm512_fmadd_ps(other, _mm512_set1_ps(e.factor), v);
            }
            store16(e.y, e.type, pixel[t][i] * e.pixel + o, mask, v);
          }
        }
      }
    }
    end_products(amx);
  }
}
