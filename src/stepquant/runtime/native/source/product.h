// The one inner loop: a block of 32 rows of unsigned codes times 32 columns of signed weights, in 32-bit integers.
//
// Rows are 64-byte pieces read where they lie, one row `stride` bytes behind the other; columns are packed in tiles of
// 64 x 16, four consecutive products of a column side by side, which is what both AMX and VNNI instructions take.
#pragma once
#include "vectors.h"

constexpr int64_t TILE = 1024;  // bytes of a packed tile: 16 fours x 16 columns x 4

struct Operand {
  const uint8_t* rows[2];   // first byte of the two tiles of 16 rows
  int64_t stride;           // bytes from a row to the next
  const int64_t* taps;      // offset of each run of bytes from a row's first byte
  int64_t tap_count;
  int64_t pieces;           // 64-byte pieces of a run
  int64_t step;             // bytes from a piece to the next
};

struct Columns {
  const int8_t* tiles[2];       // first packed tile of the two tiles of 16 columns
  const int32_t* initial[2][2]; // [row tile][column tile] -> 16 values that the accumulators of every row start from
};

struct Sums {
  int32_t* first;        // of the upper left tile, [16][16]
  int64_t stride;        // int32s from a row to the next
  int64_t right, lower;  // to the tile beside it, and the one below
};

// int32 [2 row tiles][2 column tiles][16][16].
static inline Sums four_tiles(int32_t* sums) { return {sums, 16, 256, 512}; }

using Product = void (*)(const Operand&, const Columns&, const Sums&);

Product product_for(bool amx);
void begin_products(bool amx);  // on each thread, before its first product
void end_products(bool amx);
