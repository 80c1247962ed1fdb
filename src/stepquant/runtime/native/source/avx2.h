// The lanes of lanes.h in pairs of AVX2 registers.
#pragma once
#include <algorithm>

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Mask { int64_t count; };  // the first `count` lanes, 0 to 16

inline Mask first(int64_t count) { return {std::min<int64_t>(count, 16)}; }
inline Mask none() { return {0}; }
inline Ints lanes_of(Mask mask) {  // -1 in the lanes of the mask
  const __m256i count = _mm256_set1_epi32((int)mask.count), index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_cmpgt_epi32(count, index), _mm256_cmpgt_epi32(count, _mm256_add_epi32(index, _mm256_set1_epi32(8)))};
}

inline Floats set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

inline Floats load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline Ints load(const int32_t* x) { return {_mm256_loadu_si256((const __m256i*)x), _mm256_loadu_si256((const __m256i*)x + 1)}; }
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x.a), _mm256_storeu_ps(to + 8, x.b); }
inline void store(int32_t* to, Ints x) { _mm256_storeu_si256((__m256i*)to, x.a), _mm256_storeu_si256((__m256i*)to + 1, x.b); }

// A whole vector at `x`, or a copy of the elements of the mask followed by zeros.
template <typename Element>
struct Padded {
  Element copy[16];
  const Element* data;
  Padded(Mask mask, const Element* x) : data(x) {
    if (mask.count == 16) return;
    memset(copy, 0, sizeof(copy));
    memcpy(copy, x, mask.count * sizeof(Element));
    data = copy;
  }
};

inline Floats load(Mask mask, const float* x) {
  if (mask.count == 16) return load(x);
  const Ints lanes = lanes_of(mask);
  return {_mm256_maskload_ps(x, lanes.a), _mm256_maskload_ps(x + 8, lanes.b)};
}
inline Floats load_half(Mask mask, const uint16_t* x) {
  const Padded<uint16_t> words(mask, x);
  const __m128i* from = (const __m128i*)words.data;
  return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
}
inline Ints load_words(Mask mask, const uint16_t* x) {
  const Padded<uint16_t> words(mask, x);
  const __m128i* from = (const __m128i*)words.data;
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), _mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1))};
}
inline void store(Mask mask, float* to, Floats x) {
  if (mask.count == 16) return store(to, x);
  const Ints lanes = lanes_of(mask);
  _mm256_maskstore_ps(to, lanes.a, x.a), _mm256_maskstore_ps(to + 8, lanes.b, x.b);
}
inline void store_16_words(Mask mask, uint16_t* to, __m128i low, __m128i high) {
  alignas(16) __m128i words[2] = {low, high};
  if (mask.count == 16) {
    _mm_storeu_si128((__m128i*)to, low), _mm_storeu_si128((__m128i*)to + 1, high);
  } else {
    memcpy(to, words, mask.count * 2);
  }
}
inline void store_half(Mask mask, uint16_t* to, Floats x) {
  store_16_words(mask, to, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i words_of(Ints x) {  // of 16 integers of 0 to 65535
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xD8);
}
inline void store_words(Mask mask, uint16_t* to, Ints x) {
  const __m256i words = words_of(x);
  store_16_words(mask, to, _mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline void store_bytes(Mask mask, uint8_t* to, Ints x) {
  const __m256i lowest = _mm256_set1_epi32(0xFF);
  const __m256i words = words_of({_mm256_and_si256(x.a, lowest), _mm256_and_si256(x.b, lowest)});
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (mask.count == 16) {
    _mm_storeu_si128((__m128i*)to, bytes);
  } else {
    memcpy(to, &bytes, mask.count);
  }
}

inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Floats round(Floats x) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, NEAREST), _mm256_round_ps(x.b, NEAREST)};
}
inline __m256 times_power(__m256 x, __m256 whole) {  // x 2^whole, for whole of -126 to 127
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats times_power(Floats x, Floats whole) { return {times_power(x.a, whole.a), times_power(x.b, whole.b)}; }
inline Floats reciprocal(Floats x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return {_mm256_div_ps(one, x.a), _mm256_div_ps(one, x.b)};
}
inline Floats where_negative(Floats x, Floats yes, Floats no) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, zero, _CMP_LT_OS)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, zero, _CMP_LT_OS))};
}
inline Floats keep(Mask mask, Floats x, Floats other) {
  if (mask.count == 16) return x;
  const Ints lanes = lanes_of(mask);
  return {_mm256_blendv_ps(other.a, x.a, _mm256_castsi256_ps(lanes.a)), _mm256_blendv_ps(other.b, x.b, _mm256_castsi256_ps(lanes.b))};
}
inline Floats keep(Mask mask, Floats x) { return keep(mask, x, set(0.0f)); }
inline bool has_nan(Mask mask, Floats x) {
  const Ints lanes = lanes_of(mask);
  const __m256 a = _mm256_and_ps(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_castsi256_ps(lanes.a));
  const __m256 b = _mm256_and_ps(_mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q), _mm256_castsi256_ps(lanes.b));
  return _mm256_movemask_ps(_mm256_or_ps(a, b)) != 0;
}
inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float lane(Floats x) { return _mm256_cvtss_f32(x.a); }  // the first one
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Ints times_words(Ints x, Ints y) { return {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)}; }
inline Ints operator-(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline Ints operator&(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Ints operator|(Ints x, Ints y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Ints max(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int BITS> Ints shifted_left(Ints x) { return {_mm256_slli_epi32(x.a, BITS), _mm256_slli_epi32(x.b, BITS)}; }
template <int BITS> Ints shifted_right(Ints x) { return {_mm256_srli_epi32(x.a, BITS), _mm256_srli_epi32(x.b, BITS)}; }
inline Ints keep(Mask mask, Ints x) { return mask.count == 16 ? x : x & lanes_of(mask); }
inline Ints keep(Mask mask, Ints x, Ints other) {
  if (mask.count == 16) return x;
  const Ints lanes = lanes_of(mask);
  return {_mm256_blendv_epi8(other.a, x.a, lanes.a), _mm256_blendv_epi8(other.b, x.b, lanes.b)};
}
inline bool any_negative(Ints x) { return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(x.a, x.b))) != 0; }
inline int32_t sum(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
inline int32_t largest(Ints x) {
  const __m256i eight = _mm256_max_epi32(x.a, x.b);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Floats as_floats(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline Ints as_ints(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

// Sums bytes.
struct ByteSum {
  __m256i v = _mm256_setzero_si256();
  void add(__m256i bytes) { v = _mm256_add_epi64(v, _mm256_sad_epu8(bytes, _mm256_setzero_si256())); }
  int32_t total() const {
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return (int32_t)(_mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1));
  }
};

inline int32_t sum_of_bytes(const uint8_t* codes, int64_t size) {
  ByteSum sum;
  int64_t c = 0;
  for (; c + 32 <= size; c += 32) sum.add(_mm256_loadu_si256((const __m256i*)(codes + c)));
  int32_t total = sum.total();
  for (; c < size; c++) total += codes[c];
  return total;
}

// Writes code - 128 of up to 64 codes, four bytes to every 64th byte of a tile; 0 beyond `count`.
inline void spread_fours(const uint8_t* codes, int64_t count, int8_t* tile) {
  count = std::min<int64_t>(count, 64);
  for (int64_t c = 0; c < 64; c += 4) {
    uint32_t four = 0;
    const int64_t many = std::clamp<int64_t>(count - c, 0, 4);
    memcpy(&four, codes + c, many);
    four ^= (uint32_t)(0x80808080ull & ((1ull << many * 8) - 1));
    memcpy(tile + c * 16, &four, 4);
  }
}

// Writes the lowest bytes of 64 integers of 0 to 255, in order, and adds them to `sum`.
inline void store_64_bytes(uint8_t* to, const Ints four[4], ByteSum& sum) {
  for (int half = 0; half < 2; half++) {
    const Ints x = four[half * 2], y = four[half * 2 + 1];
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(x.a, x.b), _mm256_packus_epi32(y.a, y.b));
    const __m256i bytes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    sum.add(bytes);
    _mm256_storeu_si256((__m256i*)to + half, bytes);
  }
}
