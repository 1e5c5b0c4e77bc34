"""Let a model call a function of yours, and answer from what it returns.

python examples/tool_calls.py [MODEL]
"""

import json
import sys

from flash_moe import Model
from flash_moe.text.tool_calls import parse_tool_calls


def parking(city: str, hours: int = 1) -> dict[str, int]:
    """A stand-in for a service that knows."""
    return {"free_spaces": 40 + len(city) * hours}


tools = [
    {
        "type": "function",
        "function": {
            "name": "find_parking",
            "description": "Counts the free parking spaces in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "hours": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
messages = [{"role": "user", "content": "Is there free parking in Brno for 3 hours?"}]

with Model.load(sys.argv[1] if len(sys.argv) > 1 else "demo", experts_per_token=None) as model:
    reply = model.generate(messages, tools=tools, temperature=0, max_tokens=200)
    calls, said = parse_tool_calls(reply.text, tools)
    messages.append(
        {"role": "assistant", "content": said, "tool_calls": [{"type": "function", "function": call} for call in calls]}
    )
    for call in calls:
        result = parking(**call["arguments"])
        print(f"{call['name']}({json.dumps(call['arguments'])}) -> {json.dumps(result)}")
        messages.append({"role": "tool", "content": json.dumps(result)})
    print(model.generate(messages, tools=tools, temperature=0, max_tokens=200))
