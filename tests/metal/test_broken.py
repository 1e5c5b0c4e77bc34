"""Kernels that go wrong when they run: each must be caught, and the message must name the cause and the line."""

from broken import BARRIER, BEGIN, LOAD_STAGED, SCALE, STAGE, STORE, SUM, WEIGHT, WHOLE, Broken, cases
from matvec import SOURCE, STAGED

BARRIERS = [
    Broken("removed", STAGED, BARRIER, "", "(?s)uninit: .*race: thread", LOAD_STAGED),
    Broken("mem_none", STAGED, BARRIER, "threadgroup_barrier(mem_flags::mem_none);", "race", LOAD_STAGED),
    Broken("mem_device", STAGED, BARRIER, "threadgroup_barrier(mem_flags::mem_device);", "race", LOAD_STAGED),
    Broken("simdgroup", STAGED, BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);", "race", LOAD_STAGED),
    Broken("divergent", STAGED, BARRIER, "if (thread_id < 32) { " + BARRIER + " }", "race", LOAD_STAGED),
    Broken(
        "half a simdgroup",
        STAGED,
        BARRIER,
        "if (thread_id < 16) { " + BARRIER + " }",
        "divergence: .* waits at threadgroup_barrier",
    ),
    Broken(
        "after a return",
        STAGED,
        "  const uint thread_id = thread_index_in_threadgroup;\n",
        "  const uint thread_id = thread_index_in_threadgroup; if (thread_id >= 32) return;\n",
        "divergence: .* has returned",
        BARRIER,
    ),
    Broken("in a loop of different lengths", STAGED, STAGE, STAGE + " if (i < 40) " + BARRIER, "divergence"),
    Broken(
        "overwritten too early",
        STAGED,
        BARRIER,
        BARRIER + " float early = staged[thread_id]; staged[63 - thread_id] = early;",
        "race",
    ),
    Broken(
        "threads of one simdgroup",
        STAGED,
        SUM,
        "staged[thread_id] = sums[r]; const float total = simd_sum(staged[thread_id ^ 1]);",
        "race",
    ),
]

BOUNDS = [
    Broken(
        "read of the last row",
        SOURCE,
        WEIGHT,
        "w4[row * (IN / 32) + block + 1]",
        r"oob: .* reads 16 bytes 0 bytes past the end of buffer w \(65536 bytes\)",
    ),
    Broken("read of scales", SOURCE, SCALE, "scales[row * (IN / 64) + block]", "oob: .* past the end of buffer scales"),
    Broken("far read", SOURCE, WEIGHT, "w4[row * (IN / 32) * 4 + block]", "oob: .* past the end of buffer w"),
    Broken("wild read", SOURCE, WEIGHT, "w4[ulong(row) << 40]", "oob: .* nowhere near a buffer"),
    Broken(
        "read before",
        SOURCE,
        SCALE,
        "scales[int(row * (IN / 64) + block / 2) - 1]",
        "oob: .* 2 bytes before buffer scales",
    ),
    Broken(
        "write",
        SOURCE,
        STORE,
        "if (lane == 0) out[row0 + r + 1] = static_cast<T>(total);",
        "oob: .* writes 2 bytes 0 bytes past the end of buffer out",
    ),
    Broken(
        "threadgroup array",
        STAGED,
        STAGE,
        "staged[i + 1] = float(x[i]);",
        r"index: array index 2048 out of bounds for type '.*float\[2048\]'",
    ),
    Broken(
        "threadgroup pointer",
        STAGED,
        LOAD_STAGED,
        "float4 v = x4[j + 8];",
        "oob: .* past the end of threadgroup memory",
    ),
    Broken(
        "private array",
        SOURCE,
        "xs[4 * j + 3] = v.w;",
        "xs[4 * j + 4] = v.w;",
        r"index: array index 32 out of bounds for type '.*float\[32\]'",
    ),
    Broken(
        "private memory",
        SOURCE,
        BEGIN,
        "float big[1 << 16]; for (uint i = 0; i < 65536; i++) big[i] = float(x[i % IN]);"
        " if (big[x[0] < T(0.0f)] == 7.0f) return; " + BEGIN,
        "stack: .* needs more than",
        "",
    ),
    Broken(
        "threadgroup memory",
        STAGED,
        BARRIER,
        "threadgroup float big[16384]; big[thread_id] = 0.0f; " + BARRIER,
        "73728 bytes of threadgroup memory, expected at most 32768",
        "",
    ),
]

VALUES = [
    Broken("private uninitialised", SOURCE, "float sums[ROWS] = {0.0f, 0.0f, 0.0f, 0.0f};", "float sums[ROWS];", None),
    Broken(
        "output read first",
        SOURCE,
        STORE,
        "if (lane == 0) { T old = out[row0 + r]; out[row0 + r] = static_cast<T>(total + 0.0f * float(old)); }",
        "uninit: .* reads out at byte",
    ),
    Broken(
        "output added to",
        SOURCE,
        STORE,
        "if (lane == 0) out[row0 + r] = static_cast<T>(total + 0.0f * float(out[row0 + r]));",
        "uninit: .* reads out at byte",
    ),
    Broken(
        "alignment",
        SOURCE,
        "(const device uint4*)w;",
        "(const device uint4*)(w + 1);",
        "alignment: misaligned access to type 'const .*uint4'.* needs 16 bytes",
        WEIGHT,
    ),
    Broken("shift", SOURCE, "packed >> (4 * i)", "packed >> (8 * i)", "shift: by 32 bits, too many for type 'uint'"),
    Broken(
        "division by zero",
        SOURCE,
        "block / 2]);\n      const float bias",
        "block / (lane / 32)]);\n      const float bias",
        "arithmetic: integer division by zero",
        "block / (lane / 32)]",
    ),
    Broken(
        "signed overflow",
        SOURCE,
        BEGIN,
        "int most = 2147483647; most += int(threads_per_threadgroup.x); if (most == 0) return; " + BEGIN,
        "arithmetic: signed integer overflow",
    ),
    Broken(
        "all lanes write",
        SOURCE,
        STORE,
        "out[row0 + r] = static_cast<T>(total);",
        "race: .* writes out .* of the same threadgroup wrote",
    ),
    Broken(
        "two threadgroups, one row",
        SOURCE,
        "const uint group = threadgroup_position_in_grid.x *",
        "const uint group = threadgroup_position_in_grid.x / 2 *",
        "race: .* writes out .* of another threadgroup wrote",
        STORE,
    ),
    Broken(
        "rows never written",
        SOURCE,
        "r < ROWS; r++) {\n    const float total",
        "r < ROWS - 1; r++) {\n    const float total",
        None,
    ),
    Broken("bits as half", SOURCE, f"float({SCALE})", f"float(as_type<half>({SCALE}))", None),
    Broken("half sum", SOURCE, SUM, "const float total = float(simd_sum(half(sums[r])));", None),
    Broken(
        "bfloat sum",
        SOURCE,
        "sums[r] = dot8<T>(p.w, xs + 24, scale, bias, sums[r]);",
        "sums[r] = float(T(dot8<T>(p.w, xs + 24, scale, bias, sums[r])));",
        None,
    ),
    Broken("term dropped", SOURCE, "metal::fma(bias, x[i], sum)", "sum", None),
    Broken("signed nibble", SOURCE, WHOLE, "float q = float(int(packed << (28 - 4 * i)) >> 28);", None),
]

SIMD = [
    Broken("stride 64", SOURCE, "block += 32", "block += 64", None),
    Broken(
        "lane of 64",
        SOURCE,
        "const uint lane = thread_index_in_simdgroup;",
        "const uint lane = thread_position_in_threadgroup.x % 64;",
        None,
    ),
    Broken(
        "reduction of 16",
        SOURCE,
        SUM,
        "float total = sums[r]; for (ushort m = 8; m > 0; m /= 2) total += simd_shuffle_xor(total, m);",
        None,
    ),
    Broken(
        "shuffle of 64",
        SOURCE,
        SUM,
        "float total = sums[r]; for (ushort m = 32; m > 0; m /= 2) total += simd_shuffle_xor(total, m);",
        r"simd: lane \d+: lane index >= 32",
    ),
    Broken(
        "broadcast from 40",
        SOURCE,
        SUM,
        "float total = simd_broadcast(simd_sum(sums[r]), 40);",
        "simd: .* lane index >= 32, .* 40",
    ),
    Broken(
        "divergent sum",
        SOURCE,
        SUM,
        "float total = 0.0f; if (lane < 16) total = simd_sum(sums[r]);",
        "divergence: lanes of one simdgroup: .* waits at a simdgroup operation",
    ),
    Broken(
        "sum after a return",
        SOURCE,
        "for (uint r = 0; r < ROWS; r++) {\n    const",
        "if (lane == 31) return; for (uint r = 0; r < ROWS; r++) {\n    const",
        "divergence: .* has returned",
        SUM,
    ),
    Broken(
        "sum in a divergent loop",
        SOURCE,
        SUM,
        "float total = 0.0f; for (uint k = 0; k <= lane / 16; k++) total += simd_sum(sums[r]);",
        "divergence",
    ),
    Broken("sum of bool", SOURCE, SUM, "float total = float(simd_sum(lane == 0));", "implicit conversion to bfloat"),
]


@cases(BARRIERS, BOUNDS, VALUES, SIMD)
def test_caught(broken):
    broken.check()
