// What the runtime's files share. One kernel launch = one forked child, so the state is global and never reset.
#pragma once
#include <stdint.h>

#include "../include/emu/abi.h"

// hidden: several kernels live in one process, each with its own copy of the runtime
#define RUNTIME extern "C" __attribute__((visibility("hidden")))
#define EXPORTED extern "C" __attribute__((visibility("default")))
#define CALLER __builtin_return_address(0)

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxBuffers = 64;
constexpr uint64_t kMaxThreadgroupBytes = 32768;
constexpr uint64_t kStackBytes = 128 << 10;

struct Buffer {  // mirrored in launch.py
  unsigned char* base;
  uint64_t nbytes;
  uint32_t writable, initialised;
  const char* name;
};

enum State { RUNNABLE, AT_BARRIER, AT_SIMD_BARRIER, AT_COLLECTIVE, RETURNED };
enum Space { DEVICE, THREADGROUP };  // also the bit of the mem_flags that orders it

struct Fiber {
  void* stack_pointer;
  char* stack;
  State state;
  unsigned op, site, flags, collectives;
  const void* pc;        // where it waits
  unsigned barriers[2];  // threadgroup barriers passed, per Space that they ordered
  unsigned simd_barriers[2];
  emu_thread position;
};

// ---- fibers.cpp
extern Fiber fibers[kMaxThreads];
extern Fiber* current;  // null while the scheduler runs
extern emu_slots simd_slots[kLanes][2];
void create_stacks(int count);
void reset_fiber(int index);
void resume(Fiber* fiber);
void switch_to_scheduler();
bool in_any_stack(const void* address);

// ---- schedule.cpp
enum Order { FORWARD, REVERSE, RANDOM };
void seed_random(uint64_t seed);
void shuffle(uint32_t* items, uint32_t count, Order order);
bool run_threadgroup(int threads, Order order);

// ---- check.cpp
void start_checker();
void start_threadgroup(uint32_t serial);
void check_access(const volatile void* address, uint64_t nbytes, bool write, bool atomic, bool reads_old,
                  const void* pc);
const char* describe_address(const volatile void* address);

// ---- launch.cpp
extern Buffer* buffers;
extern int buffer_count;
extern void* buffer_pointers[kMaxBuffers];
extern char __start_emu_tg[] __attribute__((visibility("hidden")));
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
uint64_t threadgroup_bytes();

// ---- report.cpp
void start_reports(char* text, uint64_t capacity);
// One problem, printf-style; at most once per (kind, where). Code addresses are written as AT / at().
bool first_time(const char* kind, const void* where);
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));
int report_count();
#define AT "@0x%lx"
unsigned long at(const void* pc);
