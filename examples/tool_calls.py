"""Let a model call a function of yours, and answer from what it returns.

python examples/tool_calls.py [MODEL]
"""

import json
import sys

from flash_moe import Model, parse_tool_calls


def get_weather(city: str, days: int = 1) -> dict[str, object]:
    """A stand-in for a service that knows."""
    return {"condition": "windy", "temperature": 5 + days}


schema = {
    "name": "get_weather",
    "description": "Returns the weather of a city for some days.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
tools = [{"type": "function", "function": schema}]
messages = [{"role": "user", "content": "What is the weather like in Oslo for 3 days?"}]

with Model.load(sys.argv[1] if len(sys.argv) > 1 else "demo", experts_per_token=None) as model:
    reply = model.generate(messages, tools=tools, temperature=0, max_tokens=200)
    calls, said = parse_tool_calls(reply.text, tools)
    made = [{"type": "function", "function": call} for call in calls]
    messages.append({"role": "assistant", "content": said, "tool_calls": made})
    for call in calls:
        result = get_weather(**call["arguments"])
        print(f"{call['name']}({json.dumps(call['arguments'])}) -> {json.dumps(result)}")
        messages.append({"role": "tool", "content": json.dumps(result)})
    print(model.generate(messages, tools=tools, temperature=0, max_tokens=200))
