// Makes recorded calls one after the other, after filling in the addresses that differ each time.
#include "call.h"

static int32_t run(int64_t kind, const void* structure) {
  switch (kind) {
    case LAYER: return sq_codes((const Call*)structure) || sq_layer((const Call*)structure);
    case GROUP_NORM: return sq_group_norm((const GroupNorm*)structure);
    case ATTENTION: return sq_attention((const Attention*)structure);
    default: return sq_join((const Join*)structure);
  }
}

extern "C" int32_t sq_replay(char* structures, const Step* steps, int64_t step_count, const Pointer* pointers,
                             int64_t pointer_count, char* const* slots, int64_t row) {
  for (int64_t i = 0; i < pointer_count; i++) {
    const Pointer& p = pointers[i];
    *(char**)(structures + p.at) = slots[p.slot] + p.offset + row * p.by_row;
  }
  for (int64_t i = 0; i < step_count; i++) {
    if (run(steps[i].kind, structures + steps[i].at)) return 1;
  }
  return 0;
}
