// Barriers. What a barrier orders depends on its flags: the checker counts them per kind of memory.
#pragma once

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

METAL_FUNC void threadgroup_barrier(mem_flags flags, uint site = EMU_SITE) {
  emu_barrier(EMU_THREADGROUP, uint(flags), site);
}
METAL_FUNC void simdgroup_barrier(mem_flags flags, uint site = EMU_SITE) {
  emu_barrier(EMU_SIMDGROUP, uint(flags), site);
}

}  // namespace metal
