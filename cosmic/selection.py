"""Which candidate is chosen, why each of the others was not, and what must be measured to know."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cosmic.config import ExtractionConfig
from cosmic.scores import Scores

Cell = tuple[int, int]
"""Indices of a candidate: (index of its position, layer)."""


@dataclass(frozen=True)
class Selection:
    """The outcome of selection.

    Attributes:
        chosen: the winner.
        ranking: candidates that passed the filters, best first; at least as many as were asked for, if there are.
        dropped: why a candidate did not pass. One that is neither here nor in `ranking` scored below those that passed,
            so it was not measured to the end.
        relaxed: no candidate passed; `chosen` is the best of those with a score, and `ranking` holds these.
    """

    chosen: Cell
    ranking: list[Cell]
    dropped: dict[Cell, str]
    relaxed: bool


@dataclass(frozen=True)
class Needed:
    """Scores that the choice still depends on: `kl` of some candidates, or the `scores` of those in the last layers."""

    what: Literal["kl", "scores"]
    cells: list[Cell]


class Filters:
    """The filters of COSMIC appendix E and Arditi et al. appendix C, on score maps that may have gaps.

    Args:
        positions: token positions of the score maps' rows.
        norms: `[P, L]`, lengths of the candidate vectors.
    """

    def __init__(
        self, scores: Scores, positions: Sequence[int], norms: torch.Tensor, config: ExtractionConfig
    ) -> None:
        self.scores, self.positions, self.norms, self.config = scores, positions, norms, config
        self.final = scores.final
        self.cells = list(itertools.product(range(self.final.shape[0]), range(self.final.shape[1])))
        others = [row for row, position in enumerate(positions) if position != -1]
        self._others = others if config.median_peak and config.method == "cosmic" else []
        self._peaks = (self._median(scores.comply), self._median(scores.refuse)) if self._others else None
        self._unmeasured = self.unmeasured_peaks()

    def _median(self, map_: torch.Tensor) -> int:
        """Median over the non-final positions of the layer where a score peaks; the lower of two middles."""
        return int(torch.nan_to_num(map_[self._others], nan=-torch.inf).argmax(dim=1).median())

    def in_order(self) -> list[Cell]:
        """Candidates with a score, best first; equal scores are decided by the earlier layer, then position."""
        scored = [cell for cell in self.cells if math.isfinite(float(self.final[cell])) and self.norms[cell] > 0]
        return sorted(scored, key=lambda cell: (-float(self.final[cell]), cell[1], cell[0]))

    def reason(self, cell: Cell) -> str | None:
        """Why a candidate is dropped, or `None`; what was not measured drops nobody."""
        config, kl = self.config, float(self.scores.kl[cell])
        if float(self.norms[cell]) == 0:
            return "the direction has length zero"
        if too_deep(cell[1], self.final.shape[1], config):
            return f"in the last {config.last_layers_dropped:.0%} of the layers"
        if not math.isfinite(float(self.final[cell])):
            return "the score is not finite"
        if self.beyond_peaks(cell) and not self._unmeasured:
            assert self._peaks is not None
            return f"last token, deeper than both median peaks (layers {self._peaks[0]} and {self._peaks[1]})"
        if self.scores.induce is not None and not float(self.scores.induce[cell]) > config.min_induce:
            return f"induce {float(self.scores.induce[cell]):.3f} not above {config.min_induce}"
        if config.max_kl is not None and not math.isnan(kl) and kl > config.max_kl:
            return f"KL {kl:.3f} above {config.max_kl}"
        return None

    def is_open(self, cell: Cell) -> bool:
        """Whether a candidate that nothing has dropped could still be, by a score that was not measured."""
        return self.kl_is_open(cell) or self.peaks_are_open(cell)

    def peaks_are_open(self, cell: Cell) -> bool:
        """Whether a candidate's place depends on peaks that were not measured; these can only be deeper ones."""
        return bool(self._unmeasured) and self.beyond_peaks(cell)

    def beyond_peaks(self, cell: Cell) -> bool:
        """Whether a last-token candidate lies deeper than both median peaks, as far as scores are measured."""
        if self._peaks is None or self.positions[cell[0]] != -1:
            return False
        return cell[1] > self._peaks[0] and cell[1] > self._peaks[1]

    def unmeasured_peaks(self) -> list[Cell]:
        """Candidates of the last layers without a score, any of which could hold a peak."""
        layers = self.final.shape[1]
        deep = [cell for cell in self.cells if cell[0] in self._others and too_deep(cell[1], layers, self.config)]
        return [cell for cell in deep if bool(torch.isnan(self.scores.comply[cell]))]

    def kl_is_open(self, cell: Cell) -> bool:
        """Whether the candidate's KL decides and is not measured."""
        return self.config.max_kl is not None and math.isnan(float(self.scores.kl[cell]))


def still_needed(
    scores: Scores, positions: Sequence[int], norms: torch.Tensor, config: ExtractionConfig
) -> Needed | None:
    """What must be measured next to know the best `config.ranked` candidates, or `None` if they are known.

    Going down from the best score, as the choice does, so that nothing is measured for candidates below it.
    """
    filters = Filters(scores, positions, norms, config)
    in_order = filters.in_order()
    if not in_order:  # an attacker would turn to the last layers
        left = [cell for cell in filters.cells if bool(torch.isnan(filters.final[cell])) and norms[cell] > 0]
        return Needed("scores", left) if left else None
    wanted = best([cell for cell in in_order if not filters.reason(cell)], config)
    certain = list(itertools.takewhile(lambda cell: not filters.peaks_are_open(cell), wanted))
    unknown = [cell for cell in certain if filters.kl_is_open(cell)]
    if unknown:
        return Needed("kl", unknown)
    return Needed("scores", filters.unmeasured_peaks()) if len(certain) < len(wanted) else None


def best(passing: Sequence[Cell], config: ExtractionConfig) -> list[Cell]:
    """The `config.ranked` best of candidates in order of their scores, as `config.ranked_by` counts them."""
    order = list(passing)
    if config.ranked_by == "layer":
        first = {layer: (row, layer) for row, layer in reversed(order)}
        order.sort(key=lambda cell: first[cell[1]] != cell)
    return order[: config.ranked]


def select(scores: Scores, positions: Sequence[int], norms: torch.Tensor, config: ExtractionConfig) -> Selection:
    """Apply the filters and take the best final score.

    If nothing passes, an attacker would still take the best there is, and so do we: `relaxed` says so.

    Args:
        positions: token positions of the score maps' rows.
        norms: `[P, L]`, lengths of the candidate vectors.

    Raises:
        ArithmeticError: no candidate has a finite score.
    """
    filters = Filters(scores, positions, norms, config)
    reasons = {cell: filters.reason(cell) for cell in filters.cells}
    dropped = {cell: reason for cell, reason in reasons.items() if reason}
    in_order = filters.in_order()
    ranking = [cell for cell in in_order if cell not in dropped and not filters.is_open(cell)]
    relaxed = not ranking
    if relaxed:
        if not in_order:
            raise ArithmeticError("no candidate direction has a finite score: harmful and harmless means are equal")
        ranking = [cell for cell in in_order if not too_deep(cell[1], norms.shape[1], config)] or in_order
    return Selection(ranking[0], ranking, dropped, relaxed)


def too_deep(layer: int, layers: int, config: ExtractionConfig) -> bool:
    """Whether a layer is among the last that no direction is taken from."""
    return layer >= round((1 - config.last_layers_dropped) * layers, 9)
