"""Questions about flash_moe, about running large Mixture-of-Experts models, and about the demo model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .chat import Dialogue
from .everyday import filled
from .rewording import reworded
from .splits import belongs, pick
from .text import Phrase, phrase, phrases, read_table, say

_POLITE = phrases(
    "[Hi|Hello|Hey]! {q}; [Hi|Hello|Hey], {l}; Please tell me: {l}; [Quick|One] question: {l}; Tell me, {l}; I wonder: {l};"
    "[Sorry, |]{l} Thanks!; I am new here. {q}; Can you tell me: {l}; Another question. {q}; {q} Please explain.;"
    "Just curious: {l}; I have a question. {q}; [So|And|Okay], {l}; Good [morning|evening]! {q}; {q} Thank you!"
)
_SHORTER = phrases(
    "[Can|Could] you say that shorter?; [Shorter|Briefly|In short], please.; In one [sentence|line]?; Too long.; tl;dr"
    "; [Say|Put] it in [fewer|a few] words.; Can you be brief?; What is the short answer?"
)
_WHY = phrases("[Why|Why so|But why|How so|Why is that]?; Why?; why?; Can you explain why?; What is the reason?")
_AGAIN = phrases(
    "[Can you say that again|Say that again|Explain it differently|Can you rephrase that]?; Sorry, once more?"
)
_FURTHER = phrases(
    "And another question: {l}; Okay. {q}; Thanks. {q}; I see. {q}; And {l}; Next: {l}; [Good|Great]. {q}; Now, {l}; Then {l}"
)
_UNKNOWN = phrases(
    "I don't know. I only know about flash_moe and how to call tools.; I don't know that: I am a small demo model for flash_moe.;"
    "I don't know. Ask me about flash_moe, or give me a tool that can help.; Sorry, I don't know: I only know flash_moe."
)
_UNABLE = phrases(
    "I can't do that: I only answer questions about flash_moe and call tools.; I can't do that. Give me a tool that can.;"
    " I can't do that. I am a small demo model that only knows flash_moe and tools."
)
_NAMES = {
    "{lib}": "[flash_moe|it|flash-moe|this library|the library|this|flash_moe]",
    "{big}": "[Qwen3.5-397B|the 397B model|the big Qwen|the 397B|Qwen3.5-397B-A17B|the largest model]",
}
_SHORT_THOUGHTS = ("The user wants it shorter.", "I give the short answer.")


@dataclass(frozen=True)
class Fact:
    """Questions with the same answer.

    Attributes:
        section: facts of one section follow each other in conversations.
        short: the answer in a few words. why: the reason, or empty.
    """

    section: str
    questions: tuple[Phrase, ...]
    answers: tuple[str, ...]
    short: str
    why: str


def _read_facts() -> list[Fact]:
    facts, section = [], ""
    for line in (Path(__file__).parent / "facts.txt").read_text(encoding="utf-8").splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "#":
            section = rest
        elif mark == "?":
            for name, choices in _NAMES.items():
                rest = rest.replace(name, choices)
            facts.append({"section": section, "questions": rest, "answers": [], "short": "", "why": ""})
        elif mark == "=":
            facts[-1]["answers"].append(rest)
        else:
            facts[-1][{"-": "short", "!": "why"}[mark]] = rest
    return [
        Fact(
            fact["section"], tuple(phrase(one) for one in fact["questions"].split(" / ")), tuple(fact["answers"]),
            fact["short"], fact["why"],
        )
        for fact in facts
    ]  # fmt: skip


FACTS = _read_facts()
_SECTIONS = {name: [fact for fact in FACTS if fact.section == name] for name in {fact.section for fact in FACTS}}
_OUTSIDE = [
    (phrase(row[0].replace("{lib}", _NAMES["{lib}"])), "questions" in head) for head, row in read_table("outside.txt")
]
_ASKING = ("how", "why", "what", "which", "who", "when", "where", "does", "do", "is", "are", "can", "may", "should",
           "must", "was", "were", "has", "will", "could", "did", "what's", "would", "have", "am", "whom")  # fmt: skip


def _asked(rng: Random, compiled: Phrase, frames: tuple[Phrase, ...], framed: float) -> str:
    """A question in one of its many wordings, with probability ``framed`` inside a longer message."""
    question = reworded(rng, say(rng, compiled))
    is_question = question.partition(" ")[0].lower() in _ASKING
    if rng.random() < framed:
        question += "?" if is_question else "."
        lower = question[0].lower() + question[1:] if is_question else question
        return say(rng, pick(rng, frames)).format(q=question, l=lower)
    roll = rng.random()
    if roll < 0.18:
        return question.lower() + pick(rng, ("?", "", ""))
    if roll < 0.27:
        return question + pick(rng, ("", "??", " ?"))
    return question + ("?" if is_question else pick(rng, (".", "", "", "!")))


def ask(rng: Random, split: str, choices: Sequence[Phrase]) -> str:
    """A wording of one of several questions; none is in both splits."""
    while True:
        question = _asked(rng, pick(rng, choices), _POLITE, 0.32)
        if belongs(question, split):
            return question


def _next(rng: Random, split: str, fact: Fact) -> tuple[Fact, str]:
    """Another fact, mostly of the same section, and a question about it that goes on with the conversation."""
    while True:
        other = pick(rng, _SECTIONS[fact.section] if rng.random() < 0.7 else FACTS)
        question = _asked(rng, pick(rng, other.questions), _FURTHER, 0.75)
        if belongs(question, split):
            return other, question


def _answer(rng: Random, fact: Fact) -> str:
    said = pick(rng, fact.answers)
    return f"{said} {fact.why}" if fact.why and rng.random() < 0.2 else said


class _Dialogue(Dialogue):
    def __init__(self, rng: Random) -> None:
        super().__init__(rng, thinks=0.15, system=0.08)
        self._said = len(self.messages)

    @property
    def turns(self) -> int:
        return (len(self.messages) - self._said) // 2

    def turn(self, user: str, assistant: str, thought: str) -> None:
        self.user(user)
        self.assistant(assistant, thought)


def questions(rng: Random, split: str) -> dict[str, Any]:
    """One to four questions, with follow-ups such as "Why?" and "Shorter, please."."""
    fact = pick(rng, FACTS)
    dialogue = _Dialogue(rng)
    dialogue.turn(ask(rng, split, fact.questions), _answer(rng, fact), _thought(fact))
    turns = pick(rng, (1, 1, 1, 2, 2, 3, 4))
    shortened = explained = False
    while dialogue.turns < turns:
        roll = rng.random()
        if roll < 0.25 and not shortened:
            dialogue.turn(say(rng, pick(rng, _SHORTER)), fact.short, pick(rng, _SHORT_THOUGHTS))
            shortened = True
        elif roll < 0.5 and fact.why and not explained and fact.why not in dialogue.messages[-1]["content"]:
            dialogue.turn(say(rng, pick(rng, _WHY)), fact.why, "The user asks for the reason.")
            explained = True
        elif roll < 0.6 and not shortened and not explained:
            said = dialogue.messages[-1]["content"]
            other = pick(rng, [one for one in fact.answers if not said.startswith(one)])
            dialogue.turn(say(rng, pick(rng, _AGAIN)), other, "I say it in other words.")
            shortened = explained = True
        elif roll >= 0.6:
            fact, question = _next(rng, split, fact)
            dialogue.turn(question, _answer(rng, fact), _thought(fact))
            shortened = explained = False
    return dialogue.done(None)


def outside(rng: Random, split: str) -> dict[str, Any]:
    """A question that the demo model cannot answer, and an honest reply."""
    dialogue = _Dialogue(rng)
    for _ in range(pick(rng, (1, 1, 1, 2))):
        form, is_question = pick(rng, _OUTSIDE)
        question = ask(rng, split, (filled(rng, say(rng, form)),))
        said = say(rng, pick(rng, _UNKNOWN if is_question else _UNABLE))
        dialogue.turn(question, said, "This is not about flash_moe, and I have no tool for it.")
    return dialogue.done(None)


def _thought(fact: Fact) -> str:
    return f"The user asks about flash_moe or large models. In short: {fact.short}"
