// float -> bfloat16, to nearest even: the compiler's support library has this only in newer versions.
#include <string.h>

#include "runtime.h"

RUNTIME __bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint16_t rounded = nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  __bf16 result;
  memcpy(&result, &rounded, sizeof result);
  return result;
}
