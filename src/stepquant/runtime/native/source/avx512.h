// The lanes of lanes.h in AVX-512 registers.
#pragma once

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Mask { __mmask16 bits; };

inline Mask first(int64_t count) { return {count >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << count) - 1)}; }
inline Mask none() { return {0}; }

inline Floats set(float x) { return {_mm512_set1_ps(x)}; }
inline Ints set(int32_t x) { return {_mm512_set1_epi32(x)}; }

inline Floats load(const float* x) { return {_mm512_loadu_ps(x)}; }
inline Ints load(const int32_t* x) { return {_mm512_loadu_si512(x)}; }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x.v); }

// Lanes outside of the mask are 0 and neither read nor written.
inline Floats load(Mask mask, const float* x) { return {_mm512_maskz_loadu_ps(mask.bits, x)}; }
inline Floats load_half(Mask mask, const uint16_t* x) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask.bits, x))}; }
inline Ints load_words(Mask mask, const uint16_t* x) { return {_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask.bits, x))}; }
inline void store(Mask mask, float* to, Floats x) { _mm512_mask_storeu_ps(to, mask.bits, x.v); }
inline void store_half(Mask mask, uint16_t* to, Floats x) {
  _mm256_mask_storeu_epi16(to, mask.bits, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_words(Mask mask, uint16_t* to, Ints x) { _mm256_mask_storeu_epi16(to, mask.bits, _mm512_cvtepi32_epi16(x.v)); }
inline void store_bytes(Mask mask, uint8_t* to, Ints x) { _mm_mask_storeu_epi8(to, mask.bits, _mm512_cvtepi32_epi8(x.v)); }

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }   // a b + c
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats abs(Floats x) { return {_mm512_abs_ps(x.v)}; }
inline Floats round(Floats x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats times_power(Floats x, Floats whole) { return {_mm512_scalef_ps(x.v, whole.v)}; }  // x 2^whole
inline Floats reciprocal(Floats x) {  // one Newton step takes 14 bits to 28
  const __m512 r = _mm512_rcp14_ps(x.v);
  return {_mm512_mul_ps(r, _mm512_fnmadd_ps(x.v, r, _mm512_set1_ps(2.0f)))};
}
inline Floats where_negative(Floats x, Floats yes, Floats no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OS), no.v, yes.v)};
}
inline Floats keep(Mask mask, Floats x) { return {_mm512_maskz_mov_ps(mask.bits, x.v)}; }
inline Floats keep(Mask mask, Floats x, Floats other) { return {_mm512_mask_mov_ps(other.v, mask.bits, x.v)}; }
inline bool has_nan(Mask mask, Floats x) { return (_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q) & mask.bits) != 0; }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x.v); }
inline float lane(Floats x) { return _mm512_cvtss_f32(x.v); }  // the first one
inline float largest(Floats x) { return _mm512_reduce_max_ps(x.v); }

inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints times_words(Ints a, Ints b) { return {_mm512_madd_epi16(a.v, b.v)}; }  // for a of 0 to 32767, b of 16 bits
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int BITS> Ints shifted_left(Ints x) { return {_mm512_slli_epi32(x.v, BITS)}; }
template <int BITS> Ints shifted_right(Ints x) { return {_mm512_srli_epi32(x.v, BITS)}; }
inline Ints keep(Mask mask, Ints x) { return {_mm512_maskz_mov_epi32(mask.bits, x.v)}; }
inline Ints keep(Mask mask, Ints x, Ints other) { return {_mm512_mask_mov_epi32(other.v, mask.bits, x.v)}; }
inline bool any_negative(Ints x) { return _mm512_movepi32_mask(x.v) != 0; }
inline int32_t sum(Ints x) { return _mm512_reduce_add_epi32(x.v); }
inline int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x.v); }

inline Floats to_floats(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Ints to_ints(Floats x) { return {_mm512_cvtps_epi32(x.v)}; }
inline Floats as_floats(Ints x) { return {_mm512_castsi512_ps(x.v)}; }
inline Ints as_ints(Floats x) { return {_mm512_castps_si512(x.v)}; }

// Bytes.
inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// Writes code - 128 of up to 64 codes, four bytes to every 64th byte of a tile; 0 beyond `count`.
inline void spread_fours(const uint8_t* codes, int64_t count, int8_t* tile) {
  const __m512i down = _mm512_set_epi32(960, 896, 832, 768, 704, 640, 576, 512, 448, 384, 320, 256, 192, 128, 64, 0);
  const __m512i row = _mm512_maskz_loadu_epi8(first_bytes(count), codes);
  const __m512i middle = _mm512_maskz_mov_epi8(first_bytes(count), _mm512_set1_epi8((char)128));
  _mm512_i32scatter_epi32(tile, down, _mm512_xor_si512(row, middle), 1);
}

// Sums bytes.
struct ByteSum {
  __m512i v = _mm512_setzero_si512();
  void add(__m512i bytes) { v = _mm512_add_epi64(v, _mm512_sad_epu8(bytes, _mm512_setzero_si512())); }
  int32_t total() const { return (int32_t)_mm512_reduce_add_epi64(v); }
};

inline int32_t sum_of_bytes(const uint8_t* codes, int64_t size) {
  ByteSum sum;
  for (int64_t c = 0; c < size; c += 64) sum.add(_mm512_maskz_loadu_epi8(first_bytes(size - c), codes + c));
  return sum.total();
}

// Writes the lowest bytes of 64 integers of 0 to 255, in order, and adds them to `sum`.
inline void store_64_bytes(uint8_t* to, const Ints four[4], ByteSum& sum) {
  // To bytes, by quarters of each vector, and then the quarters in order.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i words = _mm512_packs_epi32(four[0].v, four[1].v), more = _mm512_packs_epi32(four[2].v, four[3].v);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more));
  sum.add(bytes);
  _mm512_storeu_si512(to, bytes);
}
