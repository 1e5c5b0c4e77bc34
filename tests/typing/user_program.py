# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A small program of a user, which mypy --strict and pyright check in CI. It runs, too."""

from __future__ import annotations

from collections.abc import Iterator

from flash_moe import Chunk, FlashMoEError, Generation, Model


def ask(model: Model, question: str) -> str:
    reply = model.generate(question, max_tokens=20, temperature=0.0, stop=["\n"])
    text: str = reply.text
    tokens: tuple[int, ...] = reply.tokens
    speed: float = reply.stats.generated_tokens_per_second
    print(tokens, speed, reply.finish_reason)
    return text


def stream(model: Model) -> Iterator[Chunk]:
    messages = [{"role": "user", "content": "What is the page cache?"}]
    for chunk in model.stream(messages, max_tokens=8, seed=1):
        print(chunk.text, end="")
        yield chunk


def mistakes(model: Model) -> None:
    """What type checkers must find: where one is not found, its comment is too many."""
    reply: int = model.generate("Hi").text  # type: ignore[assignment]
    model.generate("Hi", max_tokens="many")  # type: ignore[call-overload]
    model.generate("Hi", no_such_option=reply)  # type: ignore[call-overload]


def main() -> None:
    try:
        with Model.load("demo", experts_per_token=None, expert_io="mapped", prefetch=True) as model:
            print(ask(model, "What is flash_moe?"))
            last: Chunk = list(stream(model))[-1]
            print(last.stats.to_dict(), model.logits([1, 2, 3], last=1).shape, model.tokenizer.encode("Hi"))
            replies: list[Generation] = [model.generate([1, 2, 3], max_tokens=2)]
            print(replies)
    except FlashMoEError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
