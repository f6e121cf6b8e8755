"""Refusal against the strength of an edit: does steering along a direction bring refusal back, and where does it end?

Used as

    found = sweep(model, tokenizer, direction, harmful, harmless, alphas=[0, 1, 2, 3], judge=find_judge("substring"))

Refusal need not grow with α (COSMIC §6): an edit that is too strong leaves the region where the model speaks. So every
strength is measured, replies that are neither refusal nor answer are counted apart, and a fall is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from cosmic.direction import Direction
from cosmic.errors import InputError
from cosmic.extraction import provenance
from cosmic.interventions import Edits, combined
from cosmic.judging import VERDICTS, Counts, JudgeFunction
from cosmic.prompts import Prompt
from cosmic.storage import read_json, write_json
from cosmic.studies.behaviour import check_generation, verdicts

EditKind = Literal["affine", "linear"]

SCHEMA = 1
MOST_ALPHAS = 101
FILE_NAME = "steering.json"


@dataclass(frozen=True)
class SteeringPoint:
    """What the model does at one strength.

    Attributes:
        alpha: α of the edit, or `None` for no edit at all.
        harmful: verdicts on harmful prompts.
        harmless: verdicts on harmless prompts; `refused` are benign refusals.
    """

    alpha: float | None
    harmful: Counts
    harmless: Counts


@dataclass(frozen=True)
class Fall:
    """The largest fall of harmful refusal with growing α, from one point to a later one."""

    start: SteeringPoint
    end: SteeringPoint

    @property
    def within_noise(self) -> bool:
        """Whether the two Wilson 95 % intervals overlap."""
        return self.end.harmful.interval("refused")[1] >= self.start.harmful.interval("refused")[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        ends = {"from": self.start, "to": self.end}
        return {
            **{name: {"alpha": at.alpha, "refused": at.harmful.share("refused")} for name, at in ends.items()},
            "within_noise": self.within_noise,
        }


@dataclass(frozen=True)
class Sweep:
    """Refusal against α.

    Attributes:
        unedited: the model without the edit, as a reference.
        points: one for each α, ascending.
        edit: `affine` (ACE: α = 0 ablates, α = 1 adds) or `linear` (x + αr, so α = 0 changes nothing).
        settings: what else the numbers depend on: limits of generation, the direction's place and origin, versions.
    """

    unedited: SteeringPoint
    points: list[SteeringPoint]
    edit: EditKind
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fall(self) -> Fall | None:
        """The largest fall of the share of harmful prompts refused, or `None` if it never falls as α grows.

        Of falls equally large it is the one between the closest points, so that it shows where refusal breaks off.
        """
        ends = [(first, last) for last in range(len(self.points)) for first in range(last)]
        refused = [point.harmful.share("refused") for point in self.points]
        first, last = max(
            ends, key=lambda pair: (refused[pair[0]] - refused[pair[1]], pair[0] - pair[1]), default=(0, 0)
        )
        return Fall(self.points[first], self.points[last]) if refused[first] > refused[last] else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        fall = self.fall
        return {
            "schema": SCHEMA,
            "edit": self.edit,
            "points": [_point_dict(point) for point in (self.unedited, *self.points)],
            "fall": fall and fall.as_dict(),
            "settings": self.settings,
        }

    def save(self, folder: Path | str) -> Path:
        """Write `steering.json` and return its path."""
        path = Path(folder) / FILE_NAME
        write_json(path, self.as_dict())
        return path

    @classmethod
    def load(cls, folder: Path | str) -> Sweep:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, malformed, or of another schema.
        """
        path = Path(folder) / FILE_NAME
        record = read_json(path)
        try:
            if record["schema"] != SCHEMA:
                raise InputError(f"`{path}` has schema {record['schema']!r}; expected {SCHEMA}. Run the sweep again.")
            first, *others = (_point_of(point) for point in record["points"])
            return cls(first, others, record["edit"], record["settings"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{path}` does not hold a saved sweep: {error!r}.") from error


def _point_dict(point: SteeringPoint) -> dict[str, Any]:
    classes = {"harmful": point.harmful, "harmless": point.harmless}
    counts = {
        name: {"n": found.n, **{verdict: getattr(found, verdict) for verdict in VERDICTS}}
        for name, found in classes.items()
    }
    return {"alpha": point.alpha, **counts}


def _point_of(record: dict[str, Any]) -> SteeringPoint:
    harmful, harmless = (Counts(*(record[name][verdict] for verdict in VERDICTS)) for name in ("harmful", "harmless"))
    return SteeringPoint(record["alpha"], harmful, harmless)


def sweep(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    direction: Direction,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    alphas: Sequence[float],
    judge: JudgeFunction,
    edit: EditKind = "affine",
    max_new_tokens: int = 64,
    batch_size: int = 64,
    under: Edits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Generate greedily with no edit and at each α, and count refusals (COSMIC §6).

    Where `torch.distributed` runs, all processes call this alike, divide the prompts and get the same counts.

    Args:
        model: a causal LM, wrapped or not; it is left as it was.
        tokenizer: its tokenizer, with a chat template.
        direction: what to steer along; best found on other prompts than these.
        harmful: prompts whose refusal is to come back, as texts or message lists.
        harmless: prompts whose refusal is the price.
        alphas: strengths, in any order; repeated ones count once.
        judge: says of a prompt and a reply whether it refuses.
        edit: `affine`: x - proj(x) + proj(r⁻) + αr at the input of the direction's block, so α = 0 is the affine
            ablation; `linear`: x + αr there.
        max_new_tokens: most tokens of a reply.
        batch_size: prompts generated together.
        under: edits in force throughout, also where there is no steering, such as the ablation of another direction,
            which makes a weakly aligned model; at a shared site they apply before the steering.
        progress: called with (replies generated, replies in all).

    Raises:
        InputError: no prompts, no or unusable strengths, a setting out of range, a direction that does not fit the
            model, or prompts too long for the model.
    """
    check_settings(edit, max_new_tokens, batch_size)
    edits_of = {"affine": direction.affine_edits, "linear": direction.addition_edits}[edit]
    strengths = _distinct(alphas)
    steps: list[tuple[float | None, Edits]] = [(None, {}), *((alpha, edits_of(model, alpha)) for alpha in strengths)]
    for name, given in (("harmful", harmful), ("harmless", harmless)):
        if not given:
            raise InputError(f"`{name}` has no prompts; expected at least one. Give some.")
    prompts = [*harmful, *harmless]
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        if progress:
            progress(done, len(steps) * len(prompts))

    points = []
    for alpha, edits in steps:
        said = verdicts(
            model,
            tokenizer,
            prompts,
            judge,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            edits=combined(under or {}, edits),
            progress=count,
        )
        split = len(harmful)
        points.append(SteeringPoint(alpha, Counts.of(said[:split]), Counts.of(said[split:])))
    settings = {
        **provenance(model, {"harmful": list(harmful), "harmless": list(harmless)}),
        "max_new_tokens": max_new_tokens,
        "direction": describe(direction),
        "under": under is not None,
    }
    return Sweep(points[0], points[1:], edit, settings)


def describe(direction: Direction) -> dict[str, Any]:
    """Where a direction was read and what from, for the record of a sweep."""
    place = {"layer": direction.layer, "position": direction.position, "token": direction.token}
    return {**place, "provenance": direction.provenance}


def check_settings(edit: str, max_new_tokens: int, batch_size: int) -> EditKind:
    """Refuse an unknown kind of edit and numbers out of range, without a model; the edit comes back."""
    if edit not in get_args(EditKind):
        raise InputError(f"`edit` is {edit!r}; expected one of {list(get_args(EditKind))}.")
    check_generation(max_new_tokens, batch_size)
    return cast(EditKind, edit)


def _distinct(alphas: Sequence[float]) -> list[float]:
    """The strengths, ascending and each once."""
    if not alphas:
        raise InputError("`alphas` is empty; expected at least one strength, such as 1.0.")
    if not all(map(math.isfinite, alphas)):
        raise InputError(f"`alphas` is {list(alphas)}; expected finite numbers.")
    return sorted({float(alpha) + 0.0 for alpha in alphas})


def parse_alphas(text: str) -> list[float]:
    """Strengths from `start:stop:step`, stop included if a step meets it, or from a list such as `1,2,3`.

    Reckoned in decimals, so that 0:1:0.1 ends in 1.

    Returns:
        The values ascending, each once.

    Raises:
        InputError: nothing given, no number, a step of zero or away from stop, or more than 101 values.
    """
    if ":" not in text:
        values = [_number(text, part) for part in text.split(",")] if text.strip() else []
        if not values:
            raise _unusable(text, "is empty")
    else:
        parts = text.split(":")
        if len(parts) != 3:
            raise _unusable(text, f"has {len(parts)} parts between colons")
        start, stop, step = (_number(text, part) for part in parts)
        if step == 0:
            raise _unusable(text, "has a step of 0")
        if (stop - start) / step < 0:
            raise _unusable(text, f"steps by {step} away from {stop}")
        count = int((stop - start) / step + Decimal("1e-9")) + 1
        if count > MOST_ALPHAS:
            raise _unusable(text, f"makes {count if count < 10**9 else 'too many'} values, more than {MOST_ALPHAS}")
        values = [start + index * step for index in range(count)]
    if len(values) > MOST_ALPHAS:
        raise _unusable(text, f"makes {len(values)} values, more than {MOST_ALPHAS}")
    return sorted({float(value) + 0.0 for value in values})


def _number(text: str, part: str) -> Decimal:
    """A finite number of ordinary size; others would make `float` overflow or vanish."""
    try:
        value = Decimal(part.strip())
    except InvalidOperation:
        raise _unusable(text, f"has {part.strip()!r}, which is not a number") from None
    if not value.is_finite() or (value != 0 and not -15 <= value.adjusted() <= 15):
        raise _unusable(text, f"has {part.strip()!r}, which is not a number from 1e-15 to 1e15")
    return value


def _unusable(text: str, problem: str) -> InputError:
    return InputError(
        f"`alpha` {text!r} {problem}; expected start:stop:step such as 0:4:0.5, or a list such as 1,2,3."
    )
