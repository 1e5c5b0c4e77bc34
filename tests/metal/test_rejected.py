"""Kernels that Metal would not compile: each must be rejected before it runs, with the cause and the line."""

from broken import BEGIN, SCALE, STORE, SUM, WEIGHT, Broken, cases
from matvec import SOURCE, STAGED

ADDRESS_SPACES = [
    Broken(
        "device from threadgroup",
        STAGED,
        "const threadgroup float4* x4 = (const",
        "const device float4* x4 = (const",
        "cannot initialize",
    ),
    Broken(
        "cast to device",
        STAGED,
        "const threadgroup float4* x4 = (const threadgroup float4*)",
        "const device float4* x4 = (const device float4*)",
        "between address spaces",
    ),
    Broken(
        "device for thread", SOURCE, "dot8<T>(p.x, xs,", "dot8<T>(p.x, (const device float*)w,", "no matching function"
    ),
    Broken(
        "no space, local",
        SOURCE,
        BEGIN,
        "float a[4]; float* p0 = a; p0[0] = 0.0f; " + BEGIN,
        "'p0' .* no address space",
    ),
    Broken("no space, parameter", SOURCE, "const thread float* x,", "const float* x,", "'x' .* no address space"),
    Broken("no space, device", SOURCE, "const device uint4* w4", "const uint4* w4", "cannot initialize"),
    Broken("write to an input", SOURCE, STORE, STORE + " x[0] = T(0);", "read-only|const-qualified|not assignable"),
    Broken(
        "const cast away",
        SOURCE,
        STORE,
        STORE + " if (lane == 0) ((device T*)x)[0] = T(0);",
        "const: .* writes to the input x",
    ),
    Broken(
        "program scope",
        SOURCE,
        "\ntemplate <typename T>",
        "\nconstexpr float ONE = 1.0f; template <typename T>",
        "'ONE' .* constant address space",
    ),
    Broken("static", SOURCE, BEGIN, "static " + BEGIN, "'ROWS' .* constant address space"),
]

LANGUAGE = [
    Broken("float to bfloat", SOURCE, "static_cast<T>(total)", "total", "implicit conversion to bfloat"),
    Broken("literal to bfloat", SOURCE, BEGIN, "T zero = 0.0f; (void)zero; " + BEGIN, "implicit conversion to bfloat"),
    Broken("bfloat +=", SOURCE, BEGIN, "T z = T(0.0f); z += 1.5f; (void)z; " + BEGIN, "compound assignment"),
    Broken("half to bfloat", SOURCE, "static_cast<T>(total)", "half(total)", "'half'|_Float16"),
    Broken("vector conversion", SOURCE, "float4 v = float4(x4[j]);", "float4 v = x4[j];", "cannot initialize"),
    Broken(
        "vector cast",
        SOURCE,
        "uint4 p = " + WEIGHT,
        "uint4 p = (uint4)float4(1.0f) + " + WEIGHT,
        "reinterpret the bits",
    ),
    Broken(
        "vector components",
        SOURCE,
        "float4 v = float4(x4[j]);",
        "float4 v = float4(float2(1.0f), 2.0f);",
        "wrong number of components",
    ),
    Broken("as_type", SOURCE, f"float({SCALE})", f"as_type<float>({SCALE})", "as_type: the sizes differ"),
    Broken("double", SOURCE, "float q =", "double q =", "Metal has no double"),
    Broken("std", SOURCE, "metal::fma(bias", "std::fma(bias", "Metal has no std::"),
    Broken("cuda", SOURCE, "simd_sum(sums[r])", "__shfl_xor_sync(0xffffffff, sums[r], 16)", "CUDA, not Metal"),
    Broken("new", SOURCE, BEGIN, "float* leak = new float; " + BEGIN, "no new and delete"),
    Broken(
        "threadgroup initialiser",
        STAGED,
        "threadgroup float staged[IN];",
        "threadgroup float staged[IN]; threadgroup float zero = 0.0f;",
        "cannot have an initialiser",
    ),
    Broken("lambda", SOURCE, BEGIN, "auto twice = [](float a) { return 2.0f * a; }; (void)twice; " + BEGIN, "a lambda"),
    Broken(
        "recursion",
        SOURCE,
        "\ntemplate <typename T>",
        "\ninline int f(int n) { return n < 2 ? 1 : f(n - 1); } template <typename T>",
        "recursion",
    ),
    Broken("syntax", SOURCE, SUM, "const float total = simd_sum(sums[r])", "expected ';'"),
    Broken("unknown attribute", SOURCE, "thread_index_in_simdgroup;", "lane_id_in_simdgroup;", "undeclared identifier"),
    Broken("missing return", SOURCE, "  return sum;\n", "", "non-void function does not return a value"),
]


@cases(ADDRESS_SPACES, LANGUAGE)
def test_rejected(broken):
    broken.check()
