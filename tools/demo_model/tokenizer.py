"""Trains the demo model's tokenizer and writes it with everything a checkpoint needs beside its weights.

    PYTHONPATH=tools python -m demo_model.tokenizer FOLDER

A byte-level BPE of 4,096 tokens with the added tokens of the Qwen family. Text is split as Qwen2 does it, digits one by
one, except that only a space may begin a word: a name is then cut the same way behind `"`, `=` and `.`, and copying one
from a schema into a call is copying its tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .data import conversation
from .data.splits import TRAIN
from .render import render

VOCABULARY = 4096
CONTEXT = 4096
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, START, STOP)
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train(conversations: int = 20_000, seed: int = 0) -> Tokenizer:
    """A tokenizer learned from generated conversations; the same for the same arguments."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(conversations, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tokenizer


def _texts(conversations: int, seed: int) -> Iterator[str]:
    """Text between added tokens."""
    rng = Random(f"tokenizer/{seed}")
    tokens = re.compile("|".join(re.escape(token) for token in SPECIAL + ADDED))
    for _ in range(conversations):
        yield from filter(None, tokens.split(render(conversation(rng, TRAIN))))


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": STOP,
        "pad_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    generation = {"do_sample": False, "eos_token_id": [ids[STOP], ids[END]], "pad_token_id": ids[END]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.copyfile(_TEMPLATE, folder / "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = train(arguments.conversations, arguments.seed)
    write(tokenizer, arguments.folder)
    print(f"{arguments.folder}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
