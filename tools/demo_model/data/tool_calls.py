"""Conversations in which tools are offered: to call one or two, to ask for what is missing, or to say that none fits."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from .actions import ACTIONS, DOMAINS, SLOTS, Action, Slot
from .chat import Dialogue, chat
from .composed import compose, compose_getter, thing, verb_group
from .functions import Function, Naming
from .questions import questions
from .replies import (
    answer,
    error_response,
    no_tool,
    question,
    thought_before_answer,
    thought_before_call,
    thought_before_question,
    thought_before_refusal,
    tool_response,
)
from .requests import Request, request
from .splits import HELD_OUT, Words, pick
from .text import a, capital, phrases, say
from .values import kind

Conversation = dict[str, Any]
_ALSO = ("Also, {c}.", "And {c}.", "Then {c}.", "Then also {c}, please.", "After that, {c}.")
_THANKS = phrases("Thanks!; Thank you.; [Great|Perfect], thanks.; ok thanks")
_WELCOME = phrases("You are welcome!; [My pleasure|Any time|Glad to help].; You're welcome.")


def draw_actions(rng: Random, split: str, count: int) -> list[Action]:
    """Different actions, of which the first is the one to use; some others are near it."""
    if rng.random() < 0.45:
        return _from_table(rng, count)
    noun, group = thing(rng, split), verb_group(rng)
    used = [group]
    actions = [compose_getter(rng, split, noun) if rng.random() < 0.15 else compose(rng, split, noun, group)]
    while len(actions) < count:
        shape = rng.random()
        if shape < 0.45:  # the same thing, another verb
            used.append(verb_group(rng, tuple(used)))
            actions.append(compose(rng, split, noun, used[-1]))
        elif shape < 0.8:  # another thing, perhaps the same verb
            other = thing(rng, split)
            if all(other != action.domain for action in actions):
                actions.append(compose(rng, split, other, group if rng.random() < 0.5 else verb_group(rng)))
        elif (action := pick(rng, ACTIONS)) not in actions and noun not in action.infinitive:
            actions.append(action)
    return actions


def _from_table(rng: Random, count: int) -> list[Action]:
    actions = [pick(rng, ACTIONS)]
    near = DOMAINS[actions[0].domain]
    while len(actions) < count:
        action = pick(rng, near if rng.random() < 0.4 else ACTIONS)
        if action not in actions:
            actions.append(action)
    return actions


def functions(rng: Random, split: str, actions: list[Action]) -> list[Function]:
    """The actions as functions of one API, all with different names."""
    naming = Naming(rng, split)
    while True:
        made = [naming.function(action) for action in actions]
        if len({function.name for function in made}) == len(made):
            return made


def tools_of(rng: Random, offered: list[Function]) -> list[dict[str, Any]]:
    """Their schemas in random order."""
    tools = [function.tool for function in offered]
    rng.shuffle(tools)
    return tools


def _count(rng: Random) -> int:
    return pick(rng, (1, 2, 2, 2, 3, 3, 3, 4))


class _Dialogue(Dialogue):
    def __init__(self, rng: Random, split: str) -> None:
        super().__init__(rng, thinks=0.15, system=0.25)
        self.split = split

    def returned(self, response: dict[str, Any]) -> None:
        self.tool(json.dumps(response, ensure_ascii=False))

    def call(self, requests: list[Request]) -> None:
        self.assistant("", thought_before_call(self.rng, requests), [one.call() for one in requests])

    def call_and_answer(self, requests: list[Request]) -> None:
        """Calls, the tools' responses, and what to say about them."""
        self.call(requests)
        answers = []
        for one in requests:
            fails = self.rng.random() < 0.1
            response = error_response(self.rng) if fails else tool_response(self.rng, self.split, one)
            self.returned(response)
            answers.append(answer(self.rng, one, response))
        self.assistant(" ".join(answers), thought_before_answer(self.rng))


def one_call(rng: Random, split: str) -> Conversation:
    """A request, a call, and mostly the result; sometimes a second request follows."""
    offered = functions(rng, split, draw_actions(rng, split, _count(rng)))
    dialogue = _Dialogue(rng, split)
    first = request(rng, split, offered[0])
    dialogue.user(first.text(rng))
    if rng.random() < 0.35:
        dialogue.call([first])
        return dialogue.done(tools_of(rng, offered))
    dialogue.call_and_answer([first])
    more = rng.random()
    if more < 0.2:
        second = request(rng, split, pick(rng, offered))
        dialogue.user(second.text(rng))
        dialogue.call_and_answer([second])
    elif more < 0.27:
        dialogue.user(say(rng, pick(rng, _THANKS)))
        dialogue.assistant(say(rng, pick(rng, _WELCOME)), "The user is happy.")
    return dialogue.done(tools_of(rng, offered))


def several_requests(rng: Random, split: str) -> Conversation:
    """Requests one after the other for the same tools, of which any may be the right one."""
    offered = functions(rng, split, draw_actions(rng, split, 1 + _count(rng)))
    dialogue = _Dialogue(rng, split)
    for _ in range(pick(rng, (2, 3, 4))):
        one = request(rng, split, pick(rng, offered))
        dialogue.user(one.text(rng))
        dialogue.call_and_answer([one])
    return dialogue.done(tools_of(rng, offered))


def two_calls(rng: Random, split: str) -> Conversation:
    """Two requests in one message, answered by two calls at once."""
    offered = functions(rng, split, draw_actions(rng, split, 1 + _count(rng) // 2))
    dialogue = _Dialogue(rng, split)
    first = request(rng, split, offered[0])
    while True:
        second = request(rng, split, offered[0] if len(offered) < 2 or rng.random() < 0.35 else offered[1])
        if not second.is_question and not second.details:
            break
    text = first.text(rng)
    text += "" if text[-1] in ".?!" else "."
    dialogue.user(f"{text} {pick(rng, _ALSO).format(c=second.clause)}")
    dialogue.call_and_answer([first, second])
    return dialogue.done(tools_of(rng, offered))


def missing_argument(rng: Random, split: str) -> Conversation:
    """A required argument is missing: the assistant asks, the user tells, the assistant calls."""
    while True:
        offered = functions(rng, split, draw_actions(rng, split, _count(rng)))
        required = [p for p in offered[0].parameters if p.required and not p.slot.denials]
        if required:
            break
    rng.shuffle(required)
    absent = required[: 2 if len(required) > 1 and rng.random() < 0.2 else 1]
    dialogue = _Dialogue(rng, split)
    partial = request(rng, split, offered[0], omit=tuple(absent))
    labels = [parameter.slot.label for parameter in absent]
    dialogue.user(partial.text(rng))
    dialogue.assistant(question(rng, labels), thought_before_question(partial, labels))
    values = {parameter.name: parameter.value(rng, split) for parameter in absent}
    if len(absent) == 1:
        dialogue.user(values[absent[0].name][1])
    else:
        said = [f"{p.slot.label}: {values[p.name][1]}" for p in absent]
        dialogue.user(capital(", ".join(said)))
    known = partial.arguments | {name: value for name, (value, _) in values.items()}
    arguments = {p.name: known[p.name] for p in offered[0].parameters if p.name in known}
    spoken = partial.spoken | {p.slot.key: values[p.name][1] for p in absent}
    whole = Request(offered[0], partial.clause, partial.is_question, "", arguments, spoken)
    dialogue.call_and_answer([whole])
    return dialogue.done(tools_of(rng, offered))


def no_tool_fits(rng: Random, split: str) -> Conversation:
    """The user asks for something that none of the tools does."""
    wanted, *others = draw_actions(rng, split, 1 + _count(rng))
    dialogue = _Dialogue(rng, split)
    dialogue.user(request(rng, split, functions(rng, split, [wanted])[0]).text(rng))
    dialogue.assistant(no_tool(rng, others), thought_before_refusal())
    return dialogue.done([function.tool for function in functions(rng, split, others)])


_NAME = Slot(
    "name", Words(["name", "called", "item_name", "which_one", "exact_name", "wanted", "search_name"]), kind("place"), "name",
    ("the name to look for", "name of the one to find"), ("called {v}", "named {v}"),
)  # fmt: skip


def find_then_act(rng: Random, split: str) -> Conversation:
    """Two calls after each other: the second needs the id that the first one returns."""
    noun = thing(rng, split)
    names = Words((f"find_{noun}", f"{noun}_id", f"lookup_{noun}", f"{noun}_lookup", f"search_{noun}", f"get_{noun}"))
    finder = Action(
        noun, names, (f"Finds the id of {a(noun)} by its name.", f"Looks up {a(noun)} by name and returns its id."),
        f"find the id of {a(noun)}", (), (), ((_NAME, True),),
    )  # fmt: skip
    actor = compose(rng, split, noun, verb_group(rng))
    actor = Action(
        noun, actor.names, actor.descriptions, actor.infinitive, actor.asks, (), ((SLOTS["id"], True),), actor.done
    )
    others = [action for action in draw_actions(rng, split, 1 + int(rng.random() * 2)) if action.domain != noun]
    offered = functions(rng, split, [finder, actor, *others])
    name, _ = _NAME.kind.value(rng, split, {})
    verb = say(rng, pick(rng, actor.asks)).split()[0]
    sentence = pick(rng, ("find the {n} called {v} and {a} it", "{a} the {n} called {v}", "{a} the {n} named {v}"))
    clause = sentence.format(n=noun, v=name, a=verb)
    dialogue = _Dialogue(rng, split)
    first = Request(offered[0], clause, False, "", {offered[0].parameters[0].name: name}, {})
    dialogue.user(first.text(rng))
    dialogue.call([first])
    number = kind("id").value(rng, split, {})[0]
    dialogue.returned({"id": number})
    second = Request(offered[1], clause, False, "", {offered[1].parameters[0].name: number}, {})
    dialogue.call_and_answer([second])
    return dialogue.done(tools_of(rng, offered))


def decision(rng: Random) -> tuple[Conversation, list[dict[str, Any]]]:
    """A held-out conversation up to the assistant's decision, and the calls that are right; none if no tool fits."""
    if rng.random() < 0.1:
        conversation = no_tool_fits(rng, HELD_OUT)
    else:
        conversation = (two_calls if rng.random() < 0.07 else one_call)(rng, HELD_OUT)
    messages = conversation["messages"]
    turn = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    calls = [call["function"] for call in messages[turn].get("tool_calls", [])]
    return {"messages": messages[:turn], "tools": conversation["tools"]}, calls


def chat_beside_tools(rng: Random, split: str) -> Conversation:
    """Tools are offered, but the user only chats or asks about flash_moe."""
    conversation = (questions if rng.random() < 0.75 else chat)(rng, split)
    offered = functions(rng, split, draw_actions(rng, split, _count(rng)))
    return conversation | {"tools": tools_of(rng, offered)}
