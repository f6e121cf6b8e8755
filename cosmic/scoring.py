"""Scores of candidate directions with as few passes as the formulas need.

* Candidates of the last layers are measured only if the median-peak rule turns on them.
* Addition and affine edits at block l leave all before it as it was, so passes begin there, and end at the last
  evaluation layer; beyond that layer the edit changes nothing that is looked at, and no pass is needed.
* The KL filter is applied from the best score down, until as many candidates have passed as are wanted.
* The tokens that all prompts begin with are computed once per candidate, and several candidates share a pass.

None of this approximates: each is checked against passes of the whole model (`cosmic.stream`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from cosmic import interventions
from cosmic.blocks import causal_lm, evaluation_mode, find_blocks
from cosmic.candidates import Candidates
from cosmic.config import ExtractionConfig
from cosmic.interventions import Edits
from cosmic.scores import Scores, kl_divergence, refusal_metric, similarity
from cosmic.selection import Cell, still_needed, too_deep
from cosmic.stream import Encoded, Metric, Outcome, Stream, open_passage


def score_candidates(
    model: nn.Module,
    candidates: Candidates,
    harmful: Encoded,
    harmless: Encoded,
    *,
    layers: Sequence[int],
    config: ExtractionConfig,
    pad: int,
    refusal_tokens: Sequence[int] = (),
    under: Edits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores of the candidates on encoded validation prompts; several processes divide the prompts among them.

    Args:
        layers: the evaluation layers.
        refusal_tokens: ids for the substring method.
        under: edits that are in force throughout.
        progress: called with the work done and the work expected, in tokens times blocks.
    """
    work = _Work(progress)
    with evaluation_mode(model):
        passage = open_passage(
            model,
            [*harmful, *harmless],
            pad=pad,
            batch_tokens=config.batch_tokens,
            memory_gib=config.memory_gib,
            under=under,
            done=work.add,
        )
        streams = Stream(passage, harmful), Stream(passage, harmless)
        scorer = _Scorer(model, candidates, *streams, list(layers), config, refusal_tokens)
        work.expected = scorer.expected_work()
        return scorer.scores()


@dataclass
class _Work:
    """How much is done of what is expected; what turns out to be needed later is added."""

    report: Callable[[int, int], None] | None
    done: int = 0
    expected: int = 0

    def add(self, work: int) -> None:
        self.done += work
        if self.report and self.expected:
            self.report(self.done, max(self.done, self.expected))


class _Scorer:
    """Fills in score maps."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        harmful: Stream,
        harmless: Stream,
        layers: list[int],
        config: ExtractionConfig,
        refusal_tokens: Sequence[int],
    ) -> None:
        self.model, self.candidates, self.config, self.layers = model, candidates, config, layers
        self.harmful, self.harmless = harmful, harmless
        self.positions, self.depth = candidates.vectors.shape[:2]
        self.norms = candidates.vectors.norm(dim=-1)
        self.substring = config.method == "substring"
        self.odds: Metric | None = (lambda _, now: refusal_metric(now, refusal_tokens)) if self.substring else None
        self.last = self.depth - 1 if self.substring else max(layers)
        device = harmful.passage.device
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.maps = Scores.unmeasured(self.positions, self.depth, substring=self.substring)

    def scores(self) -> Scores:
        """All scores that are needed."""
        self._clean()
        cells = list(itertools.product(range(self.positions), range(self.depth)))
        everything = self.config.full_map
        self._score([cell for cell in cells if everything or not too_deep(cell[1], self.depth, self.config)])
        if everything:
            self._measure_kl(cells)
        while needed := still_needed(self.maps, self.candidates.positions, self.norms, self.config):
            if needed.what == "kl":
                self._measure_kl(needed.cells)
            else:
                self._score(needed.cells)
        plain = self.plain_harmful.states[0], self.plain_harmless.states[0]
        return replace(self.maps, unedited=float(similarity(*plain, self.config.aggregate)))

    def expected_work(self) -> int:
        """Tokens times blocks, taking it that the best candidates pass and the last layers are not needed."""
        everything, parts = self.config.full_map, self.harmful.passage.parts
        cells = [
            cell
            for cell in itertools.product(range(self.positions), range(self.depth))
            if self.norms[cell] > 0 and (everything or not too_deep(cell[1], self.depth, self.config))
        ]
        end = self.last + 1 if parts else self.depth
        later = sum(max(0, end - (layer if parts else 0)) for _, layer in cells)
        deepest = max((layer for _, layer in cells), default=0) if parts else 0
        affine = self.config.intervention == "affine"
        measured = len(cells) if everything else self.config.ranked if self.config.max_kl is not None else 0
        harmful = end + (later + deepest if affine else len(cells) * end)
        harmless = self.depth + later + deepest + measured * self.depth
        return self.harmful.tokens * harmful + self.harmless.tokens * harmless

    def _clean(self) -> None:
        """What is compared with: the prompts without any edit."""
        last = self.depth - 1
        self.plain_harmful, self.plain_harmless = (
            stream.run(
                [{}],
                first=0,
                last=last if logits else self.last,
                layers=self.layers,
                metric=self.odds,
                keep_logits=logits,
            )
            for stream, logits in ((self.harmful, self.substring), (self.harmless, True))
        )

    def _score(self, cells: Sequence[Cell]) -> None:
        """Measure S_comply and S_refuse, or bypass and induce."""
        changing = []
        for cell in cells:
            if float(self.norms[cell]) == 0:
                self._record_comply([cell], self.plain_harmful)
                self._record_refuse([cell], self.plain_harmless)
            else:
                changing.append(cell)
        if self.config.intervention == "linear":
            size = self.harmful.together(len(changing))
            for group in _groups(changing, size):
                self._record_comply(group, self._run(self.harmful, group, self._ablation, 0, self.last, self.odds))
        for layer, at_layer in itertools.groupby(sorted(changing, key=lambda cell: cell[1]), key=lambda cell: cell[1]):
            for group in _groups(at_layer, self.harmless.together(self.positions)):
                if self.config.intervention == "affine":
                    found = self._run(self.harmful, group, self._ablation, layer, self.last, self.odds)
                    self._record_comply(group, found)
                added = self._run(self.harmless, group, self._addition, layer, self.last, self.odds)
                self._record_refuse(group, added)

    def _measure_kl(self, cells: Sequence[Cell]) -> None:
        """Measure the KL on harmless prompts."""
        last = self.depth - 1

        def begin(cell: Cell) -> int:
            return 0 if self.config.intervention == "linear" else cell[1]

        for first, at_layer in itertools.groupby(sorted(cells, key=begin), key=begin):
            for group in _groups(at_layer, self.harmless.together(len(cells))):
                found = self._run(self.harmless, group, self._ablation, first, last, kl_divergence).metric
                for cell, value in zip(group, found.tolist(), strict=True):
                    # A KL that is not a number is of logits that overflow; as infinite it counts as measured.
                    self.maps.kl[cell] = value if value == value else torch.inf

    def _run(
        self,
        stream: Stream,
        cells: Iterable[Cell],
        edit: Callable[[Cell], Edits],
        first: int,
        last: int,
        metric: Metric | None,
    ) -> Outcome:
        """A run under candidates' edits at block `first` or later; layers before it stay as they are without edits."""
        plain = self.plain_harmful if stream is self.harmful else self.plain_harmless
        edits = [edit(cell) for cell in cells]
        wanted = [layer for layer in self.layers if layer >= first or not stream.passage.parts]
        states = plain.states.repeat(len(edits), 1, 1)
        if first > last:
            return Outcome(states, torch.full((len(edits),), torch.nan))
        found = stream.run(edits, first=first, last=last, layers=wanted, metric=metric)
        states[:, len(self.layers) - len(wanted) :] = found.states
        return Outcome(states, found.metric)

    def _record_comply(self, cells: Iterable[Cell], found: Outcome) -> None:
        scores = similarity(found.states, self.plain_harmless.states[0], self.config.aggregate)
        self._record(cells, scores, self.maps.comply, found.metric, self.maps.bypass, torch.inf)

    def _record_refuse(self, cells: Iterable[Cell], found: Outcome) -> None:
        scores = similarity(found.states, self.plain_harmful.states[0], self.config.aggregate)
        self._record(cells, scores, self.maps.refuse, found.metric, self.maps.induce, -torch.inf)

    def _record(
        self,
        cells: Iterable[Cell],
        scores: torch.Tensor,
        similarities: torch.Tensor,
        odds: torch.Tensor,
        metrics: torch.Tensor | None,
        worst: float,
    ) -> None:
        """Enter scores; what is not a number is entered as the worst there is, so that it counts as measured."""
        for index, cell in enumerate(cells):
            similarities[cell] = torch.nan_to_num(scores[index], nan=-torch.inf)
            if metrics is not None:
                metrics[cell] = torch.nan_to_num(odds[index], nan=worst)

    def _candidate(self, cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
        """r and r⁻ where the edits are."""
        return self.candidates.vectors[cell].to(self.device), self.candidates.references[cell].to(self.device)

    def _ablation(self, cell: Cell) -> Edits:
        vector, reference = self._candidate(cell)
        if self.config.intervention == "affine":
            return interventions.affine(vector, reference, cell[1], 0.0)
        blocks = find_blocks(self.model)
        # In half precision the sums' rounding is worth removing at every block's input, as the published hooks do, and
        # edits that are always in force write into the stream themselves.
        precise = causal_lm(self.model).dtype in (torch.float32, torch.float64)
        few = precise and not self.harmful.passage.under
        return interventions.ablation(vector, blocks.writing_sites() if few else blocks.sites())

    def _addition(self, cell: Cell) -> Edits:
        vector, reference = self._candidate(cell)
        if self.config.intervention == "affine":
            return interventions.affine(vector, reference, cell[1], self.config.alpha)
        return interventions.addition(vector, cell[1], self.config.alpha)


def _groups(cells: Iterable[Cell], size: int) -> Iterator[list[Cell]]:
    """`cells` in lists of at most `size`."""
    left = iter(cells)
    while group := list(itertools.islice(left, size)):
        yield group
