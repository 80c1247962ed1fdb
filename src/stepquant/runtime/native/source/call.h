// Arguments of the exported functions. library.py declares the same fields, layouts.cpp lists them, and loading compares
// the two. Null pointers mean "none".
#pragma once
#include <cstdint>

struct Plane {  // where the codes of one image are written; see plan.py
  int64_t image_bytes, row_pixels;
  int64_t front, back;        // border frames
  int64_t top, bottom, left;  // border pixels; the gap between two rows is row_pixels - width
  int64_t nan;                // bytes from the codes to [batch] flags: whether an image has a NaN
};

struct Source {
  int32_t type;
  int32_t scale;                             // 2: every pixel is repeated in both directions
  int64_t image, frame, row, pixel;          // strides in elements; channels are adjacent
  int64_t batch, frames, height, width, channels;  // of the codes, without the border
  int64_t gate;                              // elements from a value to its gate (GEGLU)
};

struct Grids {  // of dynamic activations: one for each group of channels of each pixel
  int64_t channels;           // of a group; 0: the grids are those of `Call`
  int64_t groups;             // of a pixel
  int64_t scale, zero_point;  // bytes from the codes to float [pixels with borders, groups]; a border has scale 0
};

struct Run {  // input channels that share their scales
  int64_t first;   // byte within a pixel
  int64_t pieces;  // of the packed weight
  int64_t grid;    // group of the activation
};

struct Layer {
  const int8_t* weight;         // packed [tiles of 16 outputs, even][taps][pieces][fours][16][4]; 4-bit codes take half the bytes
  const uint8_t* zero_point;    // [runs, outputs rounded up to 32] of 4-bit codes, two codes to a byte; null for int8 weights
  const int32_t* weight_sum;    // [outputs rounded up to 32]
  const float* weight_scale;    // [outputs rounded up to 32]
  const float* bias;            // [outputs rounded up to 32]
  const int64_t* taps;          // byte offsets
  const int64_t* starts;        // bytes from a window's first byte to the first channel of each 32 outputs; null: 0
  const Run* runs;              // one, or for dynamic activations several whose pieces sum up to `pieces`
  const float* run_sum;         // for dynamic activations: minus the sum of weights, [taps, runs, outputs rounded up to 32]
  const float* run_scale;       // [runs, outputs rounded up to 32], or null if all runs have `weight_scale`
  int64_t tap_count, run_count, pieces, outputs;
  int64_t fours;                // of a piece: 16, or 8
  int64_t largest;              // at most 128: no weight is outside of -largest to largest
};

struct Positions {
  int64_t batch, frames;
  int64_t image_bytes;                        // of the codes
  int64_t frame_bytes, row_bytes, pixel_bytes;  // in the codes, from one output frame, row or pixel to the next
  int64_t height, width;                      // of the output
  int64_t flat;                               // > 0: rows have `flat` positions, and tiles cross their ends
};

enum Activation : int32_t { NONE, SILU, GELU, GELU_TANH, GEGLU };

struct Call {
  // Set for each call.
  const void* x;
  const float* scale;          // [batch] or [1]; null if `grids` are dynamic
  const int32_t* zero_point;   // [batch] or [1]
  const int32_t* top;          // [batch] or [1], the largest code
  const float *multiply, *add; // [batch or 1, channels] of a normalization
  uint8_t* codes;
  void* y;
  const float* channel_add;    // [batch, outputs], added after the bias
  const float* gate;           // [batch, outputs], multiplied before the residual is added
  const void* residual;        // [batch, height, width, outputs]; may be y
  // The same for every call of one plan.
  const float* smoothing;      // [channels], divides the input first; the reciprocals if `grids` are dynamic
  Source source;
  Plane plane;
  Grids grids;
  Layer layer;
  Positions positions;
  int32_t per_sample;          // whether each sample has its own grid
  int64_t norm_image;          // elements of `multiply` and `add` from one sample to the next
  float epsilon;               // of a layer normalization, which normalizes each pixel's channels first; else 0
  int32_t activation;
  int32_t y_type, residual_type;
  float factor;                // multiplies the result
  int32_t extension, threads;
};

struct GroupNorm {  // of x [batch, pixels, channels], written as x * multiply + add
  const void* x;
  const float *weight, *bias;  // [channels]
  float *multiply, *add;       // [batch, channels]
  int32_t type;
  float epsilon;
  int64_t image, pixel;        // strides in elements; channels are adjacent
  int64_t batch, pixels, channels, groups;
  int32_t threads;
};

struct Join {  // concatenates two images along their channels
  const void* x[2];
  void* y;
  int64_t bytes[2];            // per pixel
  int64_t pixels;
  int32_t threads;
};

struct Heads {  // float [batch, length, heads, size]; channels are adjacent
  const void* x;
  int32_t type;
  int64_t image, row, head;  // strides in elements
};

struct OperandGrid {
  const float* scale;         // [batch] or [1]; null in all four if the grids are dynamic
  const int32_t* zero_point;  // [batch] or [1]
  const int32_t* top;         // [batch] or [1]
  int32_t per_sample;
};

struct Attention {
  Heads query, key, value;
  OperandGrid grids[4];  // query, key, value, probability
  const float* mask;     // additive
  int64_t mask_image, mask_head, mask_row;
  void* y;
  int32_t y_type;
  int64_t y_image, y_row, y_head;
  int64_t batch, heads, length, key_length, size;
  int64_t key_heads;     // divides heads: query head h uses head h / (heads / key_heads) of key and value
  float factor;          // multiplies the scores: 1 / sqrt(size)
  int32_t extension, threads;
};

enum Kind : int64_t { LAYER, GROUP_NORM, ATTENTION, JOIN };

struct Step {
  int64_t kind, at;  // at: bytes from the first structure to this one
};

struct Pointer {
  int64_t at;      // bytes from the first structure to the field
  int64_t slot;    // which memory the field points into
  int64_t offset;  // bytes from the beginning of that memory
  int64_t by_row;  // more bytes for each row of the tables
};

// Each returns 0, or 1 if there is not enough memory.
extern "C" {
int32_t sq_codes(const Call*);
int32_t sq_layer(const Call*);
int32_t sq_group_norm(const GroupNorm*);
int32_t sq_attention(const Attention*);
int32_t sq_join(const Join*);
}
