// Calls that were recorded, one after the other, with the addresses that are another each time.
#include "call.h"

extern "C" {
void sq_codes(const Call*);
void sq_layer(const Call*);
void sq_group_norm(const GroupNorm*);
void sq_attention(const Attention*);
void sq_join(const Join*);
}

enum Kind : int64_t { LAYER, GROUP_NORM, ATTENTION, JOIN };

struct Step {
  int64_t kind, at;  // at: bytes from the first structure to this one
};

struct Pointer {
  int64_t at;      // bytes from the first structure to the field
  int64_t slot;    // of the memory that it points into
  int64_t offset;  // from its beginning
  int64_t by_row;  // more for each row of the tables
};

extern "C" void sq_replay(char* structures, const Step* steps, int64_t step_count, const Pointer* pointers,
                          int64_t pointer_count, char* const* slots, int64_t row) {
  for (int64_t i = 0; i < pointer_count; i++) {
    const Pointer& p = pointers[i];
    *(char**)(structures + p.at) = slots[p.slot] + p.offset + row * p.by_row;
  }
  for (int64_t i = 0; i < step_count; i++) {
    const void* structure = structures + steps[i].at;
    switch (steps[i].kind) {
      case LAYER:
        sq_codes((const Call*)structure);
        sq_layer((const Call*)structure);
        break;
      case GROUP_NORM: sq_group_norm((const GroupNorm*)structure); break;
      case ATTENTION: sq_attention((const Attention*)structure); break;
      case JOIN: sq_join((const Join*)structure); break;
    }
  }
}
