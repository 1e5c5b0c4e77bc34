"""The table of docs/families.md: every cell comes from a run. ``python tests/adapted/family_table.py`` writes it anew."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
from family_checkpoints import FAMILIES, OWN, USUAL, checkpoint, plain
from mlx_lm.models.cache import make_prompt_cache
from published import PUBLISHED

from flash_moe import FlashMoEError, Model, convert, parse_tool_calls

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = (
    "| model type | quantised as | loads, reading no expert | logits: difference | greedy tokens | names of the hub | packed "
    "| tool calls |\n|---|---|---|---|---|---|---|---|\n"
)
PROMPT = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5, 44, 91, 12, 0, 201]
CALLS = {  # how chat templates have a call of get_weather(city="Oslo") written
    "JSON": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "XML": "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    "GLM": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>",
    "Kimi": '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": '
    '"Oslo"}<|tool_call_end|><|tool_calls_section_end|>',
    "MiniMax": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "Mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}',
    "Gemma": '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|>',
    "Longcat": "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Oslo"
    "</longcat_arg_value>\n</longcat_tool_call>",
    "Python": '<|tool_call_start|>[get_weather(city="Oslo")]<|tool_call_end|>',
    "Harmony": '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
    "DeepSeek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>",
}
FORMATS = {  # of published models of these types, as far as the authors know
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "bailing_moe", "granitemoehybrid", "exaone_moe"), "JSON"
    ),
    **dict.fromkeys(("step3p5", "mimo_v2_flash", "nemotron_h"), "XML"),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), "GLM"),
    **dict.fromkeys(("kimi_k2", "kimi_k25", "kimi_linear"), "Kimi"),
    **dict.fromkeys(("minimax", "minimax_m2"), "MiniMax"),
    **dict.fromkeys(("mixtral", "mistral4"), "Mistral"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "Gemma"),
    **dict.fromkeys(("longcat_flash", "longcat_flash_ngram"), "Longcat"),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32"), "DeepSeek"),
    "lfm2_moe": "Python",
    "gpt_oss": "Harmony",
}


def row(name: str, folder: Path) -> str:
    """What a tiny checkpoint of a family does, as a line of the table."""
    source = checkpoint(name, folder / "mlx")
    expected, tokens = _of_mlx_lm(source)
    with Model.load(source) as model:
        loads = "yes" if model.expert_store.stats.bytes_requested == 0 else "reads experts"
        difference = _difference(model, expected)
        model.tokenizer.eos_token_ids = frozenset()
        same = list(model.generate(PROMPT, max_tokens=len(tokens), temperature=0.0).tokens) == tokens
        assert model.expert_store.stats.bytes_requested > 0
    cells = [name, USUAL.get(name, "affine"), loads, f"{difference:g}", "equal" if same else "differ"]
    cells += [_published(name, folder), _packed(source, folder / "packed", expected), _calls(name)]
    return f"| {' | '.join(cells)} |\n"


def _of_mlx_lm(folder: Path) -> tuple[np.ndarray, list[int]]:
    network = plain(folder)
    cache, tokens, new = make_prompt_cache(network), list[int](), PROMPT
    for _ in range(6):
        tokens.append(int(mx.argmax(network(mx.array([new]), cache=cache)[0, -1])))
        new = tokens[-1:]
    return np.array(network(mx.array([PROMPT]))[0].astype(mx.float32)), tokens


def _difference(model: Model, expected: np.ndarray) -> float:
    return float(np.abs(np.array(model.logits(PROMPT)) - expected).max())


def _published(name: str, folder: Path) -> str:
    if name not in PUBLISHED:
        return "not tried"
    source = checkpoint(name, folder / "hub", mode="mxfp4" if name == "gpt_oss" else None, published=True)
    try:
        with Model.load(source) as model:
            read, difference = model.expert_store.stats.bytes_requested, _difference(model, _of_mlx_lm(source)[0])
    except FlashMoEError as error:
        return type(error).__name__
    return f"differ by {difference:g}" if read == 0 else "reads experts"


def _packed(source: Path, packed: Path, expected: np.ndarray) -> str:
    convert(source, packed, progress=False)
    with Model.load(packed) as model:
        return f"differ by {_difference(model, expected):g}"


def _calls(name: str) -> str:
    if (written := FORMATS.get(name)) is None:
        return "not known"
    try:
        calls, _ = parse_tool_calls(CALLS[written])
    except FlashMoEError:
        calls = []
    return f"{written}: {'yes' if calls == [{'name': 'get_weather', 'arguments': {'city': 'Oslo'}}] else 'no'}"


def main() -> None:
    """Writes the rows of families given on the command line, or all, into the page."""
    mx.disable_compile()
    text, table = PAGE.read_text(encoding="utf-8").split("| model type")
    rows = {line.split(" | ")[0].removeprefix("| "): f"{line}\n" for line in table.splitlines()[2:]}
    for name in sys.argv[1:] or [name for name in FAMILIES if name not in OWN]:
        with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            rows[name] = row(name, Path(folder))
        kept = (rows[name] for name in FAMILIES if name in rows)
        PAGE.write_text(text + HEAD + "".join(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
