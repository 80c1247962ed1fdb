// Products for AVX2, with and without AVX-VNNI. All are exact.
#pragma once

namespace {

inline __m256i codes_at(const uint8_t* x) {
  int32_t codes;
  memcpy(&codes, x, 4);
  return _mm256_set1_epi32(codes);
}

// Any codes and weights: products of 16-bit integers, the even and the odd ones of every four in turn.
struct Words {
  static constexpr int ROWS = 4;  // that are multiplied at a time: with 16 columns, their sums fit into the registers
  Ints sum[ROWS];

  void add_piece(const uint8_t* x, int64_t stride, const int8_t* weights, int64_t fours) {
    const __m256i low = _mm256_set1_epi16(0xFF);
    for (int64_t start = 0; start < 4 * fours; start += 32) {
#pragma GCC unroll 8
      for (int64_t four = start; four < start + 32; four += 4, weights += 64) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i*)weights), w1 = _mm256_loadu_si256((const __m256i*)weights + 1);
        const __m256i even0 = _mm256_srai_epi16(_mm256_slli_epi16(w0, 8), 8), odd0 = _mm256_srai_epi16(w0, 8);
        const __m256i even1 = _mm256_srai_epi16(_mm256_slli_epi16(w1, 8), 8), odd1 = _mm256_srai_epi16(w1, 8);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          const __m256i codes = codes_at(x + four + r * stride);
          const __m256i even = _mm256_and_si256(codes, low), odd = _mm256_srli_epi16(codes, 8);
          sum[r] = sum[r] + Ints{_mm256_madd_epi16(even, even0), _mm256_madd_epi16(even, even1)};
          sum[r] = sum[r] + Ints{_mm256_madd_epi16(odd, odd0), _mm256_madd_epi16(odd, odd1)};
        }
      }
    }
  }
};

// Codes and weights so small that the sum of the products of `TOGETHER` fours, two and two, fits into 16 bits.
template <int TOGETHER>
struct Bytes {
  static_assert(8 % TOGETHER == 0, "a piece has 8 or 16 fours");
  static constexpr int ROWS = 2;  // their sums in 16 and in 32 bits fit into the registers
  Ints sum[ROWS];

  void add_piece(const uint8_t* x, int64_t stride, const int8_t* weights, int64_t fours) {
    const __m256i one = _mm256_set1_epi16(1);
    for (int64_t start = 0; start < 4 * fours; start += 4 * TOGETHER) {
      __m256i left[ROWS] = {}, right[ROWS] = {};
#pragma GCC unroll 1
      for (int64_t four = start; four < start + 4 * TOGETHER; four += 4, weights += 64) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i*)weights), w1 = _mm256_loadu_si256((const __m256i*)weights + 1);
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; r++) {
          const __m256i codes = codes_at(x + four + r * stride);
          left[r] = _mm256_add_epi16(left[r], _mm256_maddubs_epi16(codes, w0));
          right[r] = _mm256_add_epi16(right[r], _mm256_maddubs_epi16(codes, w1));
        }
      }
      for (int r = 0; r < ROWS; r++) sum[r] = sum[r] + Ints{_mm256_madd_epi16(left[r], one), _mm256_madd_epi16(right[r], one)};
    }
  }
};

template <typename Block>
void product(const Operand& a, const Columns& b, const Sums& sums) {
  for (int n = 0; n < 2; n++) {
    for (int first_row = 0; first_row < 32; first_row += Block::ROWS) {
      const int tile = first_row / 16, row = first_row % 16;
      Block block;
      for (Ints& sum : block.sum) sum = load(b.initial[tile][n]);
      const int8_t* weights = b.tiles[n];
      for (int64_t tap = 0; tap < a.tap_count; tap++) {
        const uint8_t* x = a.rows[tile] + row * a.stride + a.taps[tap];
        for (int64_t piece = 0; piece < a.pieces; piece++, x += a.step, weights += a.fours * 64) {
          block.add_piece(x, a.stride, weights, a.fours);
        }
      }
      int32_t* out = sums.first + tile * sums.lower + n * sums.right + row * sums.stride;
      for (const Ints& sum : block.sum) store(out, sum), out += sums.stride;
    }
  }
}

// The sums of a run stay in registers.
template <typename Block>
void runs_product(const Operand& a, const int8_t* const tiles[2], const Runs& r, float* totals) {
  for (int n = 0; n < 2; n++) {
    for (int first_row = 0; first_row < 32; first_row += Block::ROWS) {
      const int tile = first_row / 16, row = first_row % 16;
      const float *scales = r.scale[tile] + row * r.row_grids, *zero_points = r.zero_point[tile] + row * r.row_grids;
      const float* minus = r.minus + n * 16;
      const int8_t* weights = tiles[n];
      Floats total[Block::ROWS];
      for (Floats& each : total) each = set(0.0f);
      for (int64_t tap = 0; tap < a.tap_count; tap++) {
        for (int64_t i = 0; i < r.count; i++, minus += r.wide) {
          const uint8_t* x = a.rows[tile] + row * a.stride + a.taps[tap] + r.runs[i].first;
          Block block;
          for (Ints& sum : block.sum) sum = set(0);
          for (int64_t piece = 0; piece < r.runs[i].pieces; piece++, x += a.step, weights += a.fours * 64) {
            block.add_piece(x, a.stride, weights, a.fours);
          }
          const int64_t at = r.tap_grids[tap] + r.runs[i].grid;
          const float* weight_scale = r.weight_scale ? r.weight_scale + i * r.wide + n * 16 : nullptr;
          for (int k = 0; k < Block::ROWS; k++) {
            const int64_t grid = at + k * r.row_grids;
            total[k] = add_run(block.sum[k], scales[grid], zero_points[grid], minus, weight_scale, total[k]);
          }
        }
      }
      float* out = totals + (tile * 2 + n) * 256 + row * 16;
      for (const Floats& each : total) store(out, each), out += 16;
    }
  }
}

// The same loops: a function with more instructions is not inlined into one with fewer.
__attribute__((target("avx2,avxvnni"))) void product_avx_vnni(const Operand& a, const Columns& b, const Sums& sums) {
  constexpr int ROWS = 4;
  for (int part = 0; part < 32 / ROWS; part++) {
    const int tile = part / (16 / ROWS), row = part % (16 / ROWS) * ROWS;
    for (int n = 0; n < 2; n++) {
      const __m256i* initial = (const __m256i*)b.initial[tile][n];
      __m256i left[ROWS], right[ROWS];
      for (int r = 0; r < ROWS; r++) left[r] = _mm256_loadu_si256(initial), right[r] = _mm256_loadu_si256(initial + 1);
      const __m256i* w = (const __m256i*)b.tiles[n];
      for (int64_t tap = 0; tap < a.tap_count; tap++) {
        const uint8_t* x = a.rows[tile] + row * a.stride + a.taps[tap];
        for (int64_t piece = 0; piece < a.pieces; piece++, x += a.step) {
          for (int64_t four = 0; four < 4 * a.fours; four += 4, w += 2) {
            const __m256i w0 = _mm256_loadu_si256(w), w1 = _mm256_loadu_si256(w + 1);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
              int32_t codes;
              memcpy(&codes, x + four + r * a.stride, 4);
              const __m256i u = _mm256_set1_epi32(codes);
              left[r] = _mm256_dpbusd_avx_epi32(left[r], u, w0);
              right[r] = _mm256_dpbusd_avx_epi32(right[r], u, w1);
            }
          }
        }
      }
      int32_t* out = sums.first + tile * sums.lower + n * sums.right + row * sums.stride;
      for (int r = 0; r < ROWS; r++, out += sums.stride) {
        _mm256_storeu_si256((__m256i*)out, left[r]);
        _mm256_storeu_si256((__m256i*)out + 1, right[r]);
      }
    }
  }
}

}  // namespace

Product product_for(int32_t extension, int32_t top, int32_t weight) {
  if (extension == AVX_VNNI) return product_avx_vnni;
  const int together = INT16_MAX / (2 * top * weight);
  if (together >= 8) return product<Bytes<8>>;
  if (together >= 4) return product<Bytes<4>>;
  return together >= 2 ? product<Bytes<2>> : product<Words>;
}

RunsProduct runs_product_for(int32_t extension, int32_t top, int32_t weight) {
  if (extension == AVX_VNNI) return nullptr;
  const int together = INT16_MAX / (2 * top * weight);
  if (together >= 8) return runs_product<Bytes<8>>;
  if (together >= 4) return runs_product<Bytes<4>>;
  return together >= 2 ? runs_product<Bytes<2>> : runs_product<Words>;
}

void begin_products(int32_t) {}
void end_products(int32_t) {}
