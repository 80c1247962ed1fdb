// From activations to codes in one pass: normalization, SiLU or GELU, upsampling, quantization, the border of the image.
//
// Codes of an image are stored row by row, with a pixel's channels adjacent. The gap between two rows is the right border
// of the first and the left border of the second, so that a convolution reads every window without a condition.
#include <algorithm>
#include <vector>

#include "call.h"
#include "scratch.h"
#include "vectors.h"

namespace {

enum Normalization : int32_t { AFFINE = 1, LAYER = 2 };

// Mean and reciprocal standard deviation of a pixel's channels.
template <int32_t TYPE>
void statistics(const void* x, const Source& s, int64_t from, float epsilon, Floats& mean, Floats& inverse) {
  Floats total = set(0.0f);
  for (int64_t c = 0; c < s.channels; c += 16) total = total + load16(x, TYPE, from + c, first(s.channels - c));
  mean = set(sum(total) / s.channels);
  Floats squares = set(0.0f);
  for (int64_t c = 0; c < s.channels; c += 16) {
    const Mask mask = first(s.channels - c);
    const Floats v = keep(mask, load16(x, TYPE, from + c, mask) - mean);
    squares = fma(v, v, squares);
  }
  inverse = set(1.0f / __builtin_sqrtf(sum(squares) / s.channels + epsilon));
}

// Writes the codes of a row of pixels; returns whether a value is NaN. `multiply`, `add` and `inverse` are [channels];
// `inverse` is 1 / (scale * smoothing), or null without smoothing.
template <int32_t TYPE, int32_t NORM, int32_t ACTIVATION>
bool code_row(const void* x, const Source& s, int64_t from, const float* multiply, const float* add, float epsilon,
              const float* inverse, const Quantizer& quantizer, uint8_t* out) {
  Floats mean, deviation;
  Ints seen = set(0);
  for (int64_t column = 0; column < s.width; column += s.scale) {
    if (NORM == LAYER) statistics<TYPE>(x, s, from, epsilon, mean, deviation);
    for (int64_t c = 0; c < s.channels; c += 16) {
      const Mask mask = first(s.channels - c);
      Floats v = load16(x, TYPE, from + c, mask);
      if (NORM == LAYER) v = (v - mean) * deviation;
      if (NORM) v = fma(v, load(mask, multiply + c), load(mask, add + c));
      if (ACTIVATION == SILU) v = silu(v);
      if (ACTIVATION == GELU) v = gelu(v);
      if (ACTIVATION == GELU_TANH) v = gelu_tanh(v);
      if (ACTIVATION == GEGLU) v = v * gelu(load16(x, TYPE, from + s.gate + c, mask));
      store_codes(out + c, mask, inverse ? quantizer(v, load(mask, inverse + c)) : quantizer(v), seen);
    }
    out += s.channels;
    if (s.scale == 2) {
      memcpy(out, out - s.channels, s.channels);
      out += s.channels;
    }
    from += s.pixel;
  }
  return any_nan(seen);
}

using CodeRow = bool (*)(const void*, const Source&, int64_t, const float*, const float*, float, const float*,
                         const Quantizer&, uint8_t*);

// Only the combinations that denoisers have: an activation after a linear has no normalization before it.
template <int32_t TYPE>
CodeRow code_row_of(const Call& call) {
  const int32_t activation = call.activation;
  if (call.multiply && call.epsilon != 0) return code_row<TYPE, LAYER, NONE>;
  if (call.multiply) return activation == SILU ? code_row<TYPE, AFFINE, SILU> : code_row<TYPE, AFFINE, NONE>;
  switch (activation) {
    case SILU: return code_row<TYPE, 0, SILU>;
    case GELU: return code_row<TYPE, 0, GELU>;
    case GELU_TANH: return code_row<TYPE, 0, GELU_TANH>;
    case GEGLU: return code_row<TYPE, 0, GEGLU>;
    default: return code_row<TYPE, 0, NONE>;
  }
}

void make_codes(const Call call) {
  const Source& s = call.source;
  const Plane& p = call.plane;
  const int64_t rows = p.top + s.height + p.bottom;
  const CodeRow make = s.type == FLOAT32   ? code_row_of<FLOAT32>(call)
                       : s.type == FLOAT16 ? code_row_of<FLOAT16>(call)
                                           : code_row_of<BFLOAT16>(call);
  const int64_t grids = call.per_sample ? s.batch : 1;
  std::vector<float> inverse(call.smoothing ? grids * s.channels : 0);
  for (int64_t i = 0; i < (int64_t)inverse.size(); i++) {
    inverse[i] = 1.0f / (call.scale[i / s.channels] * call.smoothing[i % s.channels]);
  }
  uint8_t* const nan = call.codes + p.nan;
  memset(nan, 0, s.batch);
#pragma omp parallel for collapse(2) num_threads(call.threads) schedule(static)
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t r = 0; r < rows; r++) {
      const Quantizer quantizer(call.scale, call.zero_point, call.top, call.per_sample ? b : 0);
      const int32_t zero = quantizer.zero_point;
      uint8_t* out = call.codes + b * p.image_bytes + (p.left + r * p.row_pixels) * s.channels;
      if (r == 0) memset(call.codes + b * p.image_bytes, zero, p.left * s.channels);
      const int64_t y = r - p.top;
      if (y < 0 || y >= s.height) {
        memset(out, zero, p.row_pixels * s.channels);
        continue;
      }
      const float* own = call.smoothing ? inverse.data() + (call.per_sample ? b * s.channels : 0) : nullptr;
      const int64_t norm = b * call.norm_image;
      const bool found = make(call.x, s, b * s.image + y / s.scale * s.row, call.multiply + norm, call.add + norm,
                              call.epsilon, own, quantizer, out);
      if (found) {
#pragma omp atomic write
        nan[b] = 1;
      }
      memset(out + s.width * s.channels, zero, (p.row_pixels - s.width) * s.channels);
    }
  }
}

void group_norm(const GroupNorm n) {
  constexpr int64_t CHUNK = 64;  // pixels that are summed in float32; their sums are added in double
  const int64_t chunks = (n.pixels + CHUNK - 1) / CHUNK, wide = (n.channels + 15) / 16 * 16;
  std::vector<float> partial(n.batch * chunks * 2 * wide);
#pragma omp parallel for collapse(2) num_threads(n.threads) schedule(static)
  for (int64_t b = 0; b < n.batch; b++) {
    for (int64_t k = 0; k < chunks; k++) {
      float *sum = partial.data() + (b * chunks + k) * 2 * wide, *square = sum + wide;
      const int64_t start = k * CHUNK, stop = std::min(n.pixels, start + CHUNK);
      for (int64_t i = start; i < stop; i += 4) {
        const int64_t many = std::min<int64_t>(4, stop - i);
        for (int64_t c = 0; c < n.channels; c += 16) {
          const Mask mask = first(n.channels - c);
          Floats total = load(sum + c), squares = load(square + c);
          for (int64_t j = 0; j < many; j++) {
            const Floats v = load16(n.x, n.type, b * n.image + (i + j) * n.pixel + c, mask);
            total = total + v;
            squares = fma(v, v, squares);
          }
          store(sum + c, total);
          store(square + c, squares);
        }
      }
    }
  }
  const int64_t members = n.channels / n.groups;
  for (int64_t b = 0; b < n.batch; b++) {
    for (int64_t g = 0; g < n.groups; g++) {
      double sum = 0, square = 0;
      for (int64_t k = 0; k < chunks; k++) {
        const float* values = partial.data() + (b * chunks + k) * 2 * wide + g * members;
        for (int64_t c = 0; c < members; c++) sum += values[c], square += values[wide + c];
      }
      const double count = (double)(n.pixels * members), mean = sum / count;
      double deviation = square / count - mean * mean;
      if (deviation < 0) deviation = 0;  // NaN stays
      const float inverse = (float)(1.0 / __builtin_sqrt(deviation + n.epsilon));
      for (int64_t c = g * members; c < (g + 1) * members; c++) {
        n.multiply[b * n.channels + c] = n.weight[c] * inverse;
        n.add[b * n.channels + c] = n.bias[c] - (float)mean * n.weight[c] * inverse;
      }
    }
  }
}

void join(const Join j) {
  const int64_t wide = j.bytes[0] + j.bytes[1];
#pragma omp parallel for num_threads(j.threads) schedule(static)
  for (int64_t i = 0; i < j.pixels; i++) {
    char* out = (char*)j.y + i * wide;
    memcpy(out, (const char*)j.x[0] + i * j.bytes[0], j.bytes[0]);
    memcpy(out + j.bytes[0], (const char*)j.x[1] + i * j.bytes[1], j.bytes[1]);
  }
}

}  // namespace

extern "C" int32_t sq_codes(const Call* call) { return guarded([=] { make_codes(*call); }); }
extern "C" int32_t sq_group_norm(const GroupNorm* call) { return guarded([=] { group_norm(*call); }); }
extern "C" int32_t sq_join(const Join* call) { return guarded([=] { join(*call); }); }
