"""Why a candidate was chosen and what kept the others from it, read off a finished extraction: no model is needed.

    found = explain(Extraction.load(folder))
    print(summary(found), decision(found))

Nothing is decided here. Choice, ranking and reasons are those that `cosmic.selection` recorded; what is added is order,
distances and counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from cosmic.config import ExtractionConfig
from cosmic.errors import InputError
from cosmic.extraction import Extraction
from cosmic.selection import Cell

FILTERS = {
    "length zero": "the direction has length zero",
    "last layers": "in the last ",
    "not finite": "the score is not finite",
    "median peaks": "last token, deeper than both median peaks",
    "induce": "induce ",
    "KL": "KL ",
}
"""How the reasons begin that `cosmic.selection` gives, by filter, in the order in which they are applied."""

OTHER = "other"
KINDS = ("harmful", "harmless")
SUMMANDS = {"comply": "S_comply", "refuse": "S_refuse"}


@dataclass(frozen=True)
class Candidate:
    """One candidate with a score.

    Attributes:
        rank: its place by score among all with one, from 1; equal scores go to the earlier layer, then position.
        layer, position, token: where it was read.
        scores: all its scores by name; not-a-number where one was not needed and not measured.
        behind: the winner's final score minus its own; below 0 if it scored higher.
        status: `passed` all filters, was `dropped` by one, or is `below` those that passed, its KL not measured.
        reason: why it was dropped.
        verdict: all this in words.
    """

    rank: int
    layer: int
    position: int
    token: str
    scores: dict[str, float]
    behind: float
    status: Literal["chosen", "passed", "dropped", "below"]
    reason: str | None
    verdict: str

    @property
    def place(self) -> str:
        """Where it was read, in words."""
        return f"layer {self.layer}, position {self.position} ({self.token!r})"


@dataclass(frozen=True)
class Loss:
    """What one filter dropped; each candidate counts once, at the first filter that it fails.

    Attributes:
        filter: its name in `FILTERS`, or `other` for reasons not known here.
        count: how many candidates it dropped.
        above: how many of these scored higher than the winner.
        unscored: how many of these have no finite score, most because the choice did not depend on it.
        note: what it asks for.
    """

    filter: str
    count: int
    above: int
    unscored: int
    note: str


@dataclass(frozen=True)
class Explanation:
    """The outcome of an extraction, in the order in which one would ask.

    Attributes:
        model: its name, if the record has it.
        config: the settings.
        prompts: numbers of prompts by part, such as `train_harmful`.
        evaluation_layers: L_low.
        depth: the number of layers.
        total: how many candidates there were.
        winner: the choice.
        length: ‖r‖ of the winner.
        relaxed: no candidate passed all filters.
        runner_up: the next that passed or, if none is known to, the next that no filter has dropped; where `relaxed`,
            the next of those that the winner was taken from.
        tied: candidates that could have been chosen and have the winner's score.
        margins: winner's minus runner-up's `comply` and `refuse`, or runner-up's minus winner's `bypass`, so that what
            is above 0 speaks for the winner.
        decided_by: the score with the largest margin, or the rule that decided between equal scores.
        losses: what each filter dropped.
        passed: how many candidates passed all filters, the winner included.
        below: how many scored below those that passed, so that their KL was not measured.
        peaks: the median layers where S_comply and S_refuse peak, if that filter is on.
        peaks_partial: scores were missing where a peak can be, so that a median may lie deeper.
        candidates: all that have a score, best first, the dropped ones included.
    """

    model: str | None
    config: ExtractionConfig
    prompts: dict[str, int]
    evaluation_layers: list[int]
    depth: int
    total: int
    winner: Candidate
    length: float
    relaxed: bool
    runner_up: Candidate | None
    tied: list[Candidate]
    margins: dict[str, float]
    decided_by: str | None
    losses: list[Loss]
    passed: int
    below: int
    peaks: tuple[int, int] | None
    peaks_partial: bool
    candidates: list[Candidate] = field(repr=False)


def explain(extraction: Extraction) -> Explanation:
    """Why the winner won and what dropped the others.

    Raises:
        InputError: the record contradicts itself: shapes that differ, places that do not exist, a choice without score.
    """
    _require_consistent(extraction)
    selection, config = extraction.selection, extraction.config
    in_order = _in_order(extraction)
    candidates = [_candidate(extraction, cell, rank) for rank, cell in enumerate(in_order, start=1)]
    by_cell = dict(zip(in_order, candidates, strict=True))
    winner = by_cell[selection.chosen]
    others = _rivals(extraction, in_order)
    runner_up = by_cell[others[0]] if others else None
    peaks, partial = _peaks(extraction)
    total = extraction.vectors.shape[0] * extraction.vectors.shape[1]
    margins = _margins(winner, runner_up, config)
    return Explanation(
        model=extraction.provenance.get("model"),
        config=config,
        prompts=dict(extraction.provenance.get("prompts", {})),
        evaluation_layers=list(extraction.evaluation_layers),
        depth=extraction.vectors.shape[1],
        total=total,
        winner=winner,
        length=float(extraction.vectors[selection.chosen].norm()),
        relaxed=selection.relaxed,
        runner_up=runner_up,
        tied=[by_cell[cell] for cell in others if by_cell[cell].behind == 0],
        margins=margins,
        decided_by=_decided_by(winner, runner_up, margins),
        losses=_losses(extraction, peaks, partial),
        passed=0 if selection.relaxed else len(selection.ranking),
        below=total - len({*selection.ranking, *selection.dropped}),
        peaks=peaks,
        peaks_partial=partial,
        candidates=candidates,
    )


def filter_of(reason: str) -> str:
    """The filter that gave this reason, by name."""
    return next((name for name, start in FILTERS.items() if reason.startswith(start)), OTHER)


def _require_consistent(extraction: Extraction) -> None:
    shape = tuple(extraction.vectors.shape[:2])
    names = ["comply", "refuse", "kl", "final"]
    if extraction.config.method == "substring":
        names += ["bypass", "induce"]
    for name in names:
        found = tuple(extraction.scores[name].shape) if name in extraction.scores else None
        if found != shape:
            raise InputError(
                f"the extraction's score map `{name}` has shape {found}; expected {shape}, as its candidates. "
                "Extract again."
            )
    rows = len(extraction.positions), len(extraction.tokens)
    if rows != (shape[0], shape[0]):
        raise InputError(
            f"the extraction has {rows[0]} `positions` and {rows[1]} `tokens`; expected {shape[0]}, as its candidates. "
            "Extract again."
        )
    selection, final, existing = extraction.selection, extraction.scores["final"], set(_cells(extraction))
    unknown = [cell for cell in (selection.chosen, *selection.ranking, *selection.dropped) if cell not in existing]
    if unknown:
        raise InputError(
            f"the extraction names a candidate {unknown[0]}; expected indices of position and layer below {shape}. "
            "Extract again."
        )
    unscored = [cell for cell in (selection.chosen, *selection.ranking) if not final[cell].isfinite()]
    if unscored:
        raise InputError(f"the extraction ranks {unscored[0]}, which has no score; expected a number. Extract again.")


def _cells(extraction: Extraction) -> list[Cell]:
    rows, layers = extraction.vectors.shape[:2]
    return list(itertools.product(range(rows), range(layers)))


def _in_order(extraction: Extraction) -> list[Cell]:
    """All with a score, best first."""
    final = extraction.scores["final"]
    scored = [cell for cell in _cells(extraction) if math.isfinite(float(final[cell]))]
    return sorted(scored, key=lambda cell: (-float(final[cell]), cell[1], cell[0]))


def _rivals(extraction: Extraction, in_order: Sequence[Cell]) -> list[Cell]:
    """Those that would have been chosen without the winner, as far as is known, best first."""
    selection = extraction.selection
    ranked = [cell for cell in selection.ranking if cell != selection.chosen]
    if selection.relaxed:
        return ranked
    return ranked + [cell for cell in in_order if cell not in {*selection.ranking, *selection.dropped}]


def _candidate(extraction: Extraction, cell: Cell, rank: int) -> Candidate:
    selection, chosen = extraction.selection, extraction.selection.chosen
    scores = {name: float(values[cell]) for name, values in extraction.scores.items()}
    behind = float(extraction.scores["final"][chosen]) - scores["final"]
    reason = selection.dropped.get(cell)
    if reason and filter_of(reason) == "KL" and math.isnan(scores["kl"]):
        scores["kl"] = math.inf  # a saved record has no infinity
    tie = f"equal score, later {'layer' if cell[1] != chosen[1] else 'position'}" if behind == 0 else None
    status: Literal["chosen", "passed", "dropped", "below"]
    if cell == chosen:
        status, verdict = "chosen", f"chosen, although dropped: {reason}" if reason else "chosen"
    elif reason:
        status, verdict = "dropped", f"dropped: {reason}"
    elif cell in selection.ranking:
        status, verdict = "passed", f"passed, {tie or f'score lower by {amount(behind)}'}"
    else:
        status, verdict = "below", f"{tie or ('below' if behind > 0 else 'higher')}; KL not measured"
    row, layer = cell
    return Candidate(
        rank, layer, extraction.positions[row], extraction.tokens[row], scores, behind, status, reason, verdict
    )


def _margins(winner: Candidate, other: Candidate | None, config: ExtractionConfig) -> dict[str, float]:
    if other is None:
        return {}
    if config.method == "substring":
        return {"bypass": other.scores["bypass"] - winner.scores["bypass"]}
    return {name: winner.scores[name] - other.scores[name] for name in SUMMANDS}


def _decided_by(winner: Candidate, other: Candidate | None, margins: dict[str, float]) -> str | None:
    if other is None:
        return None
    if other.behind == 0:
        return "earlier layer" if winner.layer != other.layer else "earlier position"
    return max(margins, key=lambda name: margins[name])


def _peaks(extraction: Extraction) -> tuple[tuple[int, int] | None, bool]:
    """The two median peaks as the filter takes them (COSMIC appendix E), and whether scores are missing there."""
    config = extraction.config
    rows = [row for row, position in enumerate(extraction.positions) if position != -1]
    if not rows or not config.median_peak or config.method != "cosmic":
        return None, False
    maps = [extraction.scores[name][rows] for name in SUMMANDS]
    comply, refuse = (int(map_.nan_to_num(nan=-torch.inf).argmax(dim=1).median()) for map_ in maps)
    return (comply, refuse), any(bool(map_.isnan().any()) for map_ in maps)


def _losses(extraction: Extraction, peaks: tuple[int, int] | None, partial: bool) -> list[Loss]:
    selection, config, final = extraction.selection, extraction.config, extraction.scores["final"]
    best = float(final[selection.chosen])
    names = [*FILTERS, OTHER]
    cells: dict[str, list[Cell]] = {name: [] for name in names}
    for cell, reason in selection.dropped.items():
        cells[filter_of(reason)].append(cell)
    if peaks:
        median = f"deeper than layers {peaks[0]} and {peaks[1]}, the other tokens' median peaks"
        median += " (among the scores that were measured)" if partial else ""
    else:
        median = "not applied"
    notes = {
        "length zero": "harmful and harmless means are equal",
        "last layers": f"last {config.last_layers_dropped:.0%} of the layers",
        "not finite": "no number came out",
        "median peaks": median,
        "induce": f"not above {config.min_induce:g}" if config.method == "substring" else "not applied",
        "KL": f"above {config.max_kl:g} nats" if config.max_kl is not None else "not applied",
        OTHER: "reasons of another version",
    }
    found = []
    for name in names:
        values = [float(final[cell]) for cell in cells[name]]
        above = sum(value > best for value in values)  # false for what is not a number
        unscored = sum(not math.isfinite(value) for value in values)
        found.append(Loss(name, len(values), above, unscored, notes[name]))
    return [loss for loss in found if loss.filter != OTHER or loss.count]


# --- in words ---


def amount(value: float) -> str:
    """A difference of scores with as many digits as it takes to see it."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def summary(found: Explanation) -> str:
    """What was done, what won, how far ahead, and whether filters had to be set aside."""
    config, winner = found.config, found.winner
    words = [
        f"{found.model or 'A model'}: method {config.method}, {config.intervention} edit, {config.candidates} candidates, "
        f"aggregate {config.aggregate}, evaluation layers {found.evaluation_layers} of {found.depth}."
    ]
    if found.prompts:
        n = [found.prompts.get(f"{part}_{name}", 0) for part in ("train", "validation") for name in KINDS]
        words.append(
            f"{n[0]} harmful and {n[1]} harmless prompts made {found.total} candidates, {n[2]} and {n[3]} others scored "
            "them."
        )
    words += [f"The winner is {winner.place} with length {found.length:.3g}: {_scores(found)}.", _lead(found)]
    higher = [one for one in found.candidates if one.behind < 0 and one.status == "dropped"]
    if higher:
        one, number = higher[0], len(higher)
        words.append(
            f"{number} scored higher and {'was' if number == 1 else 'were'} dropped, the best of them {one.place}, "
            f"{amount(-one.behind)} higher: {one.reason}."
        )
    return " ".join(words)


def _scores(found: Explanation) -> str:
    scores = found.winner.scores
    kl = scores["kl"]
    end = "KL not needed" if math.isnan(kl) else f"KL {kl:.3f} nats"
    if found.config.method == "substring":
        return f"bypass {scores['bypass']:.3f} (least is best), induce {scores['induce']:.3f}, {end}"
    return f"S_comply {scores['comply']:.3f} + S_refuse {scores['refuse']:.3f} = {scores['final']:.3f}, {end}"


def _lead(found: Explanation) -> str:
    """How far ahead the winner is and of whom."""
    winner, other = found.winner, found.runner_up
    if found.relaxed:
        words = "No candidate passed all filters (`relaxed`). An attacker would still take the best there is, so "
        if winner.reason and filter_of(winner.reason) == "last layers":
            words += "it was taken although it lies in the last layers: no other has a score."
        else:
            words += f"the best outside the last layers was taken, against the filters: {winner.reason or 'unknown'}."
        return words + (f" Next of these is {other.place}, {amount(other.behind)} lower." if other else "")
    if other is None:
        return "No other candidate passed."
    if other.status == "passed":
        return f"The next that passed is {other.place}, {amount(other.behind)} lower."
    return (
        f"The next that no filter has dropped is {other.place}, {amount(other.behind)} lower; its KL was not needed, so "
        "whether it passes is not known."
    )


def decision(found: Explanation) -> str:
    """Which part of the score decided between winner and runner-up."""
    winner, other, margins = found.winner, found.runner_up, found.margins
    if other is None or found.decided_by is None:
        return "There was nothing to decide: no runner-up is known."
    if found.tied:
        places = "; ".join(one.place for one in found.tied)
        return (
            f"Equal scores are decided by the earlier layer, then the earlier position. The winner's equals: {places}."
        )
    if found.config.method == "substring":
        return (
            f"Decided by bypass, {winner.scores['bypass']:.3f} against {other.scores['bypass']:.3f}: the refusal odds of "
            "harmful prompts under ablation. Induce is only filtered by."
        )
    rest = next(name for name in SUMMANDS if name != found.decided_by)
    parts = ", ".join(
        f"{SUMMANDS[name]} {'-' if margin < 0 else '+'}{amount(abs(margin))}" for name, margin in margins.items()
    )
    label, other_label = SUMMANDS[found.decided_by], SUMMANDS[rest]
    if margins[rest] < 0:
        return f"Against the runner-up: {parts}. {label} decided; {other_label} alone would have chosen the runner-up."
    return f"Against the runner-up: {parts}. {label} decided; {other_label} was not lower."
