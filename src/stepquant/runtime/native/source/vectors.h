// Sixteen floats at a time: load and store float32, float16 and bfloat16, the exponential, activations, quantization.
#pragma once
#include "lanes.h"

enum Type : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// Elements [index, index + 16) of x; those outside the mask are 0 and not read.
static inline Floats load16(const void* x, int32_t type, int64_t index, Mask mask) {
  if (type == FLOAT32) return load(mask, (const float*)x + index);
  if (type == FLOAT16) return load_half(mask, (const uint16_t*)x + index);
  return as_floats(shifted_left<16>(load_words(mask, (const uint16_t*)x + index)));
}

static inline void store16(void* x, int32_t type, int64_t index, Mask mask, Floats value) {
  if (type == FLOAT32) {
    store(mask, (float*)x + index, value);
  } else if (type == FLOAT16) {
    store_half(mask, (uint16_t*)x + index, value);
  } else {  // round to nearest even in integers: not every CPU with VNNI has the instruction
    const Ints bits = as_ints(value), odd = shifted_right<16>(bits) & set(1);
    store_words(mask, (uint16_t*)x + index, shifted_right<16>(bits + odd + set(0x7FFF)));
  }
}

// 2^x to float32 accuracy; x is clamped from below to -126.
static inline Floats exp2_16_below(Floats x) {
  x = max(x, set(-126.0f));
  const Floats whole = round(x), f = x - whole;
  Floats y = set(1.54035304e-4f);  // the Taylor series of 2^f: on [-1/2, 1/2] its error is below 1e-7
  y = fma(y, f, set(1.33335581e-3f));
  y = fma(y, f, set(9.61812911e-3f));
  y = fma(y, f, set(5.55041087e-2f));
  y = fma(y, f, set(2.40226507e-1f));
  y = fma(y, f, set(6.93147181e-1f));
  y = fma(y, f, set(1.0f));
  return times_power(y, whole);
}

// The same; x is clamped to [-126, 126].
static inline Floats exp2_16(Floats x) { return exp2_16_below(min(x, set(126.0f))); }

static inline Floats silu(Floats x) { return x * reciprocal(exp2_16(x * set(-1.44269504f)) + set(1.0f)); }

// GELU's approximation by tanh: x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
static inline Floats gelu_tanh(Floats x) {
  const Floats cubic = fma(x * x, set(0.044715f), set(1.0f));
  const Floats u = (x * cubic) * set(-2.0f * 0.797884561f * 1.44269504f);
  return x * reciprocal(exp2_16(u) + set(1.0f));
}

// x (1 + erf(x / sqrt(2))) / 2; erf by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
static inline Floats gelu(Floats x) {
  const Floats z = abs(x) * set(0.707106781f);
  const Floats t = reciprocal(fma(z, set(0.3275911f), set(1.0f)));
  Floats y = set(1.061405429f);
  y = fma(y, t, set(-1.453152027f));
  y = fma(y, t, set(1.421413741f));
  y = fma(y, t, set(-0.284496736f));
  y = fma(y, t, set(0.254829592f));
  const Floats e = exp2_16((z * z) * set(-1.44269504f));
  const Floats tail = ((y * t) * e) * set(0.5f);  // erfc(z) / 2
  return x * where_negative(x, tail, set(1.0f) - tail);
}

static inline float smallest(Floats x) { return -largest(set(0.0f) - x); }

// In each lane, the grid whose range is [low, high], which holds 0: `affine_from_range` of stepquant.core.affine.
struct Range {
  Floats scale, inverse, zero_point;

  Range(Floats low, Floats high, int32_t top) {
    const Floats most = set((float)top), spread = high - low;
    // A spread beyond the largest float is divided in parts.
    scale = where_negative(set(__FLT_MAX__) - spread, high / most - low / most, spread / most);
    scale = max(set(1e-8f), scale);
    inverse = set(1.0f) / scale;
    zero_point = min(most, max(set(0.0f), round((set(0.0f) - low) / scale)));
  }
};

// One grid. A code is clamp(round(x * (1 / scale)) + zero_point, 0, top), in an int32 lane; that of NaN is
// negative, and its lowest byte is the zero point.
struct Quantizer {
  Floats inverse, low, high;
  Ints zero;
  float scale;
  int32_t zero_point, top;

  Quantizer(const float* scales, const int32_t* zero_points, const int32_t* tops, int64_t at)
      : Quantizer(scales[at], 1.0f / scales[at], zero_points[at], tops[at]) {}

  Quantizer(float scale, float reciprocal, int32_t zero_point, int32_t top)
      : inverse(set(reciprocal)), low(set((float)-zero_point)), high(set((float)(top - zero_point))),
        zero(set(zero_point)), scale(scale), zero_point(zero_point), top(top) {}

  Ints operator()(Floats x) const { return (*this)(x, inverse); }

  // With a separate reciprocal for each lane. Clamped before it is rounded, which the integer bounds allow, so that no
  // value is too large for an int32. NaN passes, as the second operand of minimum and maximum, and becomes INT32_MIN.
  Ints operator()(Floats x, Floats reciprocals) const { return to_ints(min(high, max(low, x * reciprocals))) + zero; }
};

// Codes are stored, and combined in `seen`, where `any_nan` finds the negative ones.
static inline void store_codes(uint8_t* to, Mask mask, Ints codes, Ints& seen) {
  seen = keep(mask, seen | codes, seen);
  store_bytes(mask, to, codes);
}

static inline bool any_nan(Ints seen) { return any_negative(seen); }
