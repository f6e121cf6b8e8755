"""Prompts on their way through the blocks: what they have become is kept, so that a pass can begin at any block.

All passes of scoring go through here. Rows of a pass are candidates times prompts: each prompt runs under each of several
interventions at once. What can be left out (see `cosmic.partial`) is left out where a trial has shown that it may be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import DynamicCache

from cosmic.activations import Recorder, forward
from cosmic.blocks import causal_lm, find_blocks
from cosmic.budget import run_within_memory, tokens_per_pass
from cosmic.errors import InputError
from cosmic.interventions import Edits, combined, intervene, stacked
from cosmic.partial import PrefixCache, filled, new_cache, only_blocks
from cosmic.prompts import TokenBatch, batches
from cosmic.ranks import from_all, input_device, is_sharded, summed

Encoded = Sequence[Sequence[int]]
Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A number per row from logits `[rows, vocab]` under an intervention and the same prompts' `[rows, vocab]` without."""

SHORTEST_PREFIX = 2
"""Tokens; a shorter prefix saves less than its own pass and the joining of keys cost."""
LEAST_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Difference of mean states between a partial and a whole pass, relative to their length, that counts as rounding."""
MOST_TOLERANCE = 0.05


@dataclass(frozen=True)
class Passage:
    """How prompts pass through a model.

    Attributes:
        prefix: token ids that all prompts begin with and that are computed once; empty if that may not be.
        parts: whether blocks may be left out.
        batch_tokens: most tokens of a pass, padding included.
        under: edits that are always in force.
        shared: whether the ranks divide prompts among them.
        done: called with the number of tokens times blocks after each pass.
    """

    model: nn.Module
    device: torch.device
    pad: int
    batch_tokens: int
    sharded: bool
    prefix: tuple[int, ...] = ()
    parts: bool = False
    under: Edits = field(default_factory=dict)
    shared: bool = True
    done: Callable[[int], None] = lambda work: None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(find_blocks(self.model))


@dataclass(frozen=True)
class _Piece:
    """Some rows of one batch under some of the interventions."""

    batch: int
    parts: slice
    rows: slice

    def halves(self) -> list[_Piece]:
        for name in ("parts", "rows"):
            whole = getattr(self, name)
            middle = (whole.start + whole.stop) // 2
            if middle > whole.start:
                first, second = slice(whole.start, middle), slice(middle, whole.stop)
                return [_Piece(**{**vars(self), name: half}) for half in (first, second)]
        return [self]


def _halves(part: range) -> list[range]:
    middle = (part.start + part.stop) // 2
    return [range(part.start, middle), range(middle, part.stop)] if middle > part.start else [part]


@dataclass(frozen=True)
class Outcome:
    """What a run has found for each of `C` interventions, averaged over all ranks' prompts.

    Attributes:
        states: `[C, K, d_model]` float64, mean states at the last token of the wanted layers' outputs.
        metric: `[C]` float64, the mean of the metric, or not-a-number if none was wanted.
    """

    states: torch.Tensor
    metric: torch.Tensor


def open_passage(
    model: nn.Module,
    encoded: Encoded,
    *,
    pad: int,
    batch_tokens: int | None = None,
    memory_gib: float | None = None,
    under: Edits | None = None,
    done: Callable[[int], None] = lambda work: None,
) -> Passage:
    """The passage for `encoded` prompts that leaves out most and, in a trial on some of them, loses nothing."""
    device = input_device(causal_lm(model).get_input_embeddings())
    tokens = batch_tokens or tokens_per_pass(model, device, memory_gib)
    whole = found = Passage(model, device, pad, tokens, is_sharded(model), under=under or {})
    blocks = find_blocks(model)
    # A hook that changes a block's output would change states again that are handed in in its place.
    changed = any(block._forward_hooks for block in blocks.layers)
    if blocks.bare and not changed and not whole.sharded and len(blocks) > 1:
        prefix = common_prefix(encoded) if new_cache(model) is not None else ()
        parts = replace(whole, parts=True)
        kinds = [replace(parts, prefix=prefix), parts] if len(prefix) >= SHORTEST_PREFIX else [parts]
        by_length = sorted(encoded, key=len)
        some = [by_length[place * (len(encoded) - 1) // 3] for place in range(4)]
        found = next((kind for kind in kinds if all(from_all(_works(whole, kind, some)))), whole)
    return replace(found, done=done)


def common_prefix(encoded: Encoded) -> tuple[int, ...]:
    """The ids that all prompts begin with, without the last token of any."""
    lists = [list(ids) for ids in encoded]
    least, greatest = min(lists), max(lists)  # in the order of lists all others lie between these two
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(least, greatest, strict=False))
    most = min(map(len, encoded)) - 1
    return tuple(first for first, _ in itertools.islice(shared, most))


def _works(whole: Passage, kind: Passage, encoded: Encoded) -> bool:
    """Whether `kind` finds what whole passes find: prompt by prompt, so that nothing can linger, and all padded to one.

    In half precision differences also count as rounding if they are not much greater than those between whole passes of
    the two sorts.
    """
    sizes = (1, 4 * len(encoded) * max(map(len, encoded)))
    alone, padded = (_trial(replace(whole, batch_tokens=size), encoded) for size in sizes)
    dtype = causal_lm(whole.model).dtype
    rounding = LEAST_TOLERANCE.get(dtype, 8e-3)
    if dtype not in (torch.float32, torch.float64):
        rounding = max(rounding, min(3 * _difference(alone, padded), MOST_TOLERANCE))
    try:
        return all(_difference(alone, _trial(replace(kind, batch_tokens=size), encoded)) <= rounding for size in sizes)
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False


def _trial(passage: Passage, encoded: Encoded) -> torch.Tensor:
    """Mean states `[K, d_model]` of the second half of the blocks, begun in the middle, on this rank alone."""
    middle = passage.depth // 2
    layers = range(middle, passage.depth)
    stream = Stream(replace(passage, shared=False), encoded)
    return stream.run([{}], first=middle, last=layers[-1], layers=layers).states[0]


def _difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """The greatest relative difference over layers."""
    lengths = one.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((one - two).norm(dim=-1) / lengths).max())


class Stream:
    """This rank's share of the prompts of one class.

    Args:
        encoded: all ranks' prompts, prefix included.
    """

    def __init__(self, passage: Passage, encoded: Encoded) -> None:
        self.passage = passage
        self.total = len(encoded)
        own = [ids[len(passage.prefix) :] for ids in encoded]
        self.batches = batches(own, passage.batch_tokens, passage.pad, passage.device, shared=passage.shared)
        self.layer = 0
        self._states: list[torch.Tensor] = []
        self._prefix_inputs: list[torch.Tensor] = []
        self._prefix_clean: DynamicCache | None = None
        self._clean_logits: dict[int, torch.Tensor] = {}
        if passage.prefix:
            self._run_clean_prefix()

    @property
    def tokens(self) -> int:
        """Tokens of one pass over all own prompts, padding included."""
        return sum(batch.input_ids.numel() for batch in self.batches)

    def together(self, most: int) -> int:
        """How many of `most` interventions to run at once, so that passes are as large as they may be."""
        smallest = min(batch.input_ids.numel() for batch in self.batches)
        longest = max(smallest, len(self.passage.prefix))
        return max(1, min(most, self.passage.batch_tokens // longest))

    def run(
        self,
        interventions: Sequence[Edits],
        *,
        first: int,
        last: int,
        layers: Sequence[int],
        metric: Metric | None = None,
        keep_logits: bool = False,
    ) -> Outcome:
        """Pass all prompts under each of the interventions.

        Args:
            interventions: at the same sites each, none of them before block `first`.
            first, last: the blocks that are needed; others are left out if they may be.
            layers: whose outputs are wanted, from `first` to `last`.
            metric: what to make of the logits, which needs all blocks to the end.
            keep_logits: keep them for comparison, as those of the clean prompts.
        """
        if self.passage.parts:
            self._seek(first)
        else:
            first, last = 0, self.passage.depth - 1
        edits = [combined(self.passage.under, intervention) for intervention in interventions]
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def group(part: range) -> None:
            found[part.start] = self._run_group(
                edits[part.start : part.stop], first, last, layers, metric, keep_logits
            )

        run_within_memory(self.passage.model, [range(len(edits))], group, _halves)
        # One meeting of all ranks for all groups, as a rank that is short of memory has more of them.
        sums = [torch.cat(parts) for parts in zip(*(found[start] for start in sorted(found)), strict=True)]
        states, total = ((summed(part.cpu()) if self.passage.shared else part.cpu()) / self.total for part in sums)
        return Outcome(states, total if metric is not None else torch.full_like(total, torch.nan))

    def _run_group(
        self,
        edits: Sequence[Edits],
        first: int,
        last: int,
        layers: Sequence[int],
        metric: Metric | None,
        keep_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's sums of states and metrics, for interventions that share a pass over the prefix."""
        count, device = len(edits), self.passage.device
        precise = torch.float32 if device.type == "mps" else torch.float64
        width = find_blocks(self.passage.model).hidden_size
        states = torch.zeros(count, len(layers), width, dtype=precise, device=device)
        metrics = torch.zeros(count, dtype=precise, device=device)
        prefix = self._run_prefix(edits, first, last)

        with Recorder(self.passage.model, layers, "output") as recorder:

            def one(piece: _Piece) -> None:
                batch = self.batches[piece.batch].part(piece.rows)
                tiles, rows = piece.parts.stop - piece.parts.start, len(batch)
                logits = metric is not None or keep_logits
                recorder.states.clear()  # of a pass that did not fit
                output = self._forward(piece, batch, edits[piece.parts], prefix, first, last, logits)
                counted = batch.counted.to(device)

                def total(values: torch.Tensor) -> torch.Tensor:
                    by_intervention: torch.Tensor = values.unflatten(0, (tiles, rows))
                    return by_intervention[:, counted].to(precise).sum(1)

                seen = total(recorder.take(batch.tiled(tiles), [-1])[:, 0]) if layers else 0.0
                measured: torch.Tensor | float = 0.0
                if keep_logits and output is not None:
                    self._keep(piece, output)
                if metric is not None and output is not None:
                    clean = self._clean_logits[piece.batch][piece.rows].repeat(tiles, 1)
                    measured = total(metric(clean, output))
                states[piece.parts] += seen
                metrics[piece.parts] += measured
                self.passage.done(batch.input_ids.numel() * tiles * (last - first + 1))

            run_within_memory(self.passage.model, self._pieces(count), one, _Piece.halves)
        return states, metrics

    def _pieces(self, count: int) -> list[_Piece]:
        steps = [max(1, self.passage.batch_tokens // batch.input_ids.numel()) for batch in self.batches]
        return [
            _Piece(index, slice(start, min(start + steps[index], count)), slice(0, len(batch)))
            for index, batch in enumerate(self.batches)
            for start in range(0, count, steps[index])
        ]

    def _forward(
        self,
        piece: _Piece,
        batch: TokenBatch,
        edits: Sequence[Edits],
        prefix: DynamicCache | None,
        first: int,
        last: int,
        logits: bool,
    ) -> torch.Tensor | None:
        """One pass of `batch` under each of `edits`, from the kept states on."""
        model, rows = self.passage.model, len(batch)
        tiled = batch.tiled(len(edits))
        states = None
        if first > 0:
            kept = self._states[piece.batch][piece.rows, : batch.input_ids.shape[1]]
            states = kept.repeat(len(edits), 1, 1)
        cache = None if prefix is None else PrefixCache(prefix, piece.parts, rows)
        with only_blocks(model, first, last, states), intervene(model, stacked(edits, rows)):
            return forward(model, tiled, logits=logits, sharded=self.passage.sharded, prefix=cache)

    def _keep(self, piece: _Piece, logits: torch.Tensor) -> None:
        """Remember what the plain model says; a batch that was cut in two comes in parts."""
        kept = self._clean_logits.setdefault(
            piece.batch, logits.new_empty(len(self.batches[piece.batch]), logits.shape[-1])
        )
        kept[piece.rows] = logits

    # --- what all prompts begin with ---

    def _prefix_batch(self, rows: int) -> TokenBatch:
        ids = torch.tensor([list(self.passage.prefix)] * rows, device=self.passage.device)
        length = torch.full((rows,), ids.shape[1], device=ids.device)
        return TokenBatch(ids, torch.ones_like(ids), length, torch.arange(rows), torch.ones(rows, dtype=torch.bool))

    def _run_prefix(self, edits: Sequence[Edits], first: int, last: int) -> DynamicCache | None:
        """Keys and values of the prefix under each of `edits`."""
        if not self.passage.prefix:
            return None
        model, count = self.passage.model, len(edits)
        cache = new_cache(model)
        assert cache is not None
        assert self._prefix_clean is not None
        states = self._prefix_inputs[first].repeat(count, 1, 1) if first > 0 else None
        batch = self._prefix_batch(count)
        with only_blocks(model, first, last, states), intervene(model, stacked(edits, 1)):
            causal_lm(model).get_decoder()(input_ids=batch.input_ids, past_key_values=cache, use_cache=True)
        self.passage.done(batch.input_ids.numel() * (last - first + 1))
        return filled(cache, self._prefix_clean, first)

    def _run_clean_prefix(self) -> None:
        model, depth = self.passage.model, self.passage.depth
        with Recorder(model, range(depth), "output") as recorder:
            self._prefix_clean = new_cache(model)
            with intervene(model, self.passage.under):
                causal_lm(model).get_decoder()(
                    input_ids=self._prefix_batch(1).input_ids, past_key_values=self._prefix_clean, use_cache=True
                )
            outputs = [recorder.states[layer] for layer in range(depth)]
        self._prefix_inputs = [outputs[0], *outputs[:-1]]  # block l begins with the output of block l - 1
        self.passage.done(len(self.passage.prefix) * depth)

    # --- what the prompts have become ---

    def _seek(self, layer: int) -> None:
        """Bring the plain prompts to the input of block `layer`, from where they are or from the beginning."""
        if layer == self.layer:
            return
        start = self.layer if layer > self.layer else 0
        if layer > 0:
            self._advance(start, layer - 1)
        self.layer = layer

    def _advance(self, first: int, last: int) -> None:
        moved: dict[int, torch.Tensor] = {}
        with Recorder(self.passage.model, [last], "output") as recorder:

            def one(piece: _Piece) -> None:
                batch = self.batches[piece.batch]
                part = batch.part(piece.rows)
                self._forward(piece, part, [self.passage.under], self._prefix_clean, first, last, logits=False)
                found = recorder.states.pop(last)
                kept = moved.setdefault(piece.batch, found.new_zeros(*batch.input_ids.shape, found.shape[-1]))
                kept[piece.rows, : found.shape[1]] = found
                self.passage.done(part.input_ids.numel() * (last - first + 1))

            run_within_memory(self.passage.model, self._pieces(1), one, _Piece.halves)
        self._states = [moved[index] for index in range(len(self.batches))]
