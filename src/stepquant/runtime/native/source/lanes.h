// Sixteen lanes of float32 or int32 and 64 bytes: one register with AVX-512, two with AVX2. All kernels are written with
// these; only the inner loop of a product (product.cpp) knows the instruction set.
//
// Where two operands are compared and one is NaN, `min` and `max` return the second. `to_ints` rounds to nearest even and
// returns INT32_MIN for what an int32 cannot hold, NaN included.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif
