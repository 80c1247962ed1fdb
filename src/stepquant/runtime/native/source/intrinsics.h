// AVX-512 intrinsics: the compiler's, or for tests on other CPUs those that SIMDe emulates.
#pragma once
#ifdef STEPQUANT_EMULATE
#include "emulated.h"
#else
#include <immintrin.h>
#endif
