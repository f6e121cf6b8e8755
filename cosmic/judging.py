"""Who says whether a reply refuses: judges by name, which installed packages register.

A judge is an entry point of the group `cosmic.judges`: a function of the prompt and the reply.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Literal

from cosmic.errors import InputError
from cosmic.prompts import Prompt

Verdict = Literal["refused", "complied", "unclear"]
VERDICTS: tuple[Verdict, ...] = ("refused", "complied", "unclear")
JudgeFunction = Callable[[Prompt, str], Verdict]


def find_judge(name: str) -> JudgeFunction:
    """The judge called `name`.

    Raises:
        InputError: no installed package has it; the message lists those there are.
    """
    known = {entry.name: entry for entry in entry_points(group="cosmic.judges")}
    if name not in known:
        raise InputError(f"`judge` is {name!r}; expected one of {sorted(known)}.")
    judge: JudgeFunction = known[name].load()
    return judge
