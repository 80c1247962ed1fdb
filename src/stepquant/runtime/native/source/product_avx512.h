// Products for AVX-512 VNNI and for AMX.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("amx-tile,amx-int8")))

AMX static void product_amx(const Operand& a, const Columns& b, const Sums& sums) {
  _tile_loadd(0, b.initial[0][0], 0);
  _tile_loadd(1, b.initial[0][1], 0);
  _tile_loadd(2, b.initial[1][0], 0);
  _tile_loadd(3, b.initial[1][1], 0);
  const int8_t *left = b.tiles[0], *right = b.tiles[1];
  for (int64_t tap = 0; tap < a.tap_count; tap++) {
    const uint8_t *upper = a.rows[0] + a.taps[tap], *lower = a.rows[1] + a.taps[tap];
    for (int64_t piece = 0; piece < a.pieces; piece++) {
      _tile_loadd(6, left, 64);
      _tile_loadd(4, upper, a.stride);
      _tile_loadd(7, right, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(5, lower, a.stride);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
      upper += a.step, lower += a.step, left += TILE, right += TILE;
    }
  }
  const int64_t stride = sums.stride * 4;
  _tile_stored(0, sums.first, stride);
  _tile_stored(1, sums.first + sums.right, stride);
  _tile_stored(2, sums.first + sums.lower, stride);
  _tile_stored(3, sums.first + sums.lower + sums.right, stride);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not a local variable: gcc's intrinsic does not declare that it reads all 64 bytes, so stores to a local are dropped.
static const TileConfig CONFIG;

AMX static void configure() { _tile_loadconfig(&CONFIG); }

AMX static void release() { _tile_release(); }

static void product_vnni(const Operand& a, const Columns& b, const Sums& sums) {
  for (int half = 0; half < 4; half++) {  // eight rows at a time, with sixteen accumulators
    const int tile = half / 2;
    const uint8_t* rows = a.rows[tile] + (half % 2) * 8 * a.stride;
    __m512i left[8], right[8];
    for (int r = 0; r < 8; r++) {
      left[r] = _mm512_loadu_si512(b.initial[tile][0]);
      right[r] = _mm512_loadu_si512(b.initial[tile][1]);
    }
    const int8_t *w0 = b.tiles[0], *w1 = b.tiles[1];
    for (int64_t tap = 0; tap < a.tap_count; tap++) {
      const uint8_t* x = rows + a.taps[tap];
      for (int64_t piece = 0; piece < a.pieces; piece++, x += a.step) {
        for (int64_t four = 0; four < 4 * a.fours; four += 4, w0 += 64, w1 += 64) {
          const __m512i v0 = _mm512_loadu_si512(w0), v1 = _mm512_loadu_si512(w1);
#pragma GCC unroll 8
          for (int r = 0; r < 8; r++) {
            int32_t codes;
            memcpy(&codes, x + four + r * a.stride, 4);
            const __m512i u = _mm512_set1_epi32(codes);
            left[r] = _mm512_dpbusd_epi32(left[r], u, v0);
            right[r] = _mm512_dpbusd_epi32(right[r], u, v1);
          }
        }
      }
    }
    int32_t* out = sums.first + tile * sums.lower + (half % 2) * 8 * sums.stride;
    for (int r = 0; r < 8; r++, out += sums.stride) {
      _mm512_storeu_si512(out, left[r]);
      _mm512_storeu_si512(out + sums.right, right[r]);
    }
  }
}

Product product_for(int32_t extension, int32_t, int32_t) { return extension == AMX_INT8 ? product_amx : product_vnni; }

RunsProduct runs_product_for(int32_t, int32_t, int32_t) { return nullptr; }

void begin_products(int32_t extension) {
  if (extension == AMX_INT8) configure();
}

void end_products(int32_t extension) {
  if (extension == AMX_INT8) release();
}

// Linux lets a process use the tile registers after it has requested them. Returns 1 if it may.
extern "C" int32_t sq_request_amx() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
