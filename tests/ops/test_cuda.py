"""The CUDA adapter: what it refuses, and that nvcc compiles what it makes of every kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_cuda import Recorder
from test_experts import FORMATS, make_records

from flash_moe.formats import Quantization
from flash_moe.ops import kernel, kernel_sources
from flash_moe.ops.cuda import check, cuda_source
from flash_moe.ops.decode_attention import cache_sizes, decode_attention_kernel
from flash_moe.ops.delta_net_step import delta_net_step_kernel, pack_constants
from flash_moe.ops.expert_kernels import experts_for_token
from flash_moe.ops.norm_kernel import add_rms_norm_kernel
from flash_moe.ops.qk_norm_rope import place, qk_norm_rope_kernel
from flash_moe.ops.quantized_matvec import FUSED, HOISTED, NAIVE, quantized_matvec
from flash_moe.ops.router_kernel import route
from flash_moe.rope import frequencies

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}
VARIANT = re.compile(r"(_[0-9a-f]{8})?_\d+$")  # of a kernel: generated text and launch
KERNELS = [path.stem for path in kernel_sources.folder().glob("*.metal") if not path.stem.endswith(".h")]

REFUSED = {
    "metal::erf(x)": "this name of namespace metal",
    "metal::fast::tanh(x)": "this function of metal::fast",
    "metal::precise::exp(x)": "functions of metal::precise",
    "float y = exp(x);": "an unqualified function",
    "uint y = max(a, b);": "an unqualified function",
    "simd_prefix_inclusive_sum(x)": "this simdgroup function",
    "simdgroup_float8x8 m;": "simdgroup matrices",
    "simdgroup_matrix<float, 8, 8> m;": "simdgroup matrices",
    "quad_sum(x)": "quadgroups",
    "atomic_fetch_add_explicit(p, 1, memory_order_relaxed)": "atomics",
    "device atomic<float>* p;": "atomics",
    "texture2d<float> t;": "textures",
    "int x [[threadgroup(0)]];": "attributes in brackets",
    "float2 y = v.xy;": "swizzles",
    "float y = v.r;": "colour components",
    "half y = 1.5h;": "half literals",
    "float4x4 m;": "matrices",
    "packed_float3 p;": "packed vectors",
    "#include <metal_simdgroup>": "includes",
    "static constexpr constant int n = 3;": "static and program-scope variables",
    "constant float table[2] = {1, 2};": "static and program-scope variables",
    "uint n = threads_per_grid.x;": "this attribute",
    "uint n = thread_execution_width;": "this attribute",
    "uint n = dispatch_threads_per_threadgroup.x;": "this attribute",
    "threadgroup_imageblock float x;": "this threadgroup function",
    "kernel void f() {}": "this keyword",
    "const constant int& n = m[0];": "`const` beside `constant`",
}


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.parametrize("place", ["body", "header"])
def test_unsupported_constructs_are_refused_with_their_line(text: str, place: str) -> None:
    source = f"// a comment\nfloat z = 0.0f;\n{text}\n"
    body, header = (source, "") if place == "body" else ("", source)
    with pytest.raises(ValueError, match=rf"{place} line 3: no support for {REFUSED[text]}"):
        check(body, header)


def test_threadgroup_variables_belong_in_the_body() -> None:
    for declaration in ("threadgroup float x[32];", "threadgroup uint n;"):
        with pytest.raises(ValueError, match="header line 2: no support for threadgroup memory other than"):
            check("", "METAL_FUNC void f() {\n  " + declaration + "\n}")
        check(f"int y;\n{declaration}", "")


@pytest.mark.parametrize("text", ["float* p = x;", "const vec<float, 4>& v = x[0];", "uint (&p)[4] = x;"])
def test_pointers_to_threadgroup_memory_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="body line 2: no support for threadgroup memory other than"):
        check(f"int y;\nthreadgroup {text}", "")


def test_every_problem_is_reported_and_comments_are_not_read() -> None:
    with pytest.raises(ValueError, match=r"(?s)header line 2.*body line 1.*body line 3"):
        check("v.xy;\n/* v.zw\n*/ quad_sum(x); // atomic", "\nmetal::erf(x)")


def test_the_text_is_short_and_changes_with_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    body, header = cuda_source("expert_down", ["quantized"], "#define X 1\n")
    assert len(body) + len(header) < 2000  # MLX hashes it at every launch
    assert "const auto thread_index_in_simdgroup" in body and "#define X 1" in header
    read = kernel_sources.read
    monkeypatch.setattr(kernel_sources, "read", lambda name: read(name) + "\n")
    changed = cuda_source("expert_down", ["quantized"], "#define X 1\n")
    assert changed[0] != body and changed[1] != header


def launch_all() -> None:
    """Every kernel at least once, with each dtype, form and bit width."""
    for bits, (dtype, form) in zip((2, 3, 4, 5, 6, 8), [(d, f) for d in DTYPES for f in (FUSED, HOISTED)], strict=True):
        weight = mx.quantize(mx.zeros((64, 256)), bits=bits, group_size=64)
        quantized_matvec(mx.zeros((bits, 256), dtype=DTYPES[dtype]), *weight, Quantization(bits, 64), form=form)
    rng = np.random.RandomState(0)
    records, layout, _ = make_records(2, FORMATS["mixed"], "BF16", rng)
    x = mx.zeros((1, 128), dtype=mx.bfloat16)
    weights = mx.zeros(2)
    experts_for_token(x, records, weights, layout, form=NAIVE)
    experts_for_token(x, list(records), weights, layout, residual=x)
    experts_for_token(x, records, mx.zeros(3), layout, shared=records[0], residual=x)
    route(mx.zeros((2, 512), dtype=mx.bfloat16), 10, True)
    route(mx.zeros((2, 70)), 8, False)
    route(mx.zeros((1, 70)), 8, True, mx.zeros((1, 1)))
    for dtype in DTYPES.values():
        launch_sequence_kernels(dtype)


def launch_sequence_kernels(dtype: mx.Dtype) -> None:
    def zeros(*shape: int) -> mx.array:
        return mx.zeros(shape, dtype=dtype)

    add_rms_norm_kernel(zeros(1, 256), zeros(1, 256), zeros(256), 1e-6)
    qk_norm_rope_kernel(
        zeros(1, 8 * 2 * 64), zeros(1, 2 * 64), zeros(64), zeros(64),
        place=place(5, 1), frequencies=frequencies(16, 1e7), eps=1e-6,
    )  # fmt: skip
    keys = zeros(2, 256, 64)
    decode_attention_kernel(zeros(8, 1, 64), keys, keys, cache_sizes(200, keys), zeros(1, 8 * 64), 0.125)
    heads, key_heads, dim = 4, 2, 64
    channels = (2 * key_heads + heads) * dim
    constants = pack_constants(zeros(heads), zeros(heads), zeros(dim), l2_eps=1e-6, eps=1e-6)
    delta_net_step_kernel(
        zeros(1, channels + heads * dim + 2 * heads), zeros(3, channels), mx.zeros((heads, dim, dim)),
        conv_weight=zeros(4, channels), constants=constants, key_heads=key_heads,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cuda_sources() -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder()
        patch.setattr(mx.fast, "cuda_kernel", recorder.cuda_kernel)
        patch.setattr(kernel, "back_end", lambda: "cuda")
        launch_all()
    return recorder.sources


def test_every_kernel_is_adapted(cuda_sources: dict[str, str]) -> None:
    assert {VARIANT.sub("", name) for name in cuda_sources} == set(KERNELS)


def together(texts: list[str]) -> list[str]:
    """Launches whose headers are the same, in one source: nvcc needs longer to read MLX's headers than to compile a kernel."""
    kernels: dict[str, list[str]] = {}
    for number, text in enumerate(texts):
        head, start, kernel = text.rpartition("namespace mlx::core::cu {")
        kernels.setdefault(head, []).append(re.sub(r"custom_kernel_\w+", rf"\g<0>_{number}", start + kernel, count=1))
    return [head + "".join(found) for head, found in kernels.items()]


FEW = ("router", "quantized_matvec", "expert_gate_up")  # the others are compiled by `make test-full`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in KERNELS]
)
def test_nvcc_compiles(name: str, cuda_sources: dict[str, str], tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc, the CUDA compiler")
    command = [nvcc, "-arch=sm_90", "-std=c++17", "-diag-suppress=177", "-cubin", "-o", str(tmp_path / "out")]
    launches = [text for found, text in cuda_sources.items() if VARIANT.sub("", found) == name]
    for number, text in enumerate(together(launches)):
        file = tmp_path / f"{number}.cu"
        file.write_text(text)
        done = subprocess.run([*command, str(file)], capture_output=True, text=True)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
