"""64 clients in a process of their own, some of which leave at random: ``python many_clients.py ADDRESS SECONDS``.

Reads the replies that are right, by question, as JSON from stdin, and prints what was seen as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import httpx

CHAT = "/v1/chat/completions"


def body(question: str, **fields: Any) -> dict[str, Any]:
    """A request for six tokens."""
    messages = [{"role": "user", "content": question}]
    return {"model": "demo", "messages": messages, "max_tokens": 6, "temperature": 0} | fields


async def client(number: int, address: str, end: float, right: dict[str, str], seen: dict[str, Any]) -> None:
    """Asks until the time is over; every third request is left at a random moment."""
    draw = random.Random(number)
    async with httpx.AsyncClient(base_url=address, timeout=120) as http:
        while time.monotonic() < end:
            question = draw.choice(sorted(right))
            if draw.random() < 0.33:
                try:
                    async with http.stream("POST", CHAT, json=body(question, stream=True, max_tokens=100)) as stream:
                        await asyncio.wait_for(anext(stream.aiter_lines(), None), draw.uniform(0, 3))
                except asyncio.TimeoutError:
                    pass
                seen["left"] += 1
                continue
            response = await http.post(CHAT, json=body(question))
            if response.status_code == 429:
                seen["refused"] += 1
                await asyncio.sleep(0.1)
            elif response.status_code != 200:
                seen["wrong"].append(response.text)
            else:
                seen["complete"] += 1
                text = response.json()["choices"][0]["message"]["content"]
                if text != right[question]:
                    seen["wrong"].append([question, text])


async def main(address: str, seconds: float, right: dict[str, str]) -> dict[str, Any]:
    """Runs the clients, and asks `/health` meanwhile."""
    seen: dict[str, Any] = {"complete": 0, "refused": 0, "left": 0, "wrong": [], "health": [], "slept": []}
    end = time.monotonic() + seconds
    clients = [asyncio.create_task(client(number, address, end, right, seen)) for number in range(64)]
    async with httpx.AsyncClient(base_url=address, timeout=120) as http:
        while time.monotonic() < end:
            start = time.monotonic()
            await asyncio.sleep(0.05)
            between = time.monotonic()
            assert (await http.get("/health")).status_code == 200
            seen["health"].append(time.monotonic() - between)
            seen["slept"].append(between - start - 0.05)
    await asyncio.gather(*clients)
    return seen


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], float(sys.argv[2]), json.load(sys.stdin)))))
