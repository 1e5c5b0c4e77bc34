"""Stop a generation from another thread, or with the asyncio task that waits for it.

python examples/cancelling.py [MODEL]
"""

import asyncio
import sys
import threading

from flash_moe import Model


async def whole(model: Model, prompt: str) -> str:
    """Returns a reply as it is streamed."""
    return "".join([chunk.text async for chunk in model.astream(prompt, max_tokens=300)])


async def within(seconds: float, model: Model, prompt: str) -> str:
    """Returns a reply if it takes no longer. When time is up, the work has stopped before this returns."""
    try:
        return await asyncio.wait_for(whole(model, prompt), seconds)
    except asyncio.TimeoutError:
        return "(out of time)"


with Model.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as model:
    stop = threading.Event()
    for chunk in model.stream("What is flash_moe?", max_tokens=300, cancel=stop):
        print(chunk.text, end="", flush=True)
        if not stop.is_set():  # after the first words: in your program, a button or a request that ended
            threading.Thread(target=stop.set).start()
            stop.wait()
    print(f"\n[{chunk.finish_reason}]")
    print(asyncio.run(within(60, model, "Why are experts streamed?")))
