"""Any MoE of mlx-lm, larger than memory: python stream_mlx_lm.py FOLDER "a question" """

import argparse

from mlx_lm import load, stream_generate

import flash_moe

parser = argparse.ArgumentParser(description="Streams the experts of a model that mlx-lm runs.")
parser.add_argument("folder", help="an MLX checkpoint; mlx-lm cannot load the demo model")
parser.add_argument("question")
arguments = parser.parse_args()

model, tokenizer = load(arguments.folder, lazy=True)
store = flash_moe.stream_experts(model, arguments.folder)

prompt = arguments.question
if tokenizer.chat_template is not None:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
for reply in stream_generate(model, tokenizer, prompt, max_tokens=200):
    print(reply.text, end="", flush=True)
print(
    f"\n{store.stats.bytes_requested / 1e9:.1f} GB of experts asked for, {store.stats.bytes_missing / 1e9:.1f} GB read"
)
