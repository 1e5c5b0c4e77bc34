"""Any MoE of mlx-lm, larger than memory: python stream_mlx_lm.py FOLDER "a question" """

import sys

from mlx_lm import load, stream_generate

import flash_moe

folder, question = sys.argv[1:]
model, tokenizer = load(folder, lazy=True)
store = flash_moe.stream_experts(model, folder)

prompt = question
if tokenizer.chat_template is not None:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
for reply in stream_generate(model, tokenizer, prompt, max_tokens=200):
    print(reply.text, end="", flush=True)
print(
    f"\n{store.stats.bytes_requested / 1e9:.1f} GB of experts asked for, {store.stats.bytes_missing / 1e9:.1f} GB read"
)
