"""Do two models refuse along the same direction, and does the direction of one switch refusal in the other? Used as

    found = compare(Side("chat", extraction, chat, tokenizer), Side("base", other, base, tokenizer), harmful, harmless,
                    judge=find_judge("substring"))

Vectors are compared by cosine and length, behaviour by the *transfer matrix* of Zhao et al. (How Post-Training Reshapes
LLMs): {A's direction, B's, a random one} x {ablate on harmful, add on harmless} x {model A, model B}. A low cosine alone
says nothing about behaviour, and an effect says little without the random control, so all are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from cosmic.blocks import find_blocks
from cosmic.direction import Direction
from cosmic.errors import InputError
from cosmic.extraction import Extraction
from cosmic.interventions import Edits
from cosmic.judging import VERDICTS, Counts, JudgeFunction
from cosmic.prompts import Prompt
from cosmic.storage import read_json, write_json
from cosmic.studies.behaviour import check_generation, verdicts

Which = Literal["a", "b"]
Source = Literal["none", "a", "b", "random"]
EditName = Literal["none", "ablate", "add"]
Kind = Literal["harmful", "harmless"]

SCHEMA = 1
FILE_NAME = "comparison.json"

CELLS: tuple[tuple[Source, EditName, Kind], ...] = (
    ("none", "none", "harmful"),
    ("none", "none", "harmless"),
    *((source, "ablate", "harmful") for source in ("a", "b", "random")),  # type: ignore[misc]
    *((source, "add", "harmless") for source in ("a", "b", "random")),  # type: ignore[misc]
)
"""What is measured on each model: whose direction, how it is used, and on which prompts."""

_ZERO = 1e-10
"""A candidate shorter than this share of its harmless mean is rounding: nothing before it tells prompts apart."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: what it is called in the results.
        extraction: its directions.
        model: the model they were found in, or `None` if its behaviour is not to be measured.
        tokenizer: the model's, with a chat template.
    """

    name: str
    extraction: Extraction
    model: nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Place:
    """Where a chosen direction was read: the input of block `layer` at token `position`; `norm` is its length."""

    layer: int
    position: int
    token: str
    norm: float


@dataclass(frozen=True)
class TransferRow:
    """One cell of the transfer matrix.

    Attributes:
        model: which model replied.
        direction: whose direction was used; `none` for the model as it is.
        edit: `ablate` (LCE at all sites) or `add` (x + r at the direction's layer), or `none`.
        prompts: what was asked.
        counts: what the judge said of the replies.
    """

    model: Which
    direction: Source
    edit: EditName
    prompts: Kind
    counts: Counts


@dataclass(frozen=True)
class Comparison:
    """Two sides, A and B, compared.

    Attributes:
        names: of A and B.
        cosines: of the two last-token candidates (B's and A's) at each layer; `None` where one has length zero.
        norm_ratios: length of B's divided by that of A's, likewise.
        chosen_cosine: of the two chosen directions, which may come from different layers and tokens.
        places: where A's and B's chosen directions were read.
        same_template: whether both have the same template tokens at the positions that both have; otherwise a part of
            every difference may be the template's.
        transfer: cells of the transfer matrix, for each side that has a model.
        settings: what else the numbers depend on: origin of both directions, prompts, limits of generation, seed.
    """

    names: tuple[str, str]
    cosines: list[float | None]
    norm_ratios: list[float | None]
    chosen_cosine: float
    places: tuple[Place, Place]
    same_template: bool
    transfer: list[TransferRow] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def angle(self) -> float:
        """Between the chosen directions, in degrees, 0 to 180."""
        return math.degrees(math.acos(self.chosen_cosine))

    def counts(self, model: Which, direction: Source, edit: EditName, prompts: Kind) -> Counts:
        """One cell of the transfer matrix.

        Raises:
            KeyError: it was not measured.
        """
        for row in self.transfer:
            if (row.model, row.direction, row.edit, row.prompts) == (model, direction, edit, prompts):
                return row.counts
        raise KeyError((model, direction, edit, prompts))

    @property
    def measured(self) -> list[Which]:
        """The models whose behaviour was measured."""
        return list(dict.fromkeys(row.model for row in self.transfer))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "schema": SCHEMA,
            "names": list(self.names),
            "layers": {"cosine": self.cosines, "norm_ratio": self.norm_ratios},
            "chosen": {
                "cosine": self.chosen_cosine,
                "angle": self.angle,
                "places": [vars(place) for place in self.places],
            },
            "same_template": self.same_template,
            "transfer": [_row_dict(row) for row in self.transfer],
            "settings": self.settings,
        }

    def save(self, folder: Path | str) -> Path:
        """Write `comparison.json` and return its path."""
        path = Path(folder) / FILE_NAME
        write_json(path, self.as_dict())
        return path

    @classmethod
    def load(cls, folder: Path | str) -> Comparison:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, malformed, or of another schema.
        """
        path = Path(folder) / FILE_NAME
        record = read_json(path)
        try:
            if record["schema"] != SCHEMA:
                raise InputError(f"`{path}` has schema {record['schema']!r}; expected {SCHEMA}. Compare again.")
            first, second = record["names"]
            here, there = (Place(**place) for place in record["chosen"]["places"])
            return cls(
                (first, second),
                record["layers"]["cosine"],
                record["layers"]["norm_ratio"],
                record["chosen"]["cosine"],
                (here, there),
                record["same_template"],
                [_row_of(row) for row in record["transfer"]],
                record["settings"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{path}` does not hold a saved comparison: {error!r}.") from error


def _row_dict(row: TransferRow) -> dict[str, Any]:
    counts = row.counts
    return {
        "model": row.model,
        "direction": row.direction,
        "edit": row.edit,
        "prompts": row.prompts,
        "n": counts.n,
        **{verdict: getattr(counts, verdict) for verdict in VERDICTS},
        **{f"{verdict}_interval": list(counts.interval(verdict)) for verdict in VERDICTS},
    }


def _row_of(record: dict[str, Any]) -> TransferRow:
    counts = Counts(*(record[verdict] for verdict in VERDICTS))
    return TransferRow(record["model"], record["direction"], record["edit"], record["prompts"], counts)


def compare(
    side_a: Side,
    side_b: Side,
    harmful: Sequence[Prompt] = (),
    harmless: Sequence[Prompt] = (),
    *,
    judge: JudgeFunction | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare the directions of two sides and, for each side that has a model, what they do to it.

    On each model: no edit on both sets; ablation (LCE at every block input, attention output and MLP output) of A's, B's
    and a random direction on `harmful`; addition of each (x + r at the input of the direction's layer, with the length
    that it has) on `harmless`. The random one is `random_direction` of the model's own chosen direction: its layer and
    its length, so that it differs in nothing but where it points.

    Where `torch.distributed` runs, all processes call this alike, divide the prompts and get the same comparison.

    Args:
        harmful, harmless: prompts to measure behaviour on; other ones than the directions were found on. Not needed if no
            side has a model.
        judge: says of a prompt and a reply whether it refuses; needed likewise.
        max_new_tokens: most tokens of a reply.
        batch_size: prompts generated together.
        seed: of the random direction.
        progress: called with (replies generated, replies in all).

    Raises:
        InputError: the sides differ in depth or width, a class has no prompts, there is no judge, or a prompt is too long.
    """
    check_sides(side_a, side_b)
    sides: dict[Which, Side] = {"a": side_a, "b": side_b}
    living = [which for which in sides if sides[which].model is not None]
    prompts: dict[Kind, Sequence[Prompt]] = {"harmful": harmful, "harmless": harmless}
    rows: list[TransferRow] = []
    if living:
        check_generation(max_new_tokens, batch_size)
        for name, given in prompts.items():
            if not given:
                raise InputError(f"`{name}` has no prompts; expected at least one. Give some.")
        if judge is None:
            raise InputError("`judge` is missing; expected a function such as `find_judge('substring')`.")
        count = _Counter(len(living) * sum(len(prompts[kind]) for _, _, kind in CELLS), progress)
        options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": count}
        for which in living:
            rows += _transfer(sides, which, prompts, judge, seed, options)
    cosines, ratios = layer_comparison(side_a.extraction, side_b.extraction)
    chosen = (side_a.extraction.direction, side_b.extraction.direction)
    return Comparison(
        (side_a.name, side_b.name),
        cosines,
        ratios,
        _clamped(chosen[0].cosine(chosen[1])),
        (_place(chosen[0]), _place(chosen[1])),
        _same_template(side_a.extraction, side_b.extraction),
        rows,
        {
            "origin": {which: side.extraction.provenance for which, side in sides.items()},
            "prompts": {kind: len(given) for kind, given in prompts.items()} if living else {},
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
    )


def _transfer(
    sides: dict[Which, Side],
    which: Which,
    prompts: dict[Kind, Sequence[Prompt]],
    judge: JudgeFunction,
    seed: int,
    options: dict[str, Any],
) -> list[TransferRow]:
    """The cells of one model."""
    side, rows = sides[which], []
    assert side.model is not None
    assert side.tokenizer is not None
    for source, edit, kind in CELLS:
        direction = _direction(sides, which, source, seed)
        edits = _edits(side.model, direction, edit)
        found = verdicts(side.model, side.tokenizer, prompts[kind], judge, edits=edits, **options)
        rows.append(TransferRow(which, source, edit, kind, Counts.of(found)))
    return rows


class _Counter:
    """Replies finished so far, told with their total."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, rows: int) -> None:
        self.done += rows
        if self.progress:
            self.progress(self.done, self.total)


def check_sides(side_a: Side, side_b: Side) -> None:
    """Refuse sides whose directions or models differ in depth or width, and a model without a tokenizer.

    Raises:
        InputError: they do; the message names which.
    """
    wanted = tuple(side_a.extraction.vectors.shape[1:])
    for side in (side_a, side_b):
        check_shape(side_a.name, wanted, side.name, tuple(side.extraction.vectors.shape[1:]))
        if side.model is not None:
            blocks = find_blocks(side.model)
            check_shape(side_a.name, wanted, side.name, (len(blocks), blocks.hidden_size))
            if side.tokenizer is None:
                raise InputError(f"`{side.name}` has a model but no `tokenizer`; expected both. Give its tokenizer.")


def check_shape(name: str, wanted: tuple[int, ...], other: str, found: tuple[int, ...]) -> None:
    """Refuse `other` if its (layers, width) are not those of `name`."""
    if found != wanted:
        raise InputError(
            f"`{other}` has {found[0]} layers of width {found[1]}; expected {wanted[0]} of width {wanted[1]} as in "
            f"`{name}`. Compare models of one architecture and size."
        )


def layer_comparison(a: Extraction, b: Extraction) -> tuple[list[float | None], list[float | None]]:
    """Cosine and ratio of lengths (B's to A's) of the last-token candidates at each layer, in float64.

    `None` where a candidate has length zero, as before the first block, where the last template token is the same in
    all prompts.
    """
    cosines: list[float | None] = []
    ratios: list[float | None] = []
    for layer in range(a.vectors.shape[1]):
        first, second = (side.vectors[-1, layer].double() for side in (a, b))
        references = (side.references[-1, layer].double() for side in (a, b))
        lengths = [float(vector.norm()) for vector in (first, second)]
        if any(
            length <= _ZERO * float(reference.norm()) for length, reference in zip(lengths, references, strict=True)
        ):
            cosines.append(None)
            ratios.append(None)
            continue
        cosines.append(_clamped(float(first @ second) / (lengths[0] * lengths[1])))
        ratios.append(lengths[1] / lengths[0])
    return cosines, ratios


def _clamped(cosine: float) -> float:
    """Without what rounding puts beyond 1."""
    return max(-1.0, min(1.0, cosine))


def random_direction(like: Direction, seed: int) -> Direction:
    """A control: independent normal coordinates from a generator seeded with `seed`, scaled to the length of `like`.

    It has the layer and position of `like`; its reference is zero.
    """
    drawn = torch.randn(len(like.vector), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vector = drawn / drawn.norm() * like.vector.double().norm()
    return Direction(vector.float(), torch.zeros_like(like.vector), like.layer, like.position, like.token)


def _direction(sides: dict[Which, Side], model: Which, source: Source, seed: int) -> Direction:
    own = sides[model].extraction.direction
    if source == "random":
        return random_direction(own, seed)
    return own if source == "none" else sides[source].extraction.direction


def _edits(model: nn.Module, direction: Direction, edit: EditName) -> Edits:
    if edit == "ablate":
        return direction.ablation_edits(model)
    return direction.addition_edits(model) if edit == "add" else {}


def _place(direction: Direction) -> Place:
    return Place(direction.layer, direction.position, direction.token, float(direction.vector.norm()))


def _same_template(a: Extraction, b: Extraction) -> bool:
    common = min(len(a.tokens), len(b.tokens))
    return a.tokens[-common:] == b.tokens[-common:]
