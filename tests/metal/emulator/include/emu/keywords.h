// Metal's keywords. The OpenCL address-space attributes work in plain C++: clang checks them like Metal does,
// and on a CPU they lower to ordinary memory, so sanitizer instrumentation still sees every access.
#pragma once

#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant const __attribute__((opencl_constant))
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 310
#endif

// The rewriter puts this in front of threadgroup variables: one instance, in a section that the runtime owns.
#define EMU_THREADGROUP_VARIABLE static __attribute__((section("emu_tg")))

// A threadgroup variable of class type, for which clang would look for a constructor in that address space.
#define EMU_THREADGROUP_OBJECT(T, name, ...)                                                                  \
  EMU_THREADGROUP_VARIABLE __attribute__((aligned(16))) threadgroup char name##_bytes[sizeof(T __VA_ARGS__)]; \
  threadgroup T(&name) __VA_ARGS__ = *(threadgroup T(*) __VA_ARGS__)name##_bytes

// Identifies a call in the source. As a default argument it is evaluated where the function is called.
#define EMU_SITE (unsigned(__builtin_LINE()) * 4096u + unsigned(__builtin_COLUMN()))
