// Check mode: every access that is not private goes through check_access. Finds accesses outside every buffer,
// reads of memory that nothing wrote, and races. A race needs no unlucky schedule to be seen: two accesses of one
// byte, one of them a write, by threads with no barrier in between that orders this kind of memory.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "runtime.h"

struct Event {
  uint32_t serial;  // the threadgroup's number from 1; 0: nothing happened yet
  uint32_t pc;
  int32_t thread;
  uint32_t barriers, simd_barriers;
};
// Two readers: a later writer that is ordered with neither is reported, and one of them is never the writer itself.
struct Byte {
  Event writer, readers[2];
  bool atomic;
};

static bool checking;
static uint32_t serial;
static Byte* threadgroup_shadow;
static Byte* buffer_shadow[kMaxBuffers];

static Byte* new_shadow(uint64_t nbytes) {  // zero pages: costs only what is touched
  void* p = mmap(nullptr, nbytes * sizeof(Byte) + 1, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return (Byte*)p;
}

void start_checker() {
  checking = true;
  threadgroup_shadow = new_shadow(threadgroup_bytes());
  for (int i = 0; i < buffer_count; i++)
    if (buffers[i].writable) buffer_shadow[i] = new_shadow(buffers[i].nbytes);
}

void start_threadgroup(uint32_t number) { serial = number; }

static bool ordered(const Event& e, Space space) {
  if (!e.serial) return true;
  if (e.serial != serial) return space == THREADGROUP;  // other threadgroups: never ordered, but have other memory
  int me = current->position.thread_index_in_threadgroup;
  if (e.thread == me || e.barriers < current->barriers[space]) return true;
  return e.thread / kLanes == me / kLanes && e.simd_barriers < current->simd_barriers[space];
}

static void report_race(const char* mine, const char* theirs, const Event& other, Space space, const char* name,
                        uint64_t offset, const void* pc) {
  const char* whose = other.serial == serial ? "of the same threadgroup" : "of another threadgroup";
  report("race: thread %u %s %s at byte %lu, which thread %d %s %s without a barrier for %s memory in between, at " AT
         ", the other at @0x%x",
         current->position.thread_index_in_threadgroup, mine, name, (unsigned long)offset, other.thread, whose, theirs,
         space == THREADGROUP ? "threadgroup" : "device", at(pc), other.pc);
}

static void track(Byte* byte, uint64_t nbytes, bool write, bool atomic, bool reads_old, Space space, bool initialised,
                  const char* name, uint64_t offset, const void* pc) {
  int me = current->position.thread_index_in_threadgroup;
  Event now = {serial, (uint32_t)at(pc), me, current->barriers[space], current->simd_barriers[space]};
  for (uint64_t i = 0; i < nbytes; i++, byte++) {
    bool written = byte->writer.serial && (space == DEVICE || byte->writer.serial == serial);
    if (reads_old && !initialised && !written && first_time("uninit", pc))
      report("uninit: thread %d reads %s at byte %lu, which nothing has written, at " AT, me, name,
             (unsigned long)(offset + i), at(pc));
    if (!(atomic && byte->atomic)) {
      if (!ordered(byte->writer, space) && first_time("race", pc))
        report_race(write ? "writes" : "reads", "wrote", byte->writer, space, name, offset + i, pc);
      for (const Event& reader : byte->readers)
        if (write && !ordered(reader, space) && first_time("race", pc))
          report_race("writes", "read", reader, space, name, offset + i, pc);
    }
    if (write)
      byte->writer = now, byte->atomic = atomic;
    else
      byte->readers[!ordered(byte->readers[0], space)] = now;
  }
}

// "12 bytes past the end of buffer x (256 bytes)"; empty when no buffer is near.
const char* describe_address(const volatile void* address) {
  static char text[256];
  const unsigned char* p = (const unsigned char*)address;
  int64_t nearest = 1 << 20;
  text[0] = 0;
  for (int i = 0; i < buffer_count; i++) {
    const Buffer& b = buffers[i];
    int64_t distance = p < b.base ? b.base - p : p - (b.base + b.nbytes);
    if (llabs(distance) >= nearest) continue;
    nearest = llabs(distance);
    snprintf(text, sizeof text, "%ld bytes %s buffer %s (%lu bytes)", (long)nearest,
             p < b.base ? "before" : "past the end of", b.name, (unsigned long)b.nbytes);
  }
  return text;
}

void check_access(const volatile void* address, uint64_t nbytes, bool write, bool atomic, bool reads_old,
                  const void* pc) {
  if (!checking || !current) return;
  unsigned char* p = (unsigned char*)address;
  if ((char*)p >= current->stack && (char*)p < current->stack + kStackBytes) return;
  if ((char*)p >= __start_emu_tg && (char*)p < __start_emu_tg + threadgroup_bytes()) {
    uint64_t offset = (char*)p - __start_emu_tg;
    track(threadgroup_shadow + offset, nbytes, write, atomic, reads_old, THREADGROUP, false, "threadgroup memory",
          offset, pc);
    return;
  }
  bool padding = (char*)p >= __start_emu_tg && (char*)p < __start_emu_tg + threadgroup_bytes() + 4096;
  if (!padding && (char*)p >= __ehdr_start && (char*)p < _end) return;  // constants and the runtime's state
  for (int i = 0; i < buffer_count; i++) {
    const Buffer& b = buffers[i];
    if (p < b.base || p >= b.base + b.nbytes) continue;
    uint64_t offset = p - b.base;
    if (offset + nbytes > b.nbytes) break;
    if (write && !b.writable && first_time("const", pc))
      report("const: thread %u writes to the input %s, at " AT, current->position.thread_index_in_threadgroup, b.name,
             at(pc));
    if (b.writable)
      track(buffer_shadow[i] + offset, nbytes, write, atomic, reads_old, DEVICE, b.initialised, b.name, offset, pc);
    return;
  }
  if (!first_time("oob", pc)) return;
  const emu_uint3 group = current->position.threadgroup_position_in_grid;
  const char* where = padding ? "past the end of threadgroup memory" : describe_address(p);
  report("oob: thread %u of threadgroup (%u, %u, %u) %s %lu bytes %s, at " AT,
         current->position.thread_index_in_threadgroup, group.x, group.y, group.z, write ? "writes" : "reads",
         (unsigned long)nbytes, *where ? where : "nowhere near a buffer", at(pc));
}
