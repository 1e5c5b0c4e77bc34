// What a compiled kernel and the runtime agree on.
// Plain C++, included before the Metal keywords become macros.
#pragma once

struct emu_uint3 {
  unsigned x, y, z;
};

// One thread's position; the field names are the Metal attribute names.
struct emu_thread {
  emu_uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  emu_uint3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threads_per_grid, threadgroups_per_grid;
  emu_uint3 grid_origin, grid_size;
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  unsigned thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
  unsigned quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
  unsigned thread_execution_width, threads_per_simdgroup;
};

// The values that the lanes of a simdgroup brought to one collective operation.
struct emu_slots {
  unsigned char value[32][16];
  unsigned active;  // bit i: lane i took part
};

enum emu_op : unsigned {
  EMU_BARRIER,
  EMU_SUM,
  EMU_PRODUCT,
  EMU_MAX,
  EMU_MIN,
  EMU_AND,
  EMU_OR,
  EMU_XOR,
  EMU_ALL,
  EMU_ANY,
  EMU_BALLOT,
  EMU_IS_FIRST,
  EMU_ACTIVE,
  EMU_SHUFFLE,
  EMU_BROADCAST,
  EMU_BROADCAST_FIRST,
  EMU_SHUFFLE_XOR,
  EMU_SHUFFLE_DOWN,
  EMU_SHUFFLE_UP,
  EMU_ROTATE_DOWN,
  EMU_ROTATE_UP,
  EMU_FILL_DOWN,
  EMU_FILL_UP,
  EMU_FILL,
  EMU_PREFIX_SUM,
  EMU_PREFIX_SUM_EXCLUSIVE,
  EMU_PREFIX_PRODUCT,
  EMU_PREFIX_PRODUCT_EXCLUSIVE,
  EMU_QUAD,
  EMU_MATRIX,
};

enum emu_scope : unsigned { EMU_THREADGROUP, EMU_SIMDGROUP };
enum emu_atomic_kind : unsigned { EMU_LOAD, EMU_STORE, EMU_MODIFY };

extern "C" {
// Waits until every lane of the simdgroup arrives at the same `site` and `op`, then shows all their values.
const emu_slots* emu_collective(const void* value, unsigned nbytes, unsigned op, unsigned site);
void emu_barrier(unsigned scope, unsigned flags, unsigned site);
unsigned emu_lane();
void emu_lane_error(const char* what, unsigned lane);
void emu_atomic(const volatile void* address, unsigned nbytes, unsigned kind);

// Generated for every kernel: calls it for one thread.
void emu_kernel(void* const* buffers, const emu_thread* thread);
}
