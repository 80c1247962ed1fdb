// Size and fields of every structure in call.h as text, for library.py to compare with its own.
#include <cstddef>
#include <map>
#include <string>
#include <type_traits>

#include "call.h"

namespace {

// "size name@offset+size name@offset+size ..."
#define AT(field) (" " #field "@" + std::to_string(offsetof(S, field)) + "+" + std::to_string(sizeof(S::field)))
#define LAYOUT(structure, fields) {#structure, [] { using S = structure; return size_of<S>() + fields; }()}

template <typename S>
std::string size_of() {
  static_assert(std::is_standard_layout<S>::value, "offsetof needs a standard layout");
  return std::to_string(sizeof(S));
}

const std::map<std::string, std::string>& layouts() {
  static const std::map<std::string, std::string> all = {
      LAYOUT(Plane, AT(image_bytes) + AT(row_pixels) + AT(front) + AT(back) + AT(top) + AT(bottom) + AT(left) +
             AT(nan)),
      LAYOUT(Source, AT(type) + AT(scale) + AT(image) + AT(frame) + AT(row) + AT(pixel) + AT(batch) + AT(frames) +
             AT(height) + AT(width) + AT(channels) + AT(gate)),
      LAYOUT(Grids, AT(channels) + AT(groups) + AT(scale) + AT(zero_point)),
      LAYOUT(Layer, AT(weight) + AT(zero_point) + AT(weight_sum) + AT(weight_scale) + AT(bias) + AT(taps) + AT(starts) +
             AT(runs) + AT(run_sum) + AT(run_scale) + AT(tap_count) + AT(run_count) + AT(pieces) + AT(outputs) +
             AT(fours) + AT(largest)),
      LAYOUT(Positions, AT(batch) + AT(frames) + AT(image_bytes) + AT(frame_bytes) + AT(row_bytes) + AT(pixel_bytes) +
             AT(height) + AT(width) +
             AT(flat)),
      LAYOUT(Call, AT(x) + AT(scale) + AT(zero_point) + AT(top) + AT(multiply) + AT(add) + AT(codes) + AT(y) +
             AT(channel_add) + AT(gate) + AT(residual) + AT(smoothing) + AT(source) + AT(plane) +
             AT(grids) + AT(layer) +
             AT(positions) + AT(per_sample) + AT(norm_image) + AT(epsilon) + AT(activation) + AT(y_type)
             + AT(residual_type) + AT(factor) + AT(extension) + AT(threads)),
      LAYOUT(GroupNorm, AT(x) + AT(weight) + AT(bias) + AT(multiply) + AT(add) + AT(type) + AT(epsilon) +
             AT(image) + AT(pixel) + AT(batch) + AT(pixels) + AT(channels) + AT(groups) + AT(threads)),
      LAYOUT(Join, AT(x) + AT(y) + AT(bytes) + AT(pixels) + AT(threads)),
      LAYOUT(Heads, AT(x) + AT(type) + AT(image) + AT(row) + AT(head)),
      LAYOUT(OperandGrid, AT(scale) + AT(zero_point) + AT(top) + AT(per_sample)),
      LAYOUT(Attention, AT(query) + AT(key) + AT(value) + AT(grids) + AT(mask) + AT(mask_image) + AT(mask_head) +
             AT(mask_row) + AT(y) + AT(y_type) + AT(y_image) + AT(y_row) + AT(y_head) + AT(batch) + AT(heads) +
             AT(length) + AT(key_length) + AT(size) + AT(key_heads) + AT(factor) + AT(extension) + AT(threads)),
      LAYOUT(Step, AT(kind) + AT(at)),
      LAYOUT(Pointer, AT(at) + AT(slot) + AT(offset) + AT(by_row)),
  };
  return all;
}

}  // namespace

extern "C" const char* sq_layout(const char* name) {
  const auto found = layouts().find(name);
  return found == layouts().end() ? nullptr : found->second.c_str();
}
