"""Everyday requests to plain tools: what people ask for in their own words, and the calls that follow."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from .chat import Dialogue, chat
from .everyday import Said
from .intents import FIELD, INTENTS, STYLES, PlainTool, Wording, clause_of, drawn, named, near, plain_tool
from .plain_results import plain_result
from .questions import outside, questions
from .replies import thought_before_answer, thought_before_refusal
from .splits import pick
from .text import capital, listing, phrases, say

Conversation = dict[str, Any]
_COMMANDS = phrases(
    "{C}.; {C}.; {C}; {c}; {c}; {C}!; Please {c}.; please {c}; {C}, please.; {C} please; {c} please; {C}!;"
    "[Can|Could|Would|Will] you {c}?; [can|could] you {c}; [Can|Could|Would] you please {c}?; Could you {c}, please?;"
    "[Hey|Hi|Hello|Okay|OK|Ok|So|Alright|Now], {c}.; [Hey|Hi|Hello], [can|could] you {c}?; [Hey|hey|ok] {c};"
    "[I need|I want|I'd like|I would like] you to {c}.; i need you to {c}; Go ahead and {c}.; {C}, thanks!; {C}, thank you.;"
    "[Quick one|One thing|Oh|Right]: {c}.; Do me a favor and {c}.; Be so kind as to {c}.; Can you help me? {C}.; You can {c}.;"
    "[Then|Next|Also], {c}.; Would you mind? {C}.; Just {c}.; Good [morning|evening], please {c}."
)
_ASKED = phrases("{C}?; {C}?; {C}?; {c}?; {c}; {c}; {C}; Hey, {c}?; Hi! {C}?; Tell me: {c}?; So {c}?; {C}? Thanks!")
_TOLD = phrases("{C}.; {C}.; {C}; {c}; {c}.; {C}!; Hey, {c}.; Okay, {c}.; {C}, thanks.; Hi. {C}.")
_QUESTION_WORDS = frozenset(
    ("what", "what's", "how", "how's", "who", "where", "when", "why", "which", "is", "are", "do", "does", "did", "will", "can",
     "could", "has", "have", "am", "any", "where's", "know", "heads", "up")
)  # fmt: skip
_LEADING = re.compile(r"(?:\b(in|for|to|from|at|on|of|about|by|with) )?\{(\w+)([~-]?)\}")
_FOLLOWING = phrases(
    "And {p}?; and {p}?; And {p}; What about {v}?; what about {v}; How about {v}?; How about {p}?; Now {p}.; Same {p}.;"
    "And {v}?; Okay, and {p}?; Also {p}, please.; Do the same {p}.; and now {v}"
)
_CORRECTING = phrases(
    "No, {v}.; Sorry, {v}.; Make it {v}.; Make that {v}, please.; I meant {v}.; Actually, {v}.; no wait, {v};"
    "Change it to {v}.; Hm, better {v}.; not that, {v}"
)
_JOINED = ("{} and {}", "{}, and {}", "{} and then {}", "{}, then {}", "{}. Also {}", "{} and also {}", "{}; {}")
_REFUSED = phrases(
    "I have no tool for that. I can {t}.; None of my tools can do that. I can {t}.; I cannot do that. I can {t}."
)
_WANTED = phrases("[Sure|Okay|Gladly]. What is {l}?; Please tell me {l}.; I need {l} for that.; What is {l}?")


@dataclass(frozen=True)
class Ask:
    """A request to a tool: the user's clause, whether it stands by itself, and the arguments."""

    tool: PlainTool
    wording: Wording
    clause: str
    said: dict[str, Said]

    @property
    def arguments(self) -> dict[str, Any]:
        """In the order of the schema."""
        found = {key: said.value for key, said in self.said.items()} | self.wording.implied
        return {name: found[key] for key, name in self.tool.parameters.items() if key in found}

    def call(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.tool.name, "arguments": self.arguments}}


def _ask(rng: Random, tool: PlainTool, wording: Wording, given: dict[str, Said] | None = None) -> Ask:
    clause = clause_of(rng, wording, tool.noun)
    digits = re.search(r"[+*/^%=]|\} - \{| x \{|\{low|\{shares|\} \{ticker", clause) is not None
    said: dict[str, Said] = dict(given or {})

    def words(found: re.Match[str]) -> str:
        key, form = found[1], found[2]
        if key not in said:
            said[key] = drawn(rng, tool, key, digits)
        if form == "-":
            return said[key].words.replace("minutes", "minute").replace(" mins", " minute")
        return said[key].phrase if form == "~" else said[key].words

    return Ask(tool, wording, FIELD.sub(words, clause), said)


def _message(rng: Random, ask: Ask) -> tuple[str, Ask]:
    """What the user writes, and the request as it then stands: small letters and other apostrophes reach arguments, too."""
    clause = ask.clause
    if not ask.wording.free:
        form = say(rng, pick(rng, _COMMANDS))
    else:
        asked = clause.split(" ", 1)[0].lower().strip(",") in _QUESTION_WORDS and not clause.endswith("please")
        form = say(rng, pick(rng, _ASKED if asked else _TOLD))
    if any(said.words and clause.startswith(said.words) for said in ask.said.values()):
        return _restyled(rng, form.format(c=clause, C=clause), ask)  # a value stays as it is
    lower = clause if clause[:2].isupper() or clause.startswith(("I ", "I'")) else clause[:1].lower() + clause[1:]
    return _restyled(rng, form.format(c=lower, C=capital(clause)), ask)


def _restyled(rng: Random, text: str, ask: Ask) -> tuple[str, Ask]:
    changes = []
    if rng.random() < 0.1:
        changes.append(str.lower)
    if "'" in text and rng.random() < 0.15:
        changes.append(lambda one: one.replace("'", "’"))
    said = dict(ask.said)
    for change in changes:
        text = change(text)
        for key, one in said.items():
            copied = isinstance(one.value, str) and one.value == one.words and not _listed(ask.tool, key)
            if copied and change(one.value) in text:
                said[key] = Said(change(one.value), change(one.words), change(one.phrase))
    return text, replace(ask, said=said)


def _listed(tool: PlainTool, key: str) -> bool:
    return "enum" in tool.schema["function"]["parameters"]["properties"][tool.parameters[key]]


def _offer(rng: Random, count: int | None = None) -> tuple[list[PlainTool], Wording]:
    """Tools of which the first fits the wording."""
    intent = pick(rng, INTENTS)
    wording = pick(rng, intent.wordings)
    style = pick(rng, STYLES)
    tools = [plain_tool(rng, intent, wording.keys, style)]
    count = count or pick(rng, (1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6))
    while len(tools) < count:
        other = near(rng, intent)
        noun = tools[0].noun if other.domain == "%crud" else None
        made = plain_tool(rng, other, pick(rng, other.wordings).keys, style, noun)
        if all(made.name != tool.name and (made.intent is not tool.intent) for tool in tools):
            tools.append(made)
    return tools, wording


class _Talk(Dialogue):
    def __init__(self, rng: Random) -> None:
        super().__init__(rng, thinks=0.1, system=0.15)

    def call(self, asks: list[Ask]) -> None:
        thoughts = [
            f"The user wants to {ask.tool.action}. {ask.tool.name} does that"
            + (": " + ", ".join(f"{name} is {value}" for name, value in ask.arguments.items()) if ask.arguments else "") + "."
            for ask in asks
        ]  # fmt: skip
        self.assistant("", " ".join(thoughts), [ask.call() for ask in asks])

    def results(self, asks: list[Ask]) -> None:
        """What the tools return, and what to say about it."""
        answers = []
        for ask in asks:
            content, answer = plain_result(self.rng, ask.tool, {key: said.words for key, said in ask.said.items()})
            self.tool(content)
            answers.append(answer)
        self.assistant(" ".join(answers), thought_before_answer(self.rng))

    def whole(self, tools: list[PlainTool]) -> Conversation:
        schemas = [tool.schema for tool in tools]
        self.rng.shuffle(schemas)
        return self.done(schemas)


def everyday_call(rng: Random, split: str) -> Conversation:
    """A request and a call, often the result, sometimes a follow-up or further requests to the same tools."""
    tools, wording = _offer(rng)
    talk = _Talk(rng)
    text, ask = _message(rng, _ask(rng, tools[0], wording))
    talk.user(text)
    talk.call([ask])
    if rng.random() < 0.25:
        return talk.whole(tools)
    talk.results([ask])
    for _ in range(pick(rng, (0, 1, 1, 2, 3))):
        if rng.random() < 0.3 and (following := _follow_up(rng, ask)):
            text, ask = following
        else:
            tool = pick(rng, tools)
            text, ask = _message(rng, _ask(rng, tool, pick(rng, tool.wordings())))
        talk.user(text)
        talk.call([ask])
        talk.results([ask])
    return talk.whole(tools)


def _follow_up(rng: Random, ask: Ask) -> tuple[str, Ask] | None:
    """The same request with another value: "And in Lima?"."""
    source = clause_of(rng, ask.wording, ask.tool.noun)
    places = [match for match in _LEADING.finditer(source) if match[2] in ask.said and match[3] != "-"]
    if not places or _listed(ask.tool, key := (place := pick(rng, places))[2]):
        return None
    new = drawn(rng, ask.tool, key, False)
    with_word = new.phrase if place[3] == "~" else f"{place[1] or 'for'} {new.words}"
    other = replace(ask, said=ask.said | {key: new})
    frames = _FOLLOWING if ask.wording.free or rng.random() < 0.5 else _CORRECTING
    return _restyled(rng, say(rng, pick(rng, frames)).format(p=with_word, v=new.words), other)


def two_everyday_calls(rng: Random, split: str) -> Conversation:
    """Two requests in one message, answered by two calls."""
    while True:
        tools, _ = _offer(rng, pick(rng, (2, 2, 3, 4)))
        ways = [[one for one in tool.wordings() if not one.free] for tool in tools[:2]]
        if all(ways):
            break
    asks = [_ask(rng, tool, pick(rng, able)) for tool, able in zip(tools, ways, strict=False)]
    if rng.random() < 0.2:
        asks[1] = _ask(rng, tools[0], pick(rng, ways[0]))
    clause = pick(rng, _JOINED).format(*(ask.clause for ask in asks))
    talk = _Talk(rng)
    talk.user(say(rng, pick(rng, _COMMANDS)).format(c=clause, C=capital(clause)))
    talk.call(asks)
    talk.results(asks)
    return talk.whole(tools)


def without_a_value(rng: Random, split: str) -> Conversation:
    """A value is missing: the assistant asks, the user tells, the assistant calls."""
    while True:
        tools, wording = _offer(rng)
        required = tools[0].schema["function"]["parameters"].get("required", [])
        if len(required) == 1 and wording.keys and not wording.implied:
            break
    key = next(key for key, name in tools[0].parameters.items() if name == required[0])
    said = drawn(rng, tools[0], key, False)
    ask = Ask(tools[0], wording, tools[0].action, {})
    talk = _Talk(rng)
    talk.user(say(rng, pick(rng, _COMMANDS)).format(c=ask.clause, C=capital(ask.clause)))
    label = pick(rng, tools[0].intent.slots[key].descriptions)
    label = named(label, tools[0].noun)
    label = (
        label if label.startswith(("the ", "which ", "what ", "how ", "where ", "when ", "who ")) else f"the {label}"
    )
    question = say(rng, pick(rng, _WANTED)).format(l=label)
    talk.assistant(question if label.startswith("the ") else f"{capital(label)}?", "A value is missing. I ask for it.")
    talk.user(pick(rng, (said.words, capital(said.words), f"{said.words} please", f"{capital(said.words)}.")))
    whole = replace(ask, said={key: said})
    if capital(said.words) in talk.messages[-1]["content"] and isinstance(said.value, str) and said.value == said.words:
        whole = replace(ask, said={key: said._replace(value=capital(said.words))})
    talk.call([whole])
    talk.results([whole])
    return talk.whole(tools)


def no_everyday_tool(rng: Random, split: str) -> Conversation:
    """A request that none of the tools fits."""
    tools, wording = _offer(rng, pick(rng, (2, 2, 3, 4)))
    wanted, *others = tools
    while any(tool.intent.domain == wanted.intent.domain for tool in others):
        tools, wording = _offer(rng, pick(rng, (2, 2, 3, 4)))
        wanted, *others = tools
    talk = _Talk(rng)
    text, _ = _message(rng, _ask(rng, wanted, wording))
    talk.user(text)
    can = listing([tool.action for tool in others], "or")
    talk.assistant(say(rng, pick(rng, _REFUSED)).format(t=can), thought_before_refusal())
    return talk.whole(others)


def chat_beside_everyday_tools(rng: Random, split: str) -> Conversation:
    """Tools are offered, but the user only chats, or asks about flash_moe or something that no tool tells."""
    kinds = (questions, questions, questions, chat, chat, outside)
    conversation = pick(rng, kinds)(rng, split)
    tools = [
        tool.schema for tool in _offer(rng)[0] if "search" not in tool.intent.tags and "info" not in tool.intent.tags
    ]
    return conversation | {"tools": tools or None}
