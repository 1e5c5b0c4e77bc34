"""Talk in turns, keep the conversation in a file, and go on later without running it again.

python examples/conversation.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from flash_moe import Model

with Model.load(sys.argv[1] if len(sys.argv) > 1 else "demo", experts_per_token=None) as model:
    chat = model.chat("You are terse.", temperature=0, max_tokens=60)
    print(chat.send("What is flash_moe?"))
    print(chat.send("Which experts does a token use?"))

    chat.undo()  # as if the second question had never been asked
    other = chat.fork()  # two ways on from here
    chat.send("What does K mean?", prefill="K is")
    print(chat.messages[-1]["content"])

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "talk.flashmoe"
        other.save(file)
        reply = model.open_chat(file).send("How large is it?")
    print(f"{reply.stats.reused_tokens} of {reply.stats.prompt_tokens} tokens of the prompt were read from the file")
