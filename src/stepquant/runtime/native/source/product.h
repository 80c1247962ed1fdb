// The inner loop: 32 rows of unsigned codes times 32 columns of signed weights, in 32-bit integers.
//
// Rows are read in place in pieces of 64 or fewer bytes, one row every `stride` bytes. Columns are packed in tiles of 64 x 16 with
// four consecutive products of a column adjacent, as both the AMX and the VNNI instructions take them.
#pragma once
#include "call.h"
#include "vectors.h"

constexpr int64_t TILE = 1024;  // bytes of a packed tile: 16 fours x 16 columns x 4; with 8 fours, half as many

struct Operand {
  const uint8_t* rows[2];   // first byte of the two tiles of 16 rows
  int64_t stride;           // bytes from one row to the next
  const int64_t* taps;      // offset of each run of bytes from a row's first byte
  int64_t tap_count;
  int64_t pieces;           // of a run
  int64_t step;             // bytes from one piece to the next
  int64_t fours = 16;       // of bytes that are multiplied of a piece; at least 8, and 16 for AMX
};

struct Columns {
  const int8_t* tiles[2];       // first packed tile of the two tiles of 16 columns
  const int32_t* initial[2][2]; // [row tile][column tile] -> initial values of a row's 16 accumulators
};

struct Sums {
  int32_t* first;        // of the upper left tile, [16][16]
  int64_t stride;        // int32s from one row to the next
  int64_t right, lower;  // int32s to the tile on its right, and to the tile below
};

// int32 [2 row tiles][2 column tiles][16][16].
static inline Sums four_tiles(int32_t* sums) { return {sums, 16, 256, 512}; }

using Product = void (*)(const Operand&, const Columns&, const Sums&);

// What is added up in float32 where rows have scales and zero points: over taps and runs,
//   (sum of code * weight + zero point * minus) * scale * weight scale.
struct Runs {
  const Run* runs;
  int64_t count;
  const float* minus;           // [taps][runs][wide], from the first of the 32 columns on
  const float* weight_scale;    // [runs][wide], or null
  int64_t wide;
  const float *scale[2], *zero_point[2];  // of the first row of each tile
  int64_t row_grids;            // from one row to the next
  const int64_t* tap_grids;     // from a row to what it reads at a tap
};

// Adds 16 columns of one row: one rounding of the integers, and none while they are below 2^24.
static inline Floats add_run(Ints sum, float scale, float zero_point, const float* minus, const float* weight_scale, Floats total) {
  Floats v = fma(set(zero_point), load(minus), to_floats(sum));
  if (weight_scale) v = v * load(weight_scale);
  return fma(v, set(scale), total);
}

// Writes float [2 row tiles][2 column tiles][16][16], from the packed columns in `tiles`.
using RunsProduct = void (*)(const Operand&, const int8_t* const tiles[2], const Runs&, float* totals);

// Instructions beyond those that the library is compiled for; see build.py.
enum Extension : int32_t { NO_EXTENSION = 0, AMX_INT8 = 1, AVX_VNNI = 2 };

// The fastest product of codes up to `top` and weights from -`weight` to `weight` (128: any).
Product product_for(int32_t extension, int32_t top, int32_t weight);
RunsProduct runs_product_for(int32_t extension, int32_t top, int32_t weight);  // or null: none is faster than `Product`
void begin_products(int32_t extension);  // on each thread, before its first product
void end_products(int32_t extension);
