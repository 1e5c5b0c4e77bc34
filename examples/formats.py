"""Have replies fit a class, a choice or a pattern, whatever the model would rather write.

python examples/formats.py [MODEL]      (needs pip install "flash-moe[structured]" and pydantic)
"""

import re
import sys
from typing import Literal

from pydantic import BaseModel, Field

from flash_moe import FormatError, Model


class Order(BaseModel):
    item: str = Field(max_length=40)
    count: int = Field(ge=1, le=1000)
    state: Literal["open", "shipped"] | None = None  # a way to say "unknown": else the model has to make something up


text = "Kim ordered 12 lamps. They were shipped today.\n\nFill in the order as JSON."

with Model.load(sys.argv[1] if len(sys.argv) > 1 else "demo", experts_per_token=None) as model:
    reply = model.generate(text, response_format=Order, temperature=0)
    try:
        print(repr(reply.parsed))  # an Order
    except FormatError as error:  # the reply was cut, or a validator of the class refuses it
        print(error, reply.text)

    mood = model.generate("I love this lamp!", response_format=["happy", "unhappy"], temperature=0).parsed
    date = model.generate("When was that?", response_format=re.compile(r"(\d{4})-(\d\d)"), temperature=0).parsed
    print(mood, date[1], date[2], f"[{reply.enforced}]")
