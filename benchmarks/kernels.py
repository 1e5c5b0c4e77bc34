"""The kernels on this machine's GPU, each beside MLX's ops and beside a device copy.

    python benchmarks/kernels.py [--quick]

Operands rotate among copies that together exceed the GPU's caches. Every op is timed with the host that launches it and on
the GPU alone (see gpu_timing.py); results are checked against MLX's before anything is timed.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from typing import Any

import mlx.core as mx
import numpy as np
from gpu_timing import Op, copy_bandwidth

from flash_moe.ops import expert_kernels, kernel, router_kernel
from flash_moe.ops.attention import attention
from flash_moe.ops.causal_conv import causal_conv
from flash_moe.ops.decode_attention import cache_sizes, decode_attention_kernel
from flash_moe.ops.delta_chunks import gated_delta_chunks
from flash_moe.ops.delta_net_step import delta_net_step_kernel, pack_constants
from flash_moe.ops.norm import l2_norm
from flash_moe.ops.norm_kernel import add_rms_norm_kernel
from flash_moe.ops.qk_norm_rope import place, qk_norm_rope_kernel
from flash_moe.ops.quantized_matvec import FUSED, HOISTED, NAIVE, quantized_matvec
from flash_moe.record import PROJECTIONS, ProjectionFormat, Quantization, RecordLayout
from flash_moe.rope import frequencies

H, INTER, EXPERTS, K = 4096, 1024, 512, 4  # Qwen3.5-397B-A17B
Q4 = Quantization(4, 64)
DTYPE = mx.bfloat16


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Stops the benchmark when two results differ by more than ``tolerance`` of the largest value."""
    for a, b in zip(ours, theirs, strict=True):
        a, b = (np.array(x.astype(mx.float32), dtype=np.float64).reshape(-1) for x in (a, b))
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < tolerance, f"results differ by {error:.2e} of the largest value"


def row(name: str, ours: Op, theirs: Op, nbytes: float, copy: float) -> None:
    """Prints µs of both ops, their ratio and the bandwidth of ours, first with launching, then on the GPU alone."""
    cells = [name]
    for ours_s, theirs_s in ((ours.seconds, theirs.seconds), (ours.gpu_seconds, theirs.gpu_seconds)):
        cells += [
            f"{ours_s * 1e6:.1f}",
            f"{theirs_s * 1e6:.1f}",
            f"{theirs_s / ours_s:.2f}",
            f"{nbytes / ours_s / 1e9:.0f}",
        ]
    cells = ["–" if cell == "nan" else cell for cell in cells]
    print("|", " | ".join([*cells, f"{nbytes / copy * 1e6:.1f}"]), "|", flush=True)


def random(*shape: int, dtype: mx.Dtype = DTYPE, scale: float = 1.0) -> mx.array:
    array = (scale * mx.random.normal(shape)).astype(dtype)
    mx.eval(array)
    return array


def matvecs(copy: float, bits: int = 4) -> None:
    for out, columns, copies in ((16384, 4096, 8), (4096, 8192, 12), (248320, 4096, 2)):
        weights = []
        for _ in range(copies):
            parts = mx.quantize(random(out, columns, scale=columns**-0.5), group_size=64, bits=bits)
            mx.eval(parts)
            weights.append(parts)
        nbytes = sum(p.nbytes for p in weights[0])
        operands = [(random(1, columns), *parts) for parts in weights]
        theirs = Op(lambda x, *w, bits=bits: mx.quantized_matmul(x, *w, group_size=64, bits=bits), operands)
        for form, name in ((NAIVE, "naive"), (FUSED, "fma"), (HOISTED, "hoisted")):
            q = Quantization(bits, 64)
            ours = Op(lambda x, *w, q=q, form=form: quantized_matvec(x, *w, q, form=form), operands)
            close([ours(0)], [theirs(0)], 0.02)
            row(f"{bits}-bit matvec {out}×{columns}, {name}", ours, theirs, nbytes, copy)


def moe_block(copy: float) -> None:
    fmt = ProjectionFormat("BF16", Q4)
    layout = RecordLayout.build(H, INTER, dict.fromkeys(PROJECTIONS, fmt))
    count = 64  # records of the bank: several times the caches
    bank = mx.zeros((count, layout.stride // 4), dtype=mx.uint32)
    mx.eval(bank)
    stacked, view = {}, np.array(bank, copy=False).view(np.uint8)
    for name, projection in layout.projections:
        rows, columns = (H, INTER) if name == "down_proj" else (INTER, H)
        parts = mx.quantize(random(count, rows, columns, scale=columns**-0.5), group_size=64, bits=4)
        mx.eval(parts)
        stacked[name] = parts
        for part, array in zip(projection.parts, parts, strict=True):
            data = np.array(array if array.dtype == mx.uint32 else array.view(mx.uint16), copy=False)
            view[:, part.offset : part.offset + part.nbytes] = data.reshape(count, -1).view(np.uint8)
    x, residual = random(1, H), random(1, H)
    weights = mx.array([0.4, 0.3, 0.2, 0.1, 0.5])
    choices = [mx.array([(5 * i + j) % count for j in range(K + 1)], dtype=mx.uint32) for i in range(16)]
    mx.eval(choices, weights)

    def kernels(rows: mx.array) -> mx.array:
        return expert_kernels.experts_for_token(x, bank, weights, layout, rows=rows, residual=residual)

    def chain(rows: mx.array) -> mx.array:
        def qmm(a: mx.array, name: str) -> mx.array:
            return mx.gather_qmm(a, *stacked[name], rhs_indices=rows, group_size=64, bits=4)

        g = qmm(x[None], "gate_proj")
        y = qmm(g * mx.sigmoid(g) * qmm(x[None], "up_proj"), "down_proj")[:, 0]
        return residual + (weights[:, None] * y).sum(axis=0, keepdims=True).astype(DTYPE)

    ours, theirs = (Op(f, [(rows,) for rows in choices]) for f in (kernels, chain))
    close([ours(3)], [theirs(3)], 0.02)
    row("MoE block, K=4 + shared, bank", ours, theirs, (K + 1) * layout.stride, copy)


def delta_net(copy: float) -> None:
    key_heads, heads, dim, taps = 16, 64, 128, 4
    key_dim, value_dim = key_heads * dim, heads * dim
    channels = 2 * key_dim + value_dim
    conv_weight, norm_weight = random(taps, channels, scale=0.5), random(dim)
    log_decay, dt_bias = -mx.exp(random(heads, dtype=mx.float32)), random(heads, dtype=mx.float32)
    states = [random(heads, dim, dim, dtype=mx.float32) for _ in range(24)]
    conv_state = random(taps - 1, channels)
    constants = pack_constants(log_decay, dt_bias, norm_weight, l2_eps=1e-6, eps=1e-6)
    mx.eval(constants)

    def step(projected: mx.array, state: mx.array) -> Any:
        return delta_net_step_kernel(
            projected, conv_state, state, conv_weight=conv_weight, constants=constants, key_heads=key_heads
        )

    def chain(qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, state: mx.array) -> Any:
        mixed, conv = causal_conv(qkv, conv_weight, conv_state)
        qk, v = mx.split(mixed, [2 * key_dim], axis=-1)
        qk = l2_norm(qk.reshape(1, 2, key_heads, dim), 1e-6)
        dt = mx.logaddexp(a.astype(mx.float32) + dt_bias, 0.0)
        y, state = mx.fast.gated_delta_update(
            qk[:, 0][None] * dim**-0.5, qk[:, 1][None], v.reshape(1, 1, heads, dim), mx.exp(dt * log_decay)[None],
            mx.sigmoid(b)[None], state[None],
        )  # fmt: skip
        gate = z.astype(mx.float32)
        y = mx.fast.rms_norm(y, norm_weight, 1e-6).reshape(1, value_dim)
        return (y * (gate * mx.sigmoid(gate))).astype(DTYPE), conv, state[0]

    parts = [[random(1, width) for width in (channels, value_dim, heads, heads)] for _ in states]
    theirs = Op(chain, [(*four, state) for four, state in zip(parts, states, strict=True)])
    ours = Op(step, [(mx.concatenate(four, axis=-1), state) for four, state in zip(parts, states, strict=True)])
    close(ours(1), theirs(1), 0.05)
    row("delta-net step", ours, theirs, 2 * states[0].nbytes, copy)


def prompt_delta_rule(copy: float) -> None:
    key_heads, heads, dim, tokens = 16, 64, 128, 2048
    q, k = (l2_norm(random(tokens, key_heads, dim), 1e-6) for _ in "qk")
    decay = mx.exp(-mx.exp(random(tokens, heads, dtype=mx.float32) - 2))
    operands = q * dim**-0.5, k, random(tokens, heads, dim), decay, mx.sigmoid(random(tokens, heads))
    mx.eval(operands)
    states = [random(heads, dim, dim, dtype=mx.float32) for _ in range(2)]

    def chain(state: mx.array) -> Any:
        y, state = mx.fast.gated_delta_update(*(a[None] for a in operands), state[None])
        return y[0], state[0]

    ours, theirs = (Op(f, [(s,) for s in states]) for f in (lambda state: gated_delta_chunks(*operands, state), chain))
    close(ours(1), theirs(1), 0.02)
    nbytes = sum(a.nbytes for a in operands) + operands[2].nbytes + 2 * states[0].nbytes
    row(f"delta rule, {tokens} tokens", ours, theirs, nbytes, copy)


def attentions(copy: float) -> None:
    heads, kv_heads, dim = 32, 2, 256
    q, gate = random(heads, 1, dim), random(1, heads * dim)
    for context in (1024, 32768, 131072):
        copies = max(2, (1 << 28) // (4 * kv_heads * context * dim))
        caches = [
            (random(1, kv_heads, context, dim), random(1, kv_heads, context, dim)) for _ in range(min(copies, 16))
        ]

        def kernels(k: mx.array, v: mx.array, context: int = context) -> mx.array:
            return decode_attention_kernel(q, k, v, cache_sizes(context, k), gate, dim**-0.5)

        def chain(k: mx.array, v: mx.array) -> mx.array:
            return attention(q, k[0], v[0], dim**-0.5).reshape(1, -1) * mx.sigmoid(gate)

        ours, theirs = (Op(f, caches) for f in (kernels, chain))
        close([ours(0)], [theirs(0)], 0.03)
        row(f"decode attention, {context} keys", ours, theirs, 4 * kv_heads * context * dim, copy)


def small(copy: float) -> None:
    heads, kv_heads, dim = 32, 2, 256
    rows, w = [(random(1, H),) for _ in range(8)], random(H)
    residual = random(1, H)

    def add_norm(x: mx.array) -> Any:
        total = x + residual
        return mx.fast.rms_norm(total, w, 1e-6), total

    ours = Op(lambda x: add_rms_norm_kernel(x, residual, w, 1e-6), rows)
    row("residual + RMSNorm 4096", ours, Op(add_norm, rows), 10 * H, copy)
    logits = [(random(1, EXPERTS, scale=3.0),) for _ in range(8)]
    ours = Op(lambda x: router_kernel.route(x, 10, True), logits)
    row("router, 10 of 512", ours, Op(lambda x: mlx_route(x, 10), logits), 2 * EXPERTS, copy)
    weight = random(dim)
    operands = [(random(1, 2 * heads * dim), random(1, kv_heads * dim)) for _ in range(8)]

    def fused(qg: mx.array, k: mx.array) -> Any:
        return qk_norm_rope_kernel(
            qg, k, weight, weight, place=place(1000, 1), frequencies=frequencies(64, 1e7), eps=1e-6
        )

    def chain(qg: mx.array, k: mx.array) -> Any:
        q, gate = qg.reshape(1, 1, heads, 2 * dim).split(2, axis=-1)
        out = [mx.fast.rms_norm(t, weight, 1e-6).swapaxes(1, 2) for t in (q, k.reshape(1, 1, kv_heads, dim))]
        out = [mx.fast.rope(t, 64, traditional=False, base=1e7, scale=1.0, offset=1000) for t in out]
        return out[0][0], out[1][0], mx.contiguous(gate.reshape(1, -1))

    ours, theirs = Op(fused, operands), Op(chain, operands)
    close(ours(0), theirs(0), 0.03)
    row("q/k norm + RoPE + split", ours, theirs, 4 * operands[0][0].nbytes, copy)


def mlx_route(logits: mx.array, k: int) -> Any:
    p = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
    ids = mx.argpartition(-p, kth=k - 1, axis=-1)[:, :k]
    w = mx.take_along_axis(p, ids, axis=-1)
    return ids, w / w.sum(axis=-1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only 4-bit matvecs and the MoE block")
    quick = parser.parse_args().quick
    if kernel.back_end() is None:
        raise SystemExit("no GPU that MLX can use was found; kernels need Metal or CUDA")
    mx.random.seed(0)
    copy = copy_bandwidth()
    info = mx.device_info()
    name = info.get("device_name", platform.machine())
    print(f"{datetime.date.today()}, {name}, mlx {mx.__version__}; a device copy moves {copy / 1e9:.0f} GB/s")
    timed = "ours µs | MLX µs | times faster | ours GB/s"
    print(f"\n| op (bfloat16) | {timed} | GPU alone: {timed} | floor µs |\n{'|---' * 10}|")
    parts = [matvecs, moe_block] + ([] if quick else [delta_net, prompt_delta_rule, attentions, small])
    for part in parts:
        try:
            part(copy)
        except Exception as error:  # one op that fails must not hide the others
            print(
                f"| {part.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:160]} |{' |' * 9}", flush=True
            )
    if not quick:
        matvecs(copy, bits=2)


if __name__ == "__main__":
    main()
