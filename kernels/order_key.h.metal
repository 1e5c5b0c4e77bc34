// Floats as unsigned integers of the same order, all above 0: -inf is smallest, NaN largest, -0 equals 0.
METAL_FUNC uint order_key(float x) {
  const uint bits = as_type<uint>(x == 0.0f ? 0.0f : x);
  if (metal::isnan(x)) return 0xffffffffu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

METAL_FUNC float key_value(uint key) { return as_type<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
