"""Numbers, times, days and money as people say them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from .splits import pick
from .words import WORDS


class Said(NamedTuple):
    """A value of an argument, the user's words for it, and the words with their preposition ("at 5 pm")."""

    value: Any
    words: str
    phrase: str


Everyday = Callable[[Random, bool], Said]
"""Draws a value; True asks for digits instead of numbers in words."""


_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = WORDS["months"].every
_CODES = {
    "EUR": ("euros", "euro"), "USD": ("dollars", "US dollars", "bucks", "American dollars"), "GBP": ("pounds", "British pounds"),
    "JPY": ("yen", "Japanese yen"), "CHF": ("Swiss francs", "francs"), "SEK": ("Swedish kronor", "kronor"),
    "NOK": ("Norwegian kroner",), "INR": ("rupees", "Indian rupees"), "CAD": ("Canadian dollars",), "BRL": ("reais",),
    "AUD": ("Australian dollars",), "PLN": ("zloty",), "CNY": ("yuan",), "KRW": ("won",), "MXN": ("Mexican pesos", "pesos"),
}  # fmt: skip


def small_number(number: int) -> str:
    """A number below 1,000 in words: `forty-two`, `three hundred and five`."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    rest = number % 100
    return f"{_ONES[number // 100]} hundred" + (f" and {small_number(rest)}" if rest else "")


def written(rng: Random, number: int, digits: bool) -> str:
    share = 0 if digits or not 0 <= number < 1000 else 0.35 if number <= 12 else 0.2 if number < 100 else 0.05
    return small_number(number) if rng.random() < share else str(number)


def time(rng: Random, digits: bool) -> Said:
    hour, minute = int(rng.random() * 24), 5 * int(rng.random() * 12)
    twelve = hour % 12 or 12
    half = "am" if hour < 12 else "pm"
    shape = rng.random()
    if shape < 0.3:
        text = f"{twelve}{pick(rng, (' ', ' ', ''))}{pick(rng, (half, half, half.upper(), half[0] + '.m.'))}"
    elif shape < 0.5:
        text = f"{twelve}:{minute:02}{pick(rng, (' ', ''))}{half}"
    elif shape < 0.72:
        text = f"{pick(rng, (f'{hour:02}', str(hour)))}:{minute:02}"
    elif shape < 0.8:
        text = f"{pick(rng, (str(twelve), _ONES[twelve]))} o'clock"
    elif shape < 0.88:
        text = pick(
            rng, ("half past {}", "quarter past {}", "quarter to {}", "a quarter to {}", "ten to {}", "five past {}")
        )
        text = text.format(pick(rng, (str(twelve), _ONES[twelve])))
    elif shape < 0.94:
        text = f"{pick(rng, (str(twelve), _ONES[twelve]))} in the {pick(rng, ('morning', 'evening', 'afternoon'))}"
    else:
        text = pick(rng, ("noon", "midnight", "noon", "lunchtime", _ONES[twelve], str(twelve)))
    return Said(text, text, f"at {text}")


def day(rng: Random, digits: bool) -> Said:
    shape = rng.random()
    if shape < 0.35:
        text = pick(
            rng,
            ("today", "tomorrow", "tomorrow", "tonight", "the day after tomorrow", "this weekend", "this afternoon"),
        )
        return Said(text, text, text)
    weekday = pick(rng, _WEEKDAYS)
    if shape < 0.75:
        return Said(weekday, weekday, f"on {weekday}")
    if shape < 0.88:
        text = f"{pick(rng, ('next', 'this', 'next'))} {weekday}"
        return Said(text, text, text)
    text = f"{weekday} {pick(rng, ('morning', 'evening', 'afternoon', 'night'))}"
    return Said(text, text, f"on {text}")


def date(rng: Random, digits: bool) -> Said:
    if rng.random() < 0.35:
        return day(rng, digits)
    month, nth = pick(rng, _MONTHS), 1 + int(rng.random() * 28)
    ordinal = f"{nth}{'th' if 10 < nth < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(nth % 10, 'th')}"
    shape = rng.random()
    if shape < 0.25:
        text = f"{month} {nth}"
    elif shape < 0.45:
        text = f"{nth} {month}"
    elif shape < 0.6:
        text = f"{month} {ordinal}"
    elif shape < 0.72:
        text = f"{pick(rng, ('', 'the '))}{ordinal} of {month}"
    elif shape < 0.82:
        text = f"2026-{1 + _MONTHS.index(month):02}-{nth:02}"
    elif shape < 0.9:
        text = f"the {ordinal}"
    else:
        text = f"{month[:3]} {nth}"
    return Said(text, text, f"on {text}")


def when(rng: Random, digits: bool) -> Said:
    shape = rng.random()
    if shape < 0.3:
        return day(rng, digits)
    if shape < 0.45:
        return time(rng, digits)
    one, clock = (date if shape < 0.6 else day)(rng, digits), time(rng, digits)
    text = f"{one.words} {clock.phrase}"
    return Said(text, text, f"{one.phrase} {clock.phrase}")


def minutes(rng: Random, digits: bool) -> Said:
    shape = rng.random()
    if shape < 0.75 or digits:
        number = pick(rng, (1 + int(rng.random() * 20), 5 * (1 + int(rng.random() * 18))))
        text = (
            f"{written(rng, number, digits)} {pick(rng, ('minutes', 'minutes', 'mins', 'min'))}"
            if number > 1
            else "a minute"
        )
        return Said(number, text, text)
    number, text = pick(rng, (
        (30, "half an hour"), (60, "an hour"), (60, "one hour"), (90, "an hour and a half"), (15, "a quarter of an hour"),
        (120, "two hours"), (45, "three quarters of an hour"), (90, "one and a half hours"), (180, "three hours"), (60, "1 hour"),
    ))  # fmt: skip
    return Said(number, text, text)


def number(rng: Random, digits: bool) -> Said:
    number = int(rng.random() * pick(rng, (20, 100, 100, 1000, 5000))) + 2
    if rng.random() < 0.1:
        value = number + pick(rng, (0.5, 0.25, 0.1, 0.75))
        return Said(value, str(value), str(value))
    text = f"{number:,}" if number >= 1000 and rng.random() < 0.2 else written(rng, number, digits)
    return Said(number, text, text)


def money(rng: Random, digits: bool) -> Said:
    """Its value is the currency's code; the words may be the code or a name."""
    code = pick(rng, tuple(_CODES))
    text = code if rng.random() < 0.3 else pick(rng, _CODES[code])
    return Said(code, text, text)
