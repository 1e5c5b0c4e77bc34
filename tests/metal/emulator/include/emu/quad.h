// Quadgroups: four neighbouring lanes. All lanes of the simdgroup must call together.
#pragma once

namespace metal {

EMU_SIMD quad_sum(T x, uint site = EMU_SITE) {
  const emu_slots* slots = emu_exchange(x, EMU_QUAD, site);
  uint first = emu_lane() & ~3u;
  return (emu_from_lane<T>(slots, first) + emu_from_lane<T>(slots, first + 1)) +
         (emu_from_lane<T>(slots, first + 2) + emu_from_lane<T>(slots, first + 3));
}
EMU_SIMD quad_shuffle_xor(T x, ushort mask, uint site = EMU_SITE) {
  return emu_from_lane<T>(emu_exchange(x, EMU_QUAD, site), emu_lane() ^ (mask & 3));
}
EMU_SIMD quad_broadcast(T x, ushort lane, uint site = EMU_SITE) {
  return emu_from_lane<T>(emu_exchange(x, EMU_QUAD, site), (emu_lane() & ~3u) + lane);
}

}  // namespace metal
