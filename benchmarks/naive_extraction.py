"""COSMIC's selection as it was published: three whole passes over the validation prompts for every candidate.

What `benchmarks/extraction.py` compares with. It shares no code with `cosmic.scoring` and its passes; hooks sit at every
block's input and at the outputs of attention and MLP, batches are taken in the given order, and all logits are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

BATCH = 32
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """What is scored.

    Attributes:
        vectors, references: `[P, L, d_model]` float64.
        harmful, harmless: validation prompts as token ids.
        layers: the evaluation layers.
        affine: judge by affine edits of one block (ACE), not by linear ones everywhere (LCE).
    """

    vectors: torch.Tensor
    references: torch.Tensor
    harmful: Sequence[Sequence[int]]
    harmless: Sequence[Sequence[int]]
    layers: Sequence[int]
    affine: bool


@torch.no_grad()
def score(model: PreTrainedModel, task: Task) -> dict[str, torch.Tensor]:
    """`comply`, `refuse` and `kl` of every candidate, `[P, L]` float64."""
    plain_harmful, _ = _run(model, task.harmful, task.layers)
    plain_harmless, plain_logits = _run(model, task.harmless, task.layers)
    plain = plain_logits.double().log_softmax(-1)
    maps = {name: torch.empty(task.vectors.shape[:2], dtype=torch.float64) for name in ("comply", "refuse", "kl")}
    for row in range(task.vectors.shape[0]):
        for layer in range(task.vectors.shape[1]):
            ablate, add = _changes(task, row, layer, next(model.parameters()))
            with _hooked(model, ablate, layer if task.affine else None):
                harmful, _ = _run(model, task.harmful, task.layers)
                _, logits = _run(model, task.harmless, task.layers)
            with _hooked(model, add, layer):
                harmless, _ = _run(model, task.harmless, task.layers)
            moved = logits.double().log_softmax(-1)
            maps["comply"][row, layer] = torch.cosine_similarity(harmful.flatten(), plain_harmless.flatten(), dim=0)
            maps["refuse"][row, layer] = torch.cosine_similarity(harmless.flatten(), plain_harmful.flatten(), dim=0)
            maps["kl"][row, layer] = (plain.exp() * (plain - moved)).sum(-1).mean()
    return maps


def _changes(task: Task, row: int, layer: int, like: torch.Tensor) -> tuple[Change, Change]:
    vector = task.vectors[row, layer].float().to(like.device)
    norm = vector.norm()
    unit = vector / norm if norm > 0 else vector
    origin = unit @ task.references[row, layer].float().to(like.device) if task.affine else torch.zeros_like(norm)

    def without(x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide - (wide @ unit)[..., None] * unit + to * unit).to(x.dtype)

    def ablate(x: torch.Tensor) -> torch.Tensor:
        return without(x, origin)

    def add(x: torch.Tensor) -> torch.Tensor:
        return without(x, origin + norm) if task.affine else (x.float() + vector).to(x.dtype)

    return ablate, add


@contextlib.contextmanager
def _hooked(model: PreTrainedModel, change: Change, layer: int | None) -> Iterator[None]:
    """`change` at the input of one block, or at all block inputs and the outputs of attention and MLP."""
    blocks: Sequence[nn.Module] = list(model.get_decoder().layers)
    handles = []
    for block in blocks if layer is None else [blocks[layer]]:
        handles.append(block.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:])))
        if layer is None:
            handles.append(block.mlp.register_forward_hook(lambda _, __, out: change(out)))
            handles.append(block.self_attn.register_forward_hook(lambda _, __, out: (change(out[0]), *out[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean block outputs `[K, d_model]` float64 and logits `[N, vocab]` at the last token."""
    seen: dict[int, torch.Tensor] = {}
    blocks = list(model.get_decoder().layers)
    handles = [
        blocks[layer].register_forward_hook(lambda _, __, out, at=layer: seen.__setitem__(at, out)) for layer in layers
    ]
    total, logits = torch.zeros(len(layers), model.config.hidden_size, dtype=torch.float64), []
    try:
        for start in range(0, len(prompts), BATCH):
            rows = prompts[start : start + BATCH]
            longest = max(map(len, rows))
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
            output = model(input_ids=ids, attention_mask=mask).logits
            last, lines = mask.sum(1) - 1, torch.arange(len(rows), device=model.device)
            total += torch.stack([seen[layer][lines, last].double().sum(0) for layer in layers]).cpu()
            logits.append(output[lines, last].float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    return total / len(prompts), torch.cat(logits)
