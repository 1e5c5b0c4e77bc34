// One fiber per thread of the running threadgroup: its own stack, switched only where Metal threads can wait.
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

Fiber fibers[kMaxThreads];
Fiber* current;
emu_slots simd_slots[kLanes][2];

static void* scheduler_sp;
static char* stacks;
static uint64_t stacks_bytes;
constexpr uint64_t kGuard = 4096;

// switch_stack(save, to): keep the callee-saved registers on the old stack, take those on the new one.
#if defined(__x86_64__)
asm(R"(
  .text
  .hidden switch_stack
  .globl switch_stack
switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
static void* first_frame(char* top, void (*entry)()) {
  void** sp = (void**)((uintptr_t)top & ~15ul);
  *--sp = nullptr;  // keeps the stack aligned as if entry had been called
  *--sp = (void*)entry;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
  .text
  .hidden switch_stack
  .globl switch_stack
switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
static void* first_frame(char* top, void (*entry)()) {
  void** sp = (void**)((uintptr_t)top & ~15ul) - 20;
  memset(sp, 0, 160);
  sp[11] = (void*)entry;  // x30
  return sp;
}
#else
#error "the emulator's context switch exists for x86-64 and aarch64"
#endif
RUNTIME void switch_stack(void** save, void* to);

static void fiber_main() {
  emu_kernel(buffer_pointers, &current->position);
  current->state = RETURNED;
  switch_to_scheduler();
  __builtin_trap();
}

void create_stacks(int count) {
  stacks_bytes = count * (kStackBytes + kGuard);
  stacks =
      (char*)mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (int i = 0; i < count; i++) mprotect(stacks + i * (kStackBytes + kGuard), kGuard, PROT_NONE);
}

bool in_any_stack(const void* address) {
  return (const char*)address >= stacks && (const char*)address < stacks + stacks_bytes;
}

void reset_fiber(int index) {
  Fiber* fiber = &fibers[index];
  memset(fiber, 0, sizeof *fiber);
  fiber->stack = stacks + index * (kStackBytes + kGuard) + kGuard;
  fiber->stack_pointer = first_frame(fiber->stack + kStackBytes, fiber_main);
}

void resume(Fiber* fiber) {
  current = fiber;
  switch_stack(&scheduler_sp, fiber->stack_pointer);
  current = nullptr;
}

void switch_to_scheduler() { switch_stack(&current->stack_pointer, scheduler_sp); }

// ---- what the kernel calls

RUNTIME unsigned emu_lane() { return current->position.thread_index_in_simdgroup; }

static void wait(State state, unsigned op, unsigned site, const void* pc) {
  current->state = state, current->op = op, current->site = site, current->pc = pc;
  switch_to_scheduler();
  asm volatile("" ::: "memory");  // other threads ran
}

RUNTIME const emu_slots* emu_collective(const void* value, unsigned nbytes, unsigned op, unsigned site) {
  // two sets: a fast lane may already bring the next value while a slow one still reads
  emu_slots* slots = &simd_slots[current->position.simdgroup_index_in_threadgroup][current->collectives++ & 1];
  memcpy(slots->value[emu_lane()], value, nbytes);
  wait(AT_COLLECTIVE, op, site, CALLER);
  return slots;
}

RUNTIME void emu_barrier(unsigned scope, unsigned flags, unsigned site) {
  current->flags = flags;
  wait(scope == EMU_SIMDGROUP ? AT_SIMD_BARRIER : AT_BARRIER, EMU_BARRIER, site, CALLER);
}

RUNTIME void emu_lane_error(const char* what, unsigned lane) {
  const void* pc = current->pc;  // of the operation: calls of this function can be merged into one
  if (first_time(what, pc)) report("simd: lane %u: %s %u, at " AT, emu_lane(), what, lane, at(pc));
}
