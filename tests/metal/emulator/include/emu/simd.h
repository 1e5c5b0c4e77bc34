// <metal_simdgroup>: 32 lanes. Each function takes a hidden last argument that says where it was called.
#pragma once

namespace metal {

// As in Metal: no bool, no 64-bit integers; bfloat has its own overloads in MLX's bf16_math.h.
template <class T, class E = emu_element_t<T>>
static constexpr bool emu_simd_type =
    (is_arithmetic_v<E> && sizeof(E) <= 4 && !__is_same(E, bool) && !__is_same(E, bfloat));
#define EMU_SIMD                                             \
  template <class T, enable_if_t<emu_simd_type<T>, int> = 0> \
  METAL_FUNC T

template <class T>
METAL_FUNC T emu_lane_value(const emu_slots* slots, uint lane) {
  T value;
  __builtin_memcpy(&value, slots->value[lane], sizeof(T));
  return value;
}
template <class T>
METAL_FUNC T emu_from_lane(const emu_slots* slots, uint lane) {
  if (lane >= 32) return emu_lane_error("lane index >= 32, a simdgroup has 32 lanes:", lane), T(0);
  if (!((slots->active >> lane) & 1)) return emu_lane_error("value taken from an inactive lane:", lane), T(0);
  return emu_lane_value<T>(slots, lane);
}
template <class T>
METAL_FUNC const emu_slots* emu_exchange(T value, uint op, uint site) {
  return emu_collective(&value, sizeof(T), op, site);
}

// A tree: Apple does not document its order either, so no test may depend on it.
template <class T, class F>
METAL_FUNC T emu_reduce(T value, T identity, uint op, uint site, F combine) {
  const emu_slots* slots = emu_exchange(value, op, site);
  T a[32];
  for (uint i = 0; i < 32; i++) a[i] = ((slots->active >> i) & 1) ? emu_lane_value<T>(slots, i) : identity;
  for (uint d = 16; d; d >>= 1)
    for (uint i = 0; i < d; i++) a[i] = combine(a[i], a[i + d]);
  return a[0];
}
EMU_SIMD simd_sum(T x, uint site = EMU_SITE) {
  return emu_reduce<T>(x, T(0), EMU_SUM, site, [](T a, T b) { return T(a + b); });
}
EMU_SIMD simd_product(T x, uint site = EMU_SITE) {
  return emu_reduce<T>(x, T(1), EMU_PRODUCT, site, [](T a, T b) { return T(a * b); });
}
EMU_SIMD simd_max(T x, uint site = EMU_SITE) {
  return emu_reduce<T>(x, x, EMU_MAX, site, [](T a, T b) { return max(a, b); });
}
EMU_SIMD simd_min(T x, uint site = EMU_SITE) {
  return emu_reduce<T>(x, x, EMU_MIN, site, [](T a, T b) { return min(a, b); });
}
EMU_SIMD simd_and(T x, uint site = EMU_SITE) {
  return emu_reduce<T>(x, x, EMU_AND, site, [](T a, T b) { return T(a & b); });
}
EMU_SIMD simd_or(T x, uint site = EMU_SITE) {
  return emu_reduce<T>(x, x, EMU_OR, site, [](T a, T b) { return T(a | b); });
}
EMU_SIMD simd_xor(T x, uint site = EMU_SITE) {
  return emu_reduce<T>(x, T(0), EMU_XOR, site, [](T a, T b) { return T(a ^ b); });
}

METAL_FUNC bool simd_all(bool x, uint site = EMU_SITE) {
  return emu_reduce<uint>(x, 1, EMU_ALL, site, [](uint a, uint b) { return a & b; });
}
METAL_FUNC bool simd_any(bool x, uint site = EMU_SITE) {
  return emu_reduce<uint>(x, 0, EMU_ANY, site, [](uint a, uint b) { return a | b; });
}
struct simd_vote {
  ulong mask;
  explicit operator ulong() const { return mask; }
  bool all() const { return mask == 0xffffffffu; }
  bool any() const { return mask; }
};
METAL_FUNC simd_vote simd_ballot(bool x, uint site = EMU_SITE) {
  uint mine = x ? 1u << emu_lane() : 0;
  return simd_vote{emu_reduce<uint>(mine, 0, EMU_BALLOT, site, [](uint a, uint b) { return a | b; })};
}
METAL_FUNC bool simd_is_first(uint site = EMU_SITE) {
  return uint(__builtin_ctz(emu_exchange(0u, EMU_IS_FIRST, site)->active)) == emu_lane();
}
METAL_FUNC simd_vote simd_active_threads_mask(uint site = EMU_SITE) {
  return simd_vote{emu_exchange(0u, EMU_ACTIVE, site)->active};
}

EMU_SIMD simd_shuffle(T x, ushort lane, uint site = EMU_SITE) {
  return emu_from_lane<T>(emu_exchange(x, EMU_SHUFFLE, site), lane);
}
EMU_SIMD simd_broadcast(T x, ushort lane, uint site = EMU_SITE) {
  return emu_from_lane<T>(emu_exchange(x, EMU_BROADCAST, site), lane);
}
EMU_SIMD simd_broadcast_first(T x, uint site = EMU_SITE) {
  const emu_slots* slots = emu_exchange(x, EMU_BROADCAST_FIRST, site);
  return emu_lane_value<T>(slots, __builtin_ctz(slots->active));
}
EMU_SIMD simd_shuffle_xor(T x, ushort mask, uint site = EMU_SITE) {
  return emu_from_lane<T>(emu_exchange(x, EMU_SHUFFLE_XOR, site), emu_lane() ^ mask);
}
// A lane whose source would be outside the simdgroup keeps its own value.
EMU_SIMD simd_shuffle_down(T x, ushort delta, uint site = EMU_SITE) {
  const emu_slots* slots = emu_exchange(x, EMU_SHUFFLE_DOWN, site);
  return emu_lane() + delta < 32 ? emu_from_lane<T>(slots, emu_lane() + delta) : x;
}
EMU_SIMD simd_shuffle_up(T x, ushort delta, uint site = EMU_SITE) {
  const emu_slots* slots = emu_exchange(x, EMU_SHUFFLE_UP, site);
  return emu_lane() >= delta ? emu_from_lane<T>(slots, emu_lane() - delta) : x;
}
EMU_SIMD simd_shuffle_rotate_down(T x, ushort delta, uint site = EMU_SITE) {
  return emu_from_lane<T>(emu_exchange(x, EMU_ROTATE_DOWN, site), (emu_lane() + delta) & 31);
}
EMU_SIMD simd_shuffle_rotate_up(T x, ushort delta, uint site = EMU_SITE) {
  return emu_from_lane<T>(emu_exchange(x, EMU_ROTATE_UP, site), (emu_lane() - delta) & 31);
}
EMU_SIMD simd_shuffle_and_fill_down(T x, T fill, ushort delta, ushort modulo = 32, uint site = EMU_SITE) {
  const emu_slots* from = emu_exchange(x, EMU_FILL_DOWN, site);
  const emu_slots* fills = emu_exchange(fill, EMU_FILL, site);
  uint base = emu_lane() / modulo * modulo, k = emu_lane() % modulo + delta;
  return k < modulo ? emu_from_lane<T>(from, base + k) : emu_from_lane<T>(fills, base + k % modulo);
}
EMU_SIMD simd_shuffle_and_fill_up(T x, T fill, ushort delta, ushort modulo = 32, uint site = EMU_SITE) {
  const emu_slots* from = emu_exchange(x, EMU_FILL_UP, site);
  const emu_slots* fills = emu_exchange(fill, EMU_FILL, site);
  uint base = emu_lane() / modulo * modulo, k = emu_lane() % modulo;
  return k >= delta ? emu_from_lane<T>(from, base + k - delta)
                    : emu_from_lane<T>(fills, base + (k + modulo - delta) % modulo);
}

template <class T, class F>
METAL_FUNC T emu_prefix(T x, T identity, uint end, uint op, uint site, F combine) {
  const emu_slots* slots = emu_exchange(x, op, site);
  T result = identity;
  for (uint i = 0; i < end; i++)
    if ((slots->active >> i) & 1) result = combine(result, emu_lane_value<T>(slots, i));
  return result;
}
EMU_SIMD simd_prefix_inclusive_sum(T x, uint site = EMU_SITE) {
  return emu_prefix<T>(x, T(0), emu_lane() + 1, EMU_PREFIX_SUM, site, [](T a, T b) { return T(a + b); });
}
EMU_SIMD simd_prefix_exclusive_sum(T x, uint site = EMU_SITE) {
  return emu_prefix<T>(x, T(0), emu_lane(), EMU_PREFIX_SUM_EXCLUSIVE, site, [](T a, T b) { return T(a + b); });
}
EMU_SIMD simd_prefix_inclusive_product(T x, uint site = EMU_SITE) {
  return emu_prefix<T>(x, T(1), emu_lane() + 1, EMU_PREFIX_PRODUCT, site, [](T a, T b) { return T(a * b); });
}
EMU_SIMD simd_prefix_exclusive_product(T x, uint site = EMU_SITE) {
  return emu_prefix<T>(x, T(1), emu_lane(), EMU_PREFIX_PRODUCT_EXCLUSIVE, site, [](T a, T b) { return T(a * b); });
}

}  // namespace metal
