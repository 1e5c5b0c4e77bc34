// <metal_atomic>. Threads only switch at barriers and simdgroup operations, so plain code is already atomic;
// the checker is told that the access is an atomic one.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

template <class T>
struct emu_undeduced {
  using type = T;
};
template <class T>
using emu_value = typename emu_undeduced<T>::type;

// Not instrumented: the access itself would be reported as a race.
#define EMU_ATOMIC   \
  template <class T> \
  __attribute__((no_sanitize("thread"), noinline))
#define EMU_NOTE(kind) emu_atomic((const volatile void*)(uintptr_t)p, sizeof(T), kind)

#define EMU_ATOMIC_MODIFY(SPACE, name, expression)                               \
  EMU_ATOMIC T name(volatile SPACE atomic<T>* p, emu_value<T> x, memory_order) { \
    EMU_NOTE(EMU_MODIFY);                                                        \
    T old = p->v;                                                                \
    p->v = expression;                                                           \
    return old;                                                                  \
  }
#define EMU_ATOMICS(SPACE)                                                                               \
  EMU_ATOMIC_MODIFY(SPACE, atomic_fetch_add_explicit, T(old + x))                                        \
  EMU_ATOMIC_MODIFY(SPACE, atomic_fetch_sub_explicit, T(old - x))                                        \
  EMU_ATOMIC_MODIFY(SPACE, atomic_fetch_or_explicit, T(old | x))                                         \
  EMU_ATOMIC_MODIFY(SPACE, atomic_fetch_and_explicit, T(old& x))                                         \
  EMU_ATOMIC_MODIFY(SPACE, atomic_fetch_xor_explicit, T(old ^ x))                                        \
  EMU_ATOMIC_MODIFY(SPACE, atomic_fetch_max_explicit, (old > x ? old : x))                               \
  EMU_ATOMIC_MODIFY(SPACE, atomic_fetch_min_explicit, (old < x ? old : x))                               \
  EMU_ATOMIC_MODIFY(SPACE, atomic_exchange_explicit, x)                                                  \
  EMU_ATOMIC T atomic_load_explicit(const volatile SPACE atomic<T>* p, memory_order) {                   \
    EMU_NOTE(EMU_LOAD);                                                                                  \
    return p->v;                                                                                         \
  }                                                                                                      \
  EMU_ATOMIC void atomic_store_explicit(volatile SPACE atomic<T>* p, emu_value<T> x, memory_order) {     \
    EMU_NOTE(EMU_STORE);                                                                                 \
    p->v = x;                                                                                            \
  }                                                                                                      \
  EMU_ATOMIC bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* p, thread T* expected, \
                                                        emu_value<T> x, memory_order, memory_order) {    \
    EMU_NOTE(EMU_MODIFY);                                                                                \
    T old = p->v;                                                                                        \
    bool same = old == *expected;                                                                        \
    if (same) p->v = x;                                                                                  \
    *expected = old;                                                                                     \
    return same;                                                                                         \
  }
EMU_ATOMICS(device)
EMU_ATOMICS(threadgroup)

}  // namespace metal
