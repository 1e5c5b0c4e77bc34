"""What the demo model makes of requests and questions in words that its training data does not have.

    python benchmarks/demo_held_out.py [MODEL] [--requests FILE] [--questions FILE] [--limit N] [--show]

Both files in models/eval were written before anybody read the generator, and tools/demo_model refuses to train on their
texts and on the names of their functions. Replies are greedy, at the model's own K; calls are held to their schemas.

A request has "messages", "tools", the "calls" that are right, and sometimes "also": other calls that are as right. Texts
are compared without regard to case, to the mark at the end and to the kind of apostrophe. A question has "true": patterns
that must all match the answer, and sometimes "false": patterns that must not. An answer must also make none of the false
claims of CLAIMS, which are about platforms, sizes and features. Patterns see no sense: read the answers too (--show).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flash_moe import Model, ToolCallError, parse_tool_calls
from flash_moe.evaluation.tool_call_score import same_calls

EVAL = Path(__file__).parents[1] / "models" / "eval"
NOT = re.compile(r"\b(?:no|not|nobody|neither|nor|never|cannot|without|unsupported|only|ignored|untested)\b|n't\b")
CLAIMS = {  # a sentence that matches and does not say "not"
    "Windows": r"\bwindows\b",
    "Intel Macs": r"\bintel\b",
    "vision": r"\b(?:images?|pictures?|photos?|vision|audio|video)\b",
    "tried on a Mac": r"\b(?:tested|measured|tried|timed|ran) on (?:a|real|many|all|every) macs?\b",
    "training": r"\b(?:fine-?tun\w+|trains? models?)\b",
    "a size": r"\b209 GB\b|\b(?:7|8|12|16) GB (?:of|for) the (?:weights|resident)|\b(?!18\b)\d+ million parameters",
    "a server's lack": r"\bno server\b|\bno chat\b",
}


def plain(value: Any) -> Any:
    """A value as it is compared."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.casefold().replace("’", "'").strip().rstrip(".!?") if isinstance(value, str) else value


def plain_calls(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": call["name"], "arguments": plain(call["arguments"])} for call in calls]


def is_right(request: dict[str, Any], raw_text: str) -> bool:
    """Whether the calls of a reply are those of a request."""
    try:
        calls, _ = parse_tool_calls(raw_text, request["tools"])
    except ToolCallError:
        return False
    return any(
        same_calls(plain_calls(calls), plain_calls(right)) for right in (request["calls"], *request.get("also", ()))
    )


def false_claims(question: dict[str, Any], answer: str) -> list[str]:
    """What an answer says that is not so."""
    text = answer.casefold()
    found = [pattern for pattern in question.get("false", ()) if re.search(pattern, text)]
    for sentence in re.split(r"(?<=[.!?:;])\s+", answer):
        if not NOT.search(sentence.casefold()):
            found += [name for name, claim in CLAIMS.items() if re.search(claim, sentence, re.IGNORECASE)]
    if re.search(CLAIMS["a size"], answer, re.IGNORECASE) or re.search(CLAIMS["a server's lack"], text):
        found.append("a size or a server's lack")
    return found


def is_true(question: dict[str, Any], answer: str) -> bool:
    """Whether an answer says what it must, and nothing false."""
    says = all(re.search(pattern, answer.casefold().replace("’", "'")) for pattern in question["true"])
    return says and not false_claims(question, answer)


def replies(
    model: Model, requests: Sequence[dict[str, Any]], questions: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Each request with the raw text of the reply, then each question with its answer."""
    for request in requests:
        reply = model.generate(
            request["messages"],
            tools=request["tools"],
            max_tokens=200,
            temperature=0,
            enable_thinking=False,
            strict_tools=True,
        )
        yield request, reply.raw_text
    for question in questions:
        yield question, model.generate(question["question"], max_tokens=150, temperature=0, enable_thinking=False).text


def read(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()[:limit]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--requests", type=Path, default=EVAL / "plain_requests.jsonl")
    parser.add_argument("--questions", type=Path, default=EVAL / "questions.jsonl")
    parser.add_argument("--limit", type=int, help="use only the first of each file")
    parser.add_argument("--show", action="store_true", help="show every reply")
    options = parser.parse_args()
    requests, questions = read(options.requests, options.limit), read(options.questions, options.limit)
    right = fitting = true = false = 0
    with Model.load(options.model, experts_per_token=None, expert_io="resident", progress=False) as model:
        for case, text in replies(model, requests, questions):
            if "question" in case:
                good, claims = is_true(case, text), false_claims(case, text)
                true += good
                false += bool(claims)
                asked, verdict = case["question"], ("true" if good else "NOT TRUE", *claims)
            else:
                good = is_right(case, text)
                right += good
                fitting += good and bool(case["calls"])
                asked, verdict = case["messages"][-1]["content"], ("right" if good else "WRONG",)
            if options.show:
                print(*verdict, "|", asked, "|", text)
    with_tool = sum(bool(request["calls"]) for request in requests)
    print(f"requests: {right} of {len(requests)} right, {fitting} of the {with_tool} that a tool fits")
    print(f"questions: {true} of {len(questions)} answered truly, {false} with a false claim")


if __name__ == "__main__":
    main()
