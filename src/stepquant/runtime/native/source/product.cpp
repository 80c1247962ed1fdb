#include "product.h"

#ifdef __AVX512F__
#include "product_avx512.h"
#else
#include "product_avx2.h"
#endif
