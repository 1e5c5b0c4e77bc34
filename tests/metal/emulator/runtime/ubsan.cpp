// The handlers that clang's -fsanitize=... checks call. The data layouts are those of compiler-rt's ubsan.
#include "runtime.h"

struct Location {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];  // quoted
};

#define PLACE(where) (where).file, (where).line

struct OutOfBounds {
  Location where;
  Type *array, *index;
};
RUNTIME void __ubsan_handle_out_of_bounds(OutOfBounds* data, intptr_t index) {
  if (first_time("index", data))
    report("index: array index %ld out of bounds for type %s, at %s:%u", (long)index, data->array->name,
           PLACE(data->where));
}

struct Shift {
  Location where;
  Type *left, *right;
};
RUNTIME void __ubsan_handle_shift_out_of_bounds(Shift* data, uintptr_t, intptr_t bits) {
  if (first_time("shift", data))
    report("shift: by %ld bits, too many for type %s, at %s:%u", (long)bits, data->left->name, PLACE(data->where));
}

struct Mismatch {
  Location where;
  Type* type;
  unsigned char log_alignment, kind;
};
RUNTIME void __ubsan_handle_type_mismatch_v1(Mismatch* data, uintptr_t address) {
  if (!first_time("alignment", data)) return;
  report(
      "alignment: misaligned access to type %s, which needs %d bytes of alignment: found address %% %d = %lu, at %s:%u",
      data->type->name, 1 << data->log_alignment, 1 << data->log_alignment,
      (unsigned long)(address & ((1ul << data->log_alignment) - 1)), PLACE(data->where));
}

#define SIMPLE(handler, what)                                                                     \
  RUNTIME void __ubsan_handle_##handler(Location* where, ...) {                                   \
    if (first_time("arithmetic", where)) report("arithmetic: " what ", at %s:%u", PLACE(*where)); \
  }
SIMPLE(divrem_overflow, "integer division by zero, or overflow in a division")
SIMPLE(float_cast_overflow, "floating-point value out of range of the integer type")
SIMPLE(add_overflow, "signed integer overflow in +")
SIMPLE(sub_overflow, "signed integer overflow in -")
SIMPLE(mul_overflow, "signed integer overflow in *")
SIMPLE(negate_overflow, "signed integer overflow in a negation")
SIMPLE(alignment_assumption, "an alignment assumption does not hold")
