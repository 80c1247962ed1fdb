// The inner loop: 32 rows of unsigned codes times 32 columns of signed weights, in 32-bit integers.
//
// Rows are read in place in pieces of 64 or fewer bytes, one row every `stride` bytes. Columns are packed in tiles of 64 x 16 with
// four consecutive products of a column adjacent, as both the AMX and the VNNI instructions take them.
#pragma once
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

// Instructions beyond those that the library is compiled for; see build.py.
enum Extension : int32_t { NO_EXTENSION = 0, AMX_INT8 = 1, AVX_VNNI = 2 };

// The fastest product of codes up to `top` and weights from -`weight` to `weight` (128: any).
Product product_for(int32_t extension, int32_t top, int32_t weight);
void begin_products(int32_t extension);  // on each thread, before its first product
void end_products(int32_t extension);
