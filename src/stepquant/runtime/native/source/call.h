// A layer with what is fused to it, as the two functions that run it take it. Field for field in library.py.
#pragma once
#include <cstdint>

struct Plane {  // where the codes of one image go; see _new_geometry() in kernel.py
  int64_t image_bytes, row_pixels;
  int64_t top, bottom, left;  // border pixels; the gap is row_pixels - width
};

struct Source {
  int32_t type;
  int32_t scale;                             // 2: every pixel is repeated in both directions
  int64_t image, row, pixel;                 // strides in elements; channels are adjacent
  int64_t batch, height, width, channels;    // of the codes, without border
  int64_t gate;                              // elements from a value to its gate, where the activation has one
};

struct Layer {
  const int8_t* weight;         // packed [tiles of 16 outputs, even][taps][pieces][16][16][4]; half as many bytes of codes
  const uint8_t* zero_point;    // of 4-bit codes, two to a byte: [outputs rounded up to 32]; or null
  const int32_t* weight_sum;    // [outputs rounded up to 32]
  const float* weight_scale;    // [outputs rounded up to 32]
  const float* bias;            // [outputs rounded up to 32], or null
  const int64_t* taps;          // byte offsets
  int64_t tap_count, pieces, outputs;
};

struct Positions {
  int64_t batch, image_bytes;                 // of the codes
  int64_t row_bytes, pixel_bytes;             // from an output row, or pixel, to the next: in the codes
  int64_t height, width;                      // of the output
  int64_t flat;                               // > 0: rows are `flat` positions long, and tiles run across their ends
};

enum Activation : int32_t { NONE, SILU, GELU, GELU_TANH, GEGLU };

struct Call {
  // Of this call alone; null where there is none.
  const void* x;
  const float* scale;          // [batch] or [1]
  const int32_t* zero_point;   // [batch] or [1]
  const float *multiply, *add; // [batch or 1, channels], of a normalization
  uint8_t* codes;
  void* y;
  const float* channel_add;    // [batch, outputs], added after the bias
  const float* gate;           // [batch, outputs], multiplied before the residual is added
  const void* residual;        // may be y
  // The same for every call of this shape.
  const float* smoothing;        // [channels], or null: divides the input first
  Source source;
  Plane plane;
  Layer layer;
  Positions positions;
  int32_t per_sample, top;     // grids
  int64_t norm_image;          // elements of `multiply` and `add` from a sample to the next
  float epsilon;               // 0: they are all of the normalization; else each pixel's channels are normalized first
  int32_t activation;
  int32_t y_type, residual_type;
  float factor;                // the result is multiplied by it
  int32_t amx, threads;
};

struct GroupNorm {  // of [batch, pixels, channels], as x * multiply + add
  const void* x;
  const float *weight, *bias;  // [channels]
  float *multiply, *add;       // [batch, channels]
  int32_t type;
  float epsilon;
  int64_t image, pixel;        // strides in elements; channels are adjacent
  int64_t batch, pixels, channels, groups;
  int32_t threads;
};

struct Join {  // the channels of two images in one
  const void* x[2];
  void* y;
  int64_t bytes[2];            // of a pixel
  int64_t pixels;
  int32_t threads;
};

struct Heads {  // float [batch, length, heads, size], channels adjacent
  const void* x;
  int32_t type;
  int64_t image, row, head;  // strides in elements
};

struct OperandGrid {
  const float* scale;         // [batch] or [1]
  const int32_t* zero_point;  // [batch] or [1]
  int32_t per_sample, top;
};

struct Attention {
  Heads query, key, value;
  OperandGrid grids[4];  // query, key, value, probability
  const float* mask;     // additive, or null
  int64_t mask_image, mask_head, mask_row;
  void* y;
  int32_t y_type;
  int64_t y_image, y_row, y_head;
  int64_t batch, heads, length, key_length, size;
  float factor;          // of the scores, 1 / sqrt(size)
  int32_t amx, threads;
};
