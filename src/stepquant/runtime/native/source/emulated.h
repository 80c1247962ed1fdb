// AVX-512 in plain C++ for tests on CPUs without it: SIMDe, and here the intrinsics that SIMDe lacks. Slow.
#pragma once
#include <immintrin.h>  // first, so that the aliases below replace the compiler's functions

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __m512 simde__m512
#define __m512i simde__m512i

namespace emulated {

template <typename Lane, typename Vector>
struct Lanes {  // a vector as an array
  static constexpr int COUNT = sizeof(Vector) / sizeof(Lane);
  Lane lane[COUNT] = {};

  Lanes() = default;
  explicit Lanes(const Vector& vector) { memcpy(lane, &vector, sizeof(vector)); }
  operator Vector() const {
    Vector vector;
    memcpy(&vector, lane, sizeof(vector));
    return vector;
  }
};

template <typename Lane, typename Vector>
Vector load(uint64_t mask, const void* from) {
  Lanes<Lane, Vector> result;
  for (int i = 0; i < result.COUNT; i++) {
    if (mask >> i & 1) memcpy(result.lane + i, (const Lane*)from + i, sizeof(Lane));
  }
  return result;
}

template <typename Lane, typename Vector>
void store(void* to, uint64_t mask, const Vector& vector) {
  const Lanes<Lane, Vector> values(vector);
  for (int i = 0; i < values.COUNT; i++) {
    if (mask >> i & 1) memcpy((Lane*)to + i, values.lane + i, sizeof(Lane));
  }
}

template <typename To, typename ToVector, typename From, typename FromVector, typename Convert>
ToVector convert(const FromVector& vector, Convert one) {
  const Lanes<From, FromVector> values(vector);
  Lanes<To, ToVector> result;
  for (int i = 0; i < result.COUNT; i++) result.lane[i] = one(values.lane[i]);
  return result;
}

// As the CPU does it: what an int32 cannot hold, NaN included, becomes its smallest value.
inline int32_t to_int32(float x) {
  return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)std::nearbyint(x) : INT32_MIN;
}

template <typename Lane, typename Vector, typename Join>
Lane reduce(const Vector& vector, Join join) {  // by halves, as compilers do it
  Lanes<Lane, Vector> values(vector);
  for (int many = values.COUNT / 2; many > 0; many /= 2) {
    for (int i = 0; i < many; i++) values.lane[i] = join(values.lane[i], values.lane[i + many]);
  }
  return values.lane[0];
}

inline void scatter(void* base, const __m512i& offsets, const __m512i& values, int scale) {
  const Lanes<int32_t, __m512i> at(offsets), value(values);
  for (int i = 0; i < 16; i++) memcpy((char*)base + (int64_t)at.lane[i] * scale, value.lane + i, 4);
}

}  // namespace emulated

#define _mm_maskz_loadu_epi8(mask, from) emulated::load<int8_t, __m128i>(mask, from)
#define _mm256_maskz_loadu_epi16(mask, from) emulated::load<int16_t, __m256i>(mask, from)
#define _mm512_maskz_loadu_epi8(mask, from) emulated::load<int8_t, __m512i>(mask, from)
#define _mm512_maskz_loadu_ps(mask, from) emulated::load<float, __m512>(mask, from)
#define _mm_mask_storeu_epi8(to, mask, x) emulated::store<int8_t>(to, mask, x)
#define _mm256_mask_storeu_epi16(to, mask, x) emulated::store<int16_t>(to, mask, x)
#define _mm512_mask_storeu_ps(to, mask, x) emulated::store<float>(to, mask, x)
#define _mm512_i32scatter_epi32(base, offsets, x, scale) emulated::scatter(base, offsets, x, scale)

#define _mm512_cvtepi32_ps(x) (emulated::convert<float, __m512, int32_t>(x, [](int32_t v) { return (float)v; }))
#define _mm512_cvtps_epi32(x) (emulated::convert<int32_t, __m512i, float>(x, emulated::to_int32))
#define _mm512_cvtepi32_epi8(x) (emulated::convert<int8_t, __m128i, int32_t>(x, [](int32_t v) { return (int8_t)v; }))
#define _mm512_cvtepi32_epi16(x) (emulated::convert<int16_t, __m256i, int32_t>(x, [](int32_t v) { return (int16_t)v; }))
#define _mm512_cvtepu8_epi32(x) (emulated::convert<int32_t, __m512i, uint8_t>(x, [](uint8_t v) { return (int32_t)v; }))
#define _mm512_cvtepu16_epi32(x) (emulated::convert<int32_t, __m512i, uint16_t>(x, [](uint16_t v) { return (int32_t)v; }))
#define _mm512_cvtph_ps(x) (emulated::convert<float, __m512, uint16_t>(x, [](uint16_t v) { return _cvtsh_ss(v); }))
#define _mm512_cvtps_ph(x, rounding) (emulated::convert<uint16_t, __m256i, float>(x, [](float v) { return _cvtss_sh(v, 0); }))
#define _mm512_rcp14_ps(x) (emulated::convert<float, __m512, float>(x, [](float v) { return 1.0f / v; }))

#define _mm512_reduce_add_ps(x) emulated::reduce<float>(x, [](float a, float b) { return a + b; })
#define _mm512_reduce_max_ps(x) emulated::reduce<float>(x, [](float a, float b) { return a > b ? a : b; })
#define _mm512_reduce_add_epi64(x) emulated::reduce<int64_t>(x, [](int64_t a, int64_t b) { return a + b; })
#define _mm512_reduce_max_epi32(x) emulated::reduce<int32_t>(x, [](int32_t a, int32_t b) { return a > b ? a : b; })
