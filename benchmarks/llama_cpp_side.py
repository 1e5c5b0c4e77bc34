"""llama.cpp's side of llama_cpp.py, for an environment of its own: pip install llama-cpp-python gguf.

python llama_cpp_side.py write MODEL.gguf '{"hidden_size": 2048, ...}'     made-up weights, Q4_0
python llama_cpp_side.py run MODEL.gguf THREADS '[16, 256]' TOKENS         one line of JSON
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path = sys.path[1:]  # where llama_cpp.py would hide the library
RNG = np.random.default_rng(0)


def write(path: str, c: dict[str, Any]) -> None:
    import gguf

    out = gguf.GGUFWriter(path, "qwen35moe")
    hidden, width, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    hk, hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
    dk, dv = c["linear_key_head_dim"], c["linear_value_head_dim"]
    out.add_block_count(c["num_hidden_layers"])
    out.add_context_length(c["max_position_embeddings"])
    out.add_embedding_length(hidden)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(dim)
    out.add_value_length(dim)
    out.add_rope_freq_base(1e7)
    out.add_rope_dimension_count(dim // 4)
    out.add_rope_dimension_sections([11, 11, 10, 0])
    out.add_layer_norm_rms_eps(1e-6)
    out.add_expert_count(experts)
    out.add_expert_used_count(c["num_experts_per_tok"])
    out.add_expert_feed_forward_length(width)
    out.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
    out.add_ssm_conv_kernel(c["linear_conv_kernel_dim"])
    out.add_ssm_state_size(dk)
    out.add_ssm_group_count(hk)
    out.add_ssm_time_step_rank(hv)
    out.add_ssm_inner_size(hv * dv)
    out.add_full_attention_interval(c["full_attention_interval"])
    out.add_tokenizer_model("no_vocab")
    out.add_vocab_size(c["vocab_size"])

    def plain(name: str, *shape: int, value: float | None = None) -> None:
        array = RNG.standard_normal(shape) * 0.02 if value is None else np.full(shape, value)
        out.add_tensor(name, array.astype(np.float32))

    def q4(name: str, *shape: int) -> None:
        blocks = RNG.integers(0, 256, (*shape[:-1], shape[-1] // 32, 18), dtype=np.uint8)
        for digit in (
            0x0F,
            0xF0,
        ):  # no zeros, which stand for -8: the mean is zero, and the router sees tokens that differ
            blocks[(blocks & digit) == 0] |= 0x88 & digit
        blocks[..., :2] = np.array([0.004], np.float16).view(np.uint8)
        out.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    q4("token_embd.weight", c["vocab_size"], hidden)
    q4("output.weight", c["vocab_size"], hidden)
    plain("output_norm.weight", hidden, value=1)
    for i in range(c["num_hidden_layers"]):
        at = f"blk.{i}."
        plain(at + "attn_norm.weight", hidden, value=1)
        plain(at + "post_attention_norm.weight", hidden, value=1)
        if (i + 1) % c["full_attention_interval"] == 0:
            q4(at + "attn_q.weight", 2 * heads * dim, hidden)
            q4(at + "attn_k.weight", kv_heads * dim, hidden)
            q4(at + "attn_v.weight", kv_heads * dim, hidden)
            q4(at + "attn_output.weight", hidden, heads * dim)
            plain(at + "attn_q_norm.weight", dim, value=1)
            plain(at + "attn_k_norm.weight", dim, value=1)
        else:
            q4(at + "attn_qkv.weight", 2 * hk * dk + hv * dv, hidden)
            q4(at + "attn_gate.weight", hv * dv, hidden)
            q4(at + "ssm_beta.weight", hv, hidden)
            q4(at + "ssm_alpha.weight", hv, hidden)
            plain(at + "ssm_conv1d.weight", 2 * hk * dk + hv * dv, c["linear_conv_kernel_dim"])
            plain(at + "ssm_dt.bias", hv)
            plain(at + "ssm_a", hv, value=-1)
            plain(at + "ssm_norm.weight", dv, value=1)
            q4(at + "ssm_out.weight", hidden, hv * dv)
        plain(at + "ffn_gate_inp.weight", experts, hidden)
        plain(at + "ffn_gate_inp_shexp.weight", hidden)
        for kind, count, inner in (("exps", (experts,), width), ("shexp", (), c["shared_expert_intermediate_size"])):
            q4(f"{at}ffn_gate_{kind}.weight", *count, inner, hidden)
            q4(f"{at}ffn_up_{kind}.weight", *count, inner, hidden)
            q4(f"{at}ffn_down_{kind}.weight", *count, hidden, inner)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def run(path: str, threads: int, prompts: list[int], tokens: int) -> dict[str, Any]:
    """Milliseconds of prompts, the best of two or of one long one, and of single tokens, median."""
    import llama_cpp.llama_cpp as library
    from llama_cpp import Llama

    if os.environ.get("LLAMA_REPACK") == "off":
        usual = library.llama_model_default_params

        def as_stored() -> Any:
            params = usual()
            params.use_extra_bufts = False
            return params

        library.llama_model_default_params = as_stored

    model = Llama(
        path, n_ctx=4096, n_threads=threads, n_threads_batch=threads, n_batch=2048, n_ubatch=512, verbose=False
    )
    ids = RNG.integers(0, model.n_vocab(), 4096).tolist()
    model.eval(ids[:16])
    found: dict[str, Any] = {}
    for length in prompts:
        found[f"prompt {length}"] = min(_timed(model, ids[:length]) for _ in range(2 if length < 1000 else 1))
    if not tokens:
        return found
    model.reset()
    model.eval(ids[:16])
    times, before = [], _disk_bytes_read()
    for token in ids[16 : 16 + tokens]:
        start = time.perf_counter()
        model.eval([token])
        times.append(1e3 * (time.perf_counter() - start))
    read = (_disk_bytes_read() - before) / 1e6 / tokens
    return found | {"token": float(np.median(times)), "MB from the disk, a token": read}


def _disk_bytes_read() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _timed(model: Any, ids: list[int]) -> float:
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], json.loads(sys.argv[3]))
    else:
        print(json.dumps(run(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5]))))
