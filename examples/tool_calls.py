"""Let a model call a function of yours, and answer from what it returns.

python examples/tool_calls.py [MODEL]
"""

import json
import sys

from flash_moe import Model


def get_weather(city: str, days: int = 1) -> dict[str, object]:
    """Returns the weather of a city for some days.

    Args:
        city: its name.
        days: how many to look ahead.
    """
    return {"condition": "windy", "temperature": 5 + days}  # a stand-in for a service that knows


with Model.load(sys.argv[1] if len(sys.argv) > 1 else "demo", experts_per_token=None) as model:
    chat = model.chat(tools=[get_weather], temperature=0, max_tokens=200)
    for chunk in chat.stream("What is the weather like in Oslo for 3 days?"):
        print(chunk.text, end="", flush=True)
        if chunk.tool_result is not None and chunk.tool_result.call is not None:
            call = chunk.tool_result.call
            print(f"{call.name}({json.dumps(call.arguments)}) -> {chunk.tool_result.content}")
    print()
