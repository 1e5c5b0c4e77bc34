"""Other words for the same question: `What is K` → `tell me what K is`; and the slips of people who type."""

from __future__ import annotations

from random import Random

from .splits import pick
from .text import capital

# Beginnings of questions, and what may stand in their place around the rest `{}`.
_WAYS = (
    ("What is ", ("What's {}", "Tell me what {} is", "What do you mean by {}", "Can you explain {}", "What exactly is {}",
                  "I want to know what {} is", "Do you know what {} is", "Please explain {}", "I don't understand {}",
                  "Could you tell me what {} is", "{}, what is that", "Explain {} to me")),
    ("How do I ", ("How can I {}", "How would I {}", "How do you {}", "how to {}", "I want to {}, how", "Tell me how to {}",
                   "Show me how to {}", "What do I do to {}", "What's the way to {}", "I'd like to {}",
                   "How should I {}", "Explain how to {}", "I need to {}. How do I do that", "How does one {}")),
    ("Can I ", ("Is it possible to {}", "May I {}", "Could I {}", "Am I able to {}", "I'd like to {}, can I",
                "Is there a way to {}", "Will I be able to {}", "I want to {}, is that possible", "Can you {}", "Can one {}",
                "Does it let me {}")),
    ("Can it ", ("Is it able to {}", "Could it {}", "Is it possible that it can {}", "Can the library {}", "Can you {}")),
    ("Does it ", ("Will it {}", "Can it {}", "Does the library {}", "Do you {}", "Would it {}", "I wonder, does it {}")),
    ("Is there ", ("Do you have {}", "Does it have {}", "Do you offer {}", "Does it come with {}", "Does the library have {}",
                   "I'm looking for {}", "Have you got {}", "Is there something like {}", "Does flash_moe have {}")),
    ("Are there ", ("Do you have {}", "Does it have {}", "Does it come with {}", "Have you got {}")),
    ("Which ", ("What {}", "Tell me which {}", "I want to know which {}", "Do you know which {}")),
    ("Where do ", ("In which place do {}", "Tell me where {}")),
    ("Why ", ("How come {}", "Can you tell me why {}", "What is the reason why {}")),
    ("Who ", ("Tell me who {}", "Do you know who {}")),
    ("How large ", ("How big {}", "Tell me how large {}", "Can you tell me how big {}", "Do you know how large {}")),
    ("How much ", ("Tell me how much {}", "Can you tell me how much {}", "Roughly how much {}", "So how much {}")),
    ("How many ", ("Tell me how many {}", "Can you tell me how many {}", "Roughly how many {}", "About how many {}")),
)  # fmt: skip
_BEFORE = ("So ", "And ", "But ", "Ok, ", "Well, ", "Sorry, ", "Just wondering, ", "Question: ", "Honestly, ", "For my project: ",
           "Before I install it: ", "I'm curious. ", "As a beginner: ", "Quick check: ")  # fmt: skip
_FILLERS = ("actually", "really", "also", "just", "even", "now", "exactly", "please", "by the way")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def reworded(rng: Random, question: str) -> str:
    """The question in other words, in about half of all cases."""
    roll = rng.random()
    if roll < 0.4:
        ways = [(begin, forms) for begin, forms in _WAYS if question.startswith(begin)]
        if ways:
            begin, forms = ways[0]
            question = capital(pick(rng, forms).format(question.removeprefix(begin)))
    elif roll < 0.46:
        question = pick(rng, _BEFORE) + question[:1].lower() + question[1:]
    if rng.random() < 0.06:
        words = question.split(" ")
        words.insert(1 + int(rng.random() * len(words)), pick(rng, _FILLERS))
        question = " ".join(words)
    return _mistyped(rng, question) if rng.random() < 0.04 and len(question) > 3 else question


def _mistyped(rng: Random, text: str) -> str:
    place = 1 + int(rng.random() * (len(text) - 2))
    roll = rng.random()
    if roll < 0.4:
        return text[:place] + text[place + 1 :]
    if roll < 0.75:
        return text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    return text[:place] + pick(rng, _LETTERS) + text[place + 1 :]
