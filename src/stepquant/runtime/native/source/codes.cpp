// From activations to codes in one pass: normalization, SiLU or GELU, upsampling, quantization, the border of the image.
//
// Codes of an image are stored row by row, with a pixel's channels adjacent. The gap between two rows is the right border
// of the first and the left border of the second, so that a convolution reads every window without a condition.
#include <omp.h>

#include <algorithm>
#include <cmath>
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

// What is quantized: x after normalization and activation. `multiply` and `add` are [channels].
template <int32_t TYPE, int32_t NORM, int32_t ACTIVATION>
struct Values {
  const void* x;
  const Source& s;
  const float *multiply, *add;
  float epsilon;
  int64_t from = 0;  // of the first channel of a pixel
  Floats mean, deviation;

  void move_to(int64_t pixel) {
    from = pixel;
    if (NORM == LAYER) statistics<TYPE>(x, s, from, epsilon, mean, deviation);
  }

  // The channels from c on. 0 outside of the mask, unless the channels have a NaN.
  Floats operator()(int64_t c, Mask mask) const {
    Floats v = load16(x, TYPE, from + c, mask);
    if (NORM == LAYER) v = (v - mean) * deviation;
    if (NORM) v = fma(v, load(mask, multiply + c), load(mask, add + c));
    if (ACTIVATION == SILU) v = silu(v);
    if (ACTIVATION == GELU) v = gelu(v);
    if (ACTIVATION == GELU_TANH) v = gelu_tanh(v);
    if (ACTIVATION == GEGLU) v = v * gelu(load16(x, TYPE, from + s.gate + c, mask));
    return v;
  }
};

// Where the codes of a row of pixels are written, and the grids of dynamic activations.
struct Row {
  uint8_t* codes;
  float *scale, *zero_point;
  float* memory;  // of the thread: [channels + 16], then 4 times [groups rounded up to 16]
};

// Writes the codes of a row of pixels; returns whether a value is NaN. `inverse` is 1 / (scale * smoothing), [channels],
// or null without smoothing.
template <int32_t TYPE, int32_t NORM, int32_t ACTIVATION>
bool code_row(const Call& call, Values<TYPE, NORM, ACTIVATION> values, int64_t from, const float* inverse,
              const Quantizer& quantizer, const Row& row) {
  const Source& s = call.source;
  uint8_t* out = row.codes;
  Ints seen = set(0);
  for (int64_t column = 0; column < s.width; column += s.scale, from += s.pixel) {
    values.move_to(from);
    for (int64_t c = 0; c < s.channels; c += 16) {
      const Mask mask = first(s.channels - c);
      const Floats v = values(c, mask);
      store_codes(out + c, mask, inverse ? quantizer(v, load(mask, inverse + c)) : quantizer(v), seen);
    }
    out += s.channels;
    if (s.scale == 2) {
      memcpy(out, out - s.channels, s.channels);
      out += s.channels;
    }
  }
  return any_nan(seen);
}

// Writes the codes and grids of one pixel. The scale of a group with a NaN is NaN, and so is what depends on it.
template <int32_t TYPE, int32_t NORM, int32_t ACTIVATION>
void code_pixel(const Call& call, const Values<TYPE, NORM, ACTIVATION>& values, int32_t top, const Row& row) {
  const int64_t channels = call.source.channels, group = call.grids.channels, groups = call.grids.groups;
  const int64_t wide = (groups + 15) / 16 * 16;
  float *const low = row.memory + channels + 16, *const high = low + wide, *const inverse = high + wide, *const zero = inverse + wide;
  for (int64_t g = 0, c = 0; g < groups; g++) {
    Floats least = set(0.0f), most = set(0.0f);
    for (const int64_t stop = std::min(channels, (g + 1) * group); c < stop; c += 16) {
      const Mask mask = first(stop - c);
      Floats v = values(c, mask);
      if (call.smoothing) v = v * load(mask, call.smoothing + c);
      least = min(v, least), most = max(v, most);  // not those of a NaN
      store(row.memory + c, v);
    }
    c = std::min(channels, (g + 1) * group);
    low[g] = smallest(least), high[g] = largest(most);
  }
  for (int64_t g = 0; g < groups; g += 16) {
    const Range range(load(low + g), load(high + g), top);
    store(first(groups - g), row.scale + g, range.scale);
    store(first(groups - g), row.zero_point + g, range.zero_point);
    store(inverse + g, range.inverse);
    store(zero + g, range.zero_point);
  }
  for (int64_t g = 0; g < groups; g++) {
    const Quantizer quantizer(row.scale[g], inverse[g], (int32_t)zero[g], top);
    const int64_t stop = std::min(channels, (g + 1) * group);
    Ints seen = set(0);
    for (int64_t c = g * group; c < stop; c += 16) {
      store_codes(row.codes + c, first(stop - c), quantizer(load(row.memory + c)), seen);
    }
    if (any_nan(seen)) row.scale[g] = NAN;
  }
}

// The same as `code_row` for dynamic activations.
template <int32_t TYPE, int32_t NORM, int32_t ACTIVATION>
bool code_pixels(const Call& call, Values<TYPE, NORM, ACTIVATION> values, int64_t from, const float*,
                 const Quantizer& quantizer, const Row& row) {
  const Source& s = call.source;
  const int64_t groups = call.grids.groups;
  Row pixel = row;
  for (int64_t column = 0; column < s.width; column += s.scale, from += s.pixel) {
    values.move_to(from);
    code_pixel(call, values, quantizer.top, pixel);
    for (int64_t copy = 1; copy < s.scale; copy++) {
      memcpy(pixel.codes + s.channels, pixel.codes, s.channels);
      memcpy(pixel.scale + groups, pixel.scale, groups * sizeof(float));
      memcpy(pixel.zero_point + groups, pixel.zero_point, groups * sizeof(float));
      pixel.codes += s.channels, pixel.scale += groups, pixel.zero_point += groups;
    }
    pixel.codes += s.channels, pixel.scale += groups, pixel.zero_point += groups;
  }
  return false;
}

template <int32_t TYPE, int32_t NORM, int32_t ACTIVATION>
bool make_row(const Call& call, int64_t from, const float* multiply, const float* add, const float* inverse,
              const Quantizer& quantizer, const Row& row) {
  const Values<TYPE, NORM, ACTIVATION> values{call.x, call.source, multiply, add, call.epsilon};
  return (call.grids.channels ? code_pixels<TYPE, NORM, ACTIVATION> : code_row<TYPE, NORM, ACTIVATION>)(
      call, values, from, inverse, quantizer, row);
}

using MakeRow = bool (*)(const Call&, int64_t, const float*, const float*, const float*, const Quantizer&, const Row&);

// Only the combinations that denoisers have: an activation after a linear has no normalization before it.
template <int32_t TYPE>
MakeRow make_row_of(const Call& call) {
  const int32_t activation = call.activation;
  if (call.multiply && call.epsilon != 0) return make_row<TYPE, LAYER, NONE>;
  if (call.multiply) return activation == SILU ? make_row<TYPE, AFFINE, SILU> : make_row<TYPE, AFFINE, NONE>;
  switch (activation) {
    case SILU: return make_row<TYPE, 0, SILU>;
    case GELU: return make_row<TYPE, 0, GELU>;
    case GELU_TANH: return make_row<TYPE, 0, GELU_TANH>;
    case GEGLU: return make_row<TYPE, 0, GEGLU>;
    default: return make_row<TYPE, 0, NONE>;
  }
}

// Pixels of the border, which contribute nothing to a window.
void clear(const Row& row, int64_t channels, int64_t groups, int64_t pixels, int32_t zero_point) {
  memset(row.codes, zero_point, pixels * channels);
  if (!groups) return;
  memset(row.scale, 0, pixels * groups * sizeof(float));
  memset(row.zero_point, 0, pixels * groups * sizeof(float));
}

void make_codes(const Call call) {
  const Source& s = call.source;
  const Plane& p = call.plane;
  const Grids& g = call.grids;
  const int64_t frame_rows = p.top + s.height + p.bottom, rows = (p.front + s.frames + p.back) * frame_rows;
  const MakeRow make = s.type == FLOAT32   ? make_row_of<FLOAT32>(call)
                       : s.type == FLOAT16 ? make_row_of<FLOAT16>(call)
                                           : make_row_of<BFLOAT16>(call);
  const int64_t grids = call.per_sample ? s.batch : 1, groups = g.channels ? g.groups : 0;
  std::vector<float> inverse(call.smoothing && !groups ? grids * s.channels : 0);
  for (int64_t i = 0; i < (int64_t)inverse.size(); i++) {
    inverse[i] = 1.0f / (call.scale[i / s.channels] * call.smoothing[i % s.channels]);
  }
  uint8_t* const nan = call.codes + p.nan;
  memset(nan, 0, s.batch);
  const int64_t memory_size = groups ? s.channels + 16 + 4 * ((groups + 15) / 16 * 16) : 0;
  static thread_local Scratch scratch;
  float* const memory = groups ? (float*)scratch.of(call.threads * memory_size * sizeof(float)) : nullptr;
  float *const scale = (float*)(call.codes + g.scale), *const zero_point = (float*)(call.codes + g.zero_point);
  // The pixel at `at` of the plane; the last tile of rows reads the grids behind the last image.
  const auto row_at = [=](int64_t at) {
    float* const own = groups ? memory + omp_get_thread_num() * memory_size : nullptr;
    return Row{call.codes + at * call.source.channels, scale + at * groups, zero_point + at * groups, own};
  };
  const int64_t image_pixels = s.channels ? p.image_bytes / s.channels : 0, end = s.batch * image_pixels;
  if (groups) memset(scale + end * groups, 0, g.zero_point - g.scale - end * groups * sizeof(float));
#pragma omp parallel for collapse(2) num_threads(call.threads) schedule(static)
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = call.per_sample ? b : 0;
      const Quantizer quantizer =
          groups ? Quantizer(1, 1, 0, call.top[at]) : Quantizer(call.scale, call.zero_point, call.top, at);
      const int32_t zero = quantizer.zero_point;
      const int64_t start = b * image_pixels + p.left + r * p.row_pixels;
      const int64_t frame = r / frame_rows - p.front, y = r % frame_rows - p.top;
      if (r == 0) clear(row_at(b * image_pixels), s.channels, groups, p.left, zero);
      if (frame < 0 || frame >= s.frames || y < 0 || y >= s.height) {
        clear(row_at(start), s.channels, groups, p.row_pixels, zero);
        continue;
      }
      const float* own = call.smoothing ? inverse.data() + (call.per_sample ? b * s.channels : 0) : nullptr;
      const int64_t norm = b * call.norm_image;
      const int64_t from = b * s.image + frame * s.frame + y / s.scale * s.row;
      const bool found = make(call, from, call.multiply + norm, call.add + norm, own, quantizer, row_at(start));
      if (found) {
#pragma omp atomic write
        nan[b] = 1;
      }
      clear(row_at(start + s.width), s.channels, groups, p.row_pixels - s.width, zero);
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
