// From activations to codes in one pass: normalization, SiLU, upsampling, quantization, and the border of the picture.
//
// Codes of a picture lie row by row, a pixel's channels together. Between two rows is a gap that serves as the right
// border of the one and the left border of the other, so that a convolution reads every window without a condition.
#include <algorithm>
#include <vector>

#include "vectors.h"

struct Plane {  // where the codes of one picture go; see geometry() in kernel.py
  int64_t image_bytes, row_pixels;
  int64_t top, bottom, left;  // border pixels; the gap is row_pixels - width
};

struct Source {
  const void* x;
  int32_t type;
  int32_t scale;                             // 2: every pixel is repeated in both directions
  int64_t image, row, pixel;                 // strides in elements; channels are adjacent
  int64_t batch, height, width, channels;    // of the codes, without border
};

struct Grid {
  const float* scale;         // [batch] or [1]
  const int32_t* zero_point;  // [batch] or [1]
  int32_t per_sample, top;
};

namespace {

// Codes of a row of pixels; `multiply` and `add` are [channels], or null, and so is `inverse`, 1 / (scale * balance).
template <int32_t TYPE, bool NORM, bool SILU>
void code_row(const Source& s, int64_t from, const float* multiply, const float* add, const float* inverse,
              const Quantizer& quantizer, uint8_t* out) {
  for (int64_t x = 0; x < s.width; x += s.scale) {
    for (int64_t c = 0; c < s.channels; c += 16) {
      const __mmask16 mask = first(s.channels - c);
      __m512 v = load16(s.x, TYPE, from + c, mask);
      if (NORM) v = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(mask, multiply + c), _mm512_maskz_loadu_ps(mask, add + c));
      if (SILU) v = silu(v);
      const __m128i codes = inverse ? quantizer(v, _mm512_maskz_loadu_ps(mask, inverse + c)) : quantizer(v);
      _mm_mask_storeu_epi8(out + c, mask, codes);
    }
    out += s.channels;
    if (s.scale == 2) {
      memcpy(out, out - s.channels, s.channels);
      out += s.channels;
    }
    from += s.pixel;
  }
}

using CodeRow = void (*)(const Source&, int64_t, const float*, const float*, const float*, const Quantizer&, uint8_t*);

template <int32_t TYPE>
CodeRow code_row_of(bool norm, bool silu) {
  if (norm) return silu ? code_row<TYPE, true, true> : code_row<TYPE, true, false>;
  return silu ? code_row<TYPE, false, true> : code_row<TYPE, false, false>;
}

}  // namespace

// multiply, add: [batch, channels] of a normalization, or null. balance: [channels], or null: divides x first.
extern "C" void sq_codes(const Source* source, const Grid* grid, const Plane* plane, const float* multiply,
                         const float* add, const float* balance, int32_t activation, uint8_t* codes, int32_t threads) {
  const Source s = *source;
  const Plane p = *plane;
  const int64_t rows = p.top + s.height + p.bottom;
  const CodeRow make = s.type == FLOAT32   ? code_row_of<FLOAT32>(multiply, activation)
                       : s.type == FLOAT16 ? code_row_of<FLOAT16>(multiply, activation)
                                           : code_row_of<BFLOAT16>(multiply, activation);
  const int64_t grids = grid->per_sample ? s.batch : 1;
  std::vector<float> inverse(balance ? grids * s.channels : 0);
  for (int64_t i = 0; i < (int64_t)inverse.size(); i++) {
    inverse[i] = 1.0f / (grid->scale[i / s.channels] * balance[i % s.channels]);
  }
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t r = 0; r < rows; r++) {
      const Quantizer quantizer(grid->scale, grid->zero_point, grid->per_sample ? b : 0, grid->top);
      const int32_t zero = quantizer.zero_point;
      uint8_t* out = codes + b * p.image_bytes + (p.left + r * p.row_pixels) * s.channels;
      if (r == 0) memset(codes + b * p.image_bytes, zero, p.left * s.channels);
      const int64_t y = r - p.top;
      if (y < 0 || y >= s.height) {
        memset(out, zero, p.row_pixels * s.channels);
        continue;
      }
      const int64_t norm = multiply ? b * s.channels : 0;
      const float* own = balance ? inverse.data() + (grid->per_sample ? b * s.channels : 0) : nullptr;
      make(s, b * s.image + y / s.scale * s.row, multiply + norm, add + norm, own, quantizer, out);
      memset(out + s.width * s.channels, zero, (p.row_pixels - s.width) * s.channels);
    }
  }
}

// Group normalization of [batch, pixels, channels] as x * multiply + add: float32 [batch, channels] each.
extern "C" void sq_group_norm(const void* x, int32_t type, int64_t image, int64_t pixel, int64_t batch, int64_t pixels,
                              int64_t channels, int64_t groups, float epsilon, const float* weight, const float* bias,
                              float* multiply, float* add, int32_t threads) {
  constexpr int64_t CHUNK = 64;  // pixels summed in float32; chunks are summed in double
  const int64_t chunks = (pixels + CHUNK - 1) / CHUNK, wide = (channels + 15) / 16 * 16;
  std::vector<float> partial(batch * chunks * 2 * wide);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t k = 0; k < chunks; k++) {
      float *sum = partial.data() + (b * chunks + k) * 2 * wide, *square = sum + wide;
      const int64_t start = k * CHUNK, stop = std::min(pixels, start + CHUNK);
      for (int64_t i = start; i < stop; i += 4) {
        const int64_t many = std::min<int64_t>(4, stop - i);
        for (int64_t c = 0; c < channels; c += 16) {
          const __mmask16 mask = first(channels - c);
          __m512 total = _mm512_loadu_ps(sum + c), squares = _mm512_loadu_ps(square + c);
          for (int64_t j = 0; j < many; j++) {
            const __m512 v = load16(x, type, b * image + (i + j) * pixel + c, mask);
            total = _mm512_add_ps(total, v);
            squares = _mm512_fmadd_ps(v, v, squares);
          }
          _mm512_storeu_ps(sum + c, total);
          _mm512_storeu_ps(square + c, squares);
        }
      }
    }
  }
  const int64_t members = channels / groups;
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t g = 0; g < groups; g++) {
      double sum = 0, square = 0;
      for (int64_t k = 0; k < chunks; k++) {
        const float* values = partial.data() + (b * chunks + k) * 2 * wide + g * members;
        for (int64_t c = 0; c < members; c++) sum += values[c], square += values[wide + c];
      }
      const double count = (double)(pixels * members), mean = sum / count;
      const double deviation = std::max(0.0, square / count - mean * mean);
      const float inverse = (float)(1.0 / __builtin_sqrt(deviation + epsilon));
      for (int64_t c = g * members; c < (g + 1) * members; c++) {
        multiply[b * channels + c] = weight[c] * inverse;
        add[b * channels + c] = bias[c] - (float)mean * weight[c] * inverse;
      }
    }
  }
}
