// The functions that clang's -fsanitize=thread instrumentation calls. No sanitizer runtime is linked.
#include <string.h>

#include "runtime.h"

static void read(const void* p, uint64_t nbytes, const void* pc) { check_access(p, nbytes, false, false, true, pc); }
static void write(const void* p, uint64_t nbytes, const void* pc) { check_access(p, nbytes, true, false, false, pc); }

#define ACCESS(N)                                                          \
  RUNTIME void __tsan_read##N(void* p) { read(p, N, CALLER); }             \
  RUNTIME void __tsan_write##N(void* p) { write(p, N, CALLER); }           \
  RUNTIME void __tsan_unaligned_read##N(void* p) { read(p, N, CALLER); }   \
  RUNTIME void __tsan_unaligned_write##N(void* p) { write(p, N, CALLER); } \
  RUNTIME void __tsan_read_write##N(void* p) {                             \
    read(p, N, CALLER);                                                    \
    write(p, N, CALLER);                                                   \
  }                                                                        \
  RUNTIME void __tsan_unaligned_read_write##N(void* p) {                   \
    read(p, N, CALLER);                                                    \
    write(p, N, CALLER);                                                   \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

RUNTIME void __tsan_read_range(void* p, uint64_t nbytes) { read(p, nbytes, CALLER); }
RUNTIME void __tsan_write_range(void* p, uint64_t nbytes) { write(p, nbytes, CALLER); }
RUNTIME void* __tsan_memcpy(void* to, const void* from, uint64_t nbytes) {
  read(from, nbytes, CALLER);
  write(to, nbytes, CALLER);
  return memcpy(to, from, nbytes);
}
RUNTIME void* __tsan_memmove(void* to, const void* from, uint64_t nbytes) {
  read(from, nbytes, CALLER);
  write(to, nbytes, CALLER);
  return memmove(to, from, nbytes);
}
RUNTIME void* __tsan_memset(void* to, int value, uint64_t nbytes) {
  write(to, nbytes, CALLER);
  return memset(to, value, nbytes);
}
RUNTIME void __tsan_init() {}
RUNTIME void __tsan_func_entry(void*) {}
RUNTIME void __tsan_func_exit() {}

// The atomic templates are not instrumented and say so themselves. An atomic load counts as an atomic write:
// any plain access that is not ordered with it is a race.
RUNTIME void emu_atomic(const volatile void* p, unsigned nbytes, unsigned kind) {
  check_access(p, nbytes, true, true, kind != EMU_STORE, CALLER);
}
