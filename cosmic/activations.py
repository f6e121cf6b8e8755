"""Reading the residual stream: states of chosen layers and positions, streamed through the model batch by batch.

States are recorded by hooks of our own at named sites, never through `output_hidden_states`: that list mixes in the
final norm at its end, and whether it shows edits depends on the order in which hooks were registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import DynamicCache

from cosmic.blocks import causal_lm, evaluation_mode, find_blocks, hidden_states
from cosmic.budget import run_within_memory, tokens_per_pass
from cosmic.errors import InputError
from cosmic.interventions import Edits, intervene
from cosmic.prompts import TokenBatch, batches
from cosmic.ranks import input_device, is_sharded, summed


@dataclass(frozen=True)
class Reading:
    """What one pass over prompts has read.

    Attributes:
        states: `[N, P, K, d_model]`, float32 at least, for `N` prompts at `P` positions and `K` layers, in the given orders.
        logits: `[N, vocab]` float32 at the last token of each prompt, or `None`.
    """

    states: torch.Tensor
    logits: torch.Tensor | None


def read(
    model: nn.Module,
    encoded: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    positions: Sequence[int],
    place: Literal["input", "output"],
    pad: int,
    batch_tokens: int | None = None,
    edits: Edits | None = None,
    logits: bool = False,
) -> Reading:
    """Run `encoded` prompts and record block inputs or block outputs of `layers` at `positions`.

    A block's input is recorded as the block sees it, that is after an edit of that input; its output is recorded
    before the next block's edit. Runs in evaluation mode without gradients and leaves no hook behind.
    """
    if not encoded:
        raise ValueError("no prompts to read")
    sharded = is_sharded(model)
    states: list[torch.Tensor | None] = [None] * len(encoded)
    last_logits: list[torch.Tensor | None] = [None] * len(encoded)

    def run(batch: TokenBatch) -> None:
        output = forward(model, batch, logits=logits, sharded=sharded)
        found = recorder.take(batch, positions).cpu()
        for line, row in enumerate(batch.rows.tolist()):
            states[row] = found[line]
            last_logits[row] = None if output is None else output[line].float().cpu()

    with evaluation_mode(model), intervene(model, edits or {}), Recorder(model, layers, place) as recorder:
        run_within_memory(model, _batches(model, encoded, pad, batch_tokens), run, TokenBatch.halves)
    return Reading(_stacked(states), _stacked(last_logits) if logits else None)


def _stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return torch.stack([row for row in rows if row is not None])


def _batches(
    model: nn.Module, encoded: Sequence[Sequence[int]], pad: int, batch_tokens: int | None, shared: bool = False
) -> list[TokenBatch]:
    device = input_device(causal_lm(model).get_input_embeddings())
    return batches(encoded, batch_tokens or tokens_per_pass(model, device), pad, device, shared=shared)


def mean_states(
    model: nn.Module,
    encoded: Sequence[Sequence[int]],
    *,
    positions: Sequence[int],
    pad: int,
    batch_tokens: int | None = None,
    edits: Edits | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over prompts of all blocks' inputs `[P, L, d_model]` and, at the last token, outputs `[L, d_model]`.

    Accumulated in float64 batch by batch, so memory does not grow with the number of prompts. Several processes divide the
    prompts among them and all get the means.
    """
    if not encoded:
        raise ValueError("no prompts to average")
    blocks, sharded = find_blocks(model), is_sharded(model)
    layers = range(len(blocks))
    inputs = torch.zeros(len(positions), len(blocks), blocks.hidden_size, dtype=torch.float64)
    outputs = torch.zeros(len(blocks), blocks.hidden_size, dtype=torch.float64)

    def run(batch: TokenBatch) -> None:
        forward(model, batch, logits=False, sharded=sharded)
        found = (
            input_recorder.take(batch, positions),
            output_recorder.take(batch, [-1]),
        )  # memory may run out at either
        inputs.add_(found[0].cpu().double()[batch.counted].sum(0))
        outputs.add_(found[1].cpu().double()[batch.counted].sum(0)[0])

    with (
        evaluation_mode(model),
        intervene(model, edits or {}),
        Recorder(model, layers, "input") as input_recorder,
        Recorder(model, layers, "output") as output_recorder,
    ):
        run_within_memory(model, _batches(model, encoded, pad, batch_tokens, shared=True), run, TokenBatch.halves)
    return summed(inputs) / len(encoded), summed(outputs) / len(encoded)


def forward(
    model: nn.Module, batch: TokenBatch, *, logits: bool, sharded: bool, prefix: DynamicCache | None = None
) -> torch.Tensor | None:
    """One forward pass; the logits at each row's last token (`[batch, vocab]`), or nothing without `logits`.

    Args:
        sharded: weights are spread over ranks, so that the outermost wrapper has to be called.
        prefix: keys and values of tokens that come before the batch's own.
    """
    mask = batch.attention_mask
    if prefix is not None:
        mask = torch.cat([mask.new_ones(len(mask), prefix.get_seq_length()), mask], dim=1)
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "past_key_values": prefix, "use_cache": False}
    inner = causal_lm(model)
    if not logits and not sharded:
        inner.get_decoder()(**inputs)
        return None
    last = batch.position_index(-1)

    def only_last(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        rows = torch.arange(len(hidden), device=hidden.device)
        return (hidden[rows, last.to(hidden.device)][:, None], *args[1:])

    # Rows end in different columns, and the head's place may be another device's, so the choice is made where it runs.
    with inner.get_output_embeddings().register_forward_pre_hook(only_last):
        found: torch.Tensor = (model if sharded else inner)(**inputs).logits
    return found[:, 0] if logits else None


def _at(states: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states[rows, index]`, float32 at least, where `index` is; a model's layers may be spread over several devices."""
    found = states[rows.to(states.device), index.to(states.device)]
    return found.to(torch.promote_types(found.dtype, torch.float32)).to(index.device)


class Recorder:
    """Hooks that keep the hidden states of chosen layers of the newest forward pass."""

    def __init__(self, model: nn.Module, layers: Sequence[int], place: Literal["input", "output"]) -> None:
        blocks = find_blocks(model)
        self.layers = list(layers)
        outside = [layer for layer in self.layers if not 0 <= layer < len(blocks)]
        if outside:
            raise InputError(f"`layers` are {outside}; the model has layers 0 to {len(blocks) - 1}.")
        self.states: dict[int, torch.Tensor] = {}
        self.handles = []
        for layer in self.layers:
            block = blocks.layers[layer]
            if place == "input":
                hook = block.register_forward_pre_hook(lambda _, args, i=layer: self._keep(i, args))
            else:
                hook = block.register_forward_hook(lambda _, __, output, i=layer: self._keep(i, output))
            self.handles.append(hook)

    def _keep(self, layer: int, value: object) -> None:
        self.states[layer] = hidden_states(value)

    def take(self, batch: TokenBatch, positions: Sequence[int]) -> torch.Tensor:
        """`[batch, P, K, d_model]` float32, and forget."""
        index = torch.stack([batch.position_index(position) for position in positions], dim=1)
        rows = torch.arange(len(index), device=index.device)[:, None]
        taken = torch.stack([_at(self.states[layer], rows, index) for layer in self.layers], dim=2)
        self.states = {}
        return taken

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
