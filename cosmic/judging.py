"""Who says whether a reply refuses, and how often that is said: judges by name, counts of verdicts, intervals.

A judge is an entry point of the group `cosmic.judges`: a function of the prompt and the reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is the share itself; rounding must not put it beside.
    return (0.0 if successes == 0 else centre - margin), (1.0 if successes == n else centre + margin)


@dataclass(frozen=True)
class Counts:
    """How many replies to prompts of one class got each verdict."""

    refused: int
    complied: int
    unclear: int

    @property
    def n(self) -> int:
        """Replies in all."""
        return self.refused + self.complied + self.unclear

    def share(self, verdict: Verdict) -> float:
        """Share of the replies with `verdict`, 0 to 1."""
        return self._count(verdict) / self.n

    def interval(self, verdict: Verdict) -> tuple[float, float]:
        """The share's Wilson 95 % interval."""
        return wilson(self._count(verdict), self.n)

    def _count(self, verdict: Verdict) -> int:
        return {"refused": self.refused, "complied": self.complied, "unclear": self.unclear}[verdict]

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Counts:
        """Counts of a list of verdicts."""
        return cls(*(verdicts.count(name) for name in VERDICTS))
