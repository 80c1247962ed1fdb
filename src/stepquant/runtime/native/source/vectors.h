// Sixteen floats at a time: load and store float32, float16 and bfloat16, the exponential, activations, quantization.
#pragma once
#include "intrinsics.h"

#include <cstdint>
#include <cstring>

enum Type : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

static inline int64_t bytes_of(int32_t type) { return type == FLOAT32 ? 4 : 2; }

static inline __mmask16 first(int64_t count) { return count >= 16 ? 0xFFFF : (__mmask16)((1u << count) - 1); }

// Elements [index, index + 16) of x; those outside the mask are 0 and not read.
static inline __m512 load16(const void* x, int32_t type, int64_t index, __mmask16 mask) {
  if (type == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float*)x + index);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)x + index);
  if (type == FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void store16(void* x, int32_t type, int64_t index, __mmask16 mask, __m512 value) {
  if (type == FLOAT32) {
    _mm512_mask_storeu_ps((float*)x + index, mask, value);
    return;
  }
  __m256i half;
  if (type == FLOAT16) {
    half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {  // round to nearest even in integers: not every CPU with VNNI has the instruction
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  _mm256_mask_storeu_epi16((uint16_t*)x + index, mask, half);
}

// 2^x to float32 accuracy; x is clamped from below to -126.
static inline __m512 exp2_16_below(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.54035304e-4f);  // the Taylor series of 2^f: on [-1/2, 1/2] its error is below 1e-7
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.33335581e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.61812911e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55041087e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40226507e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93147181e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

// The same; x is clamped to [-126, 126].
static inline __m512 exp2_16(__m512 x) { return exp2_16_below(_mm512_min_ps(x, _mm512_set1_ps(126.0f))); }

static inline __m512 reciprocal(__m512 x) {  // one Newton step takes 14 bits to 28
  const __m512 r = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.0f)));
}

static inline __m512 silu(__m512 x) {
  const __m512 e = exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(e, _mm512_set1_ps(1.0f))));
}

// GELU's approximation by tanh: x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
static inline __m512 gelu_tanh(__m512 x) {
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
  const __m512 u = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-2.0f * 0.797884561f * 1.44269504f));
  return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(exp2_16(u), _mm512_set1_ps(1.0f))));
}

// x (1 + erf(x / sqrt(2))) / 2; erf by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
static inline __m512 gelu(__m512 x) {
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.707106781f));
  const __m512 t = reciprocal(_mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
  __m512 y = _mm512_set1_ps(1.061405429f);
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-1.453152027f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.421413741f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.284496736f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.254829592f));
  const __m512 e = exp2_16(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.44269504f)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(y, t), e), _mm512_set1_ps(0.5f));  // erfc(z) / 2
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OS);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, (__mmask16)~negative, _mm512_set1_ps(1.0f), tail));
}

// The grid of one sample. A code is clamp(round(x * (1 / scale)) + zero_point, 0, top), in an int32 lane; that of NaN is
// negative, and its lowest byte is the zero point.
struct Quantizer {
  __m512 inverse, low, high;
  __m512i zero;
  float scale;
  int32_t zero_point;

  Quantizer(const float* scales, const int32_t* zero_points, int64_t at, int32_t top) {
    scale = scales[at], zero_point = zero_points[at];
    inverse = _mm512_set1_ps(1.0f / scale);
    low = _mm512_set1_ps((float)-zero_point), high = _mm512_set1_ps((float)(top - zero_point));
    zero = _mm512_set1_epi32(zero_point);
  }

  __m512i operator()(__m512 x) const { return (*this)(x, inverse); }

  // With a separate reciprocal for each lane. Clamped before it is rounded, which the integer bounds allow, so that no
  // value is too large for an int32. Of two operands the maximum and minimum return the second if one is NaN, so NaN
  // passes, and converts to INT32_MIN.
  __m512i operator()(__m512 x, __m512 reciprocals) const {
    const __m512 steps = _mm512_min_ps(high, _mm512_max_ps(low, _mm512_mul_ps(x, reciprocals)));
    return _mm512_add_epi32(_mm512_cvtps_epi32(steps), zero);
  }
};

// Codes are stored, and combined in `seen`, where `any_nan` finds the negative ones.
static inline void store_codes(uint8_t* to, __mmask16 mask, __m512i codes, __m512i& seen) {
  seen = _mm512_mask_or_epi32(seen, mask, seen, codes);
  _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8(codes));
}

static inline bool any_nan(__m512i seen) { return _mm512_test_epi32_mask(seen, _mm512_set1_epi32(INT32_MIN)) != 0; }
