"""Candidates fitted to prompts one by one: the main component of paired differences, or a linear probe's normal.

The difference in means knows the prompts' averages only. These know how states vary, too: `pca` takes the line along
which harmful and harmless prompts differ most (Zou et al., Representation Engineering, §3.1), `probe` the line along
which they are told apart best. How candidates are scored and chosen stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from cosmic.activations import read
from cosmic.blocks import find_blocks
from cosmic.candidates import Candidates, difference_in_means
from cosmic.interventions import Edits, unit_vector
from cosmic.probes import fit_probe
from cosmic.ranks import is_sharded, rank_count, share

Kind = Literal["pca", "probe"]


def fitted_candidates(
    model: nn.Module,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    *,
    kind: Kind,
    positions: list[int],
    pad: int,
    batch_tokens: int | None = None,
    edits: Edits | None = None,
) -> Candidates:
    """Candidates from encoded prompts, like `cosmic.candidates.difference_in_means` but with other lines.

    A candidate is the part of the difference in means along the fitted line v: r = v vᵀ(r⁺ - r⁻). It points from
    harmless to harmful whatever the sign of v, and an addition of strength 1 carries the harmless mean to where the
    harmful mean is along v. Where the means do not differ, r = 0.

    All block inputs are held in float32 on the CPU, (N + M) P L d_model · 4 bytes on every process. Several processes
    divide prompts and layers (prompts only if weights are not sharded) and all get the same candidates.

    Args:
        kind: `pca`: see `main_difference`; `probe`: the weight of `cosmic.probes.fit_probe`.
        positions: negative token positions, ascending.
        edits: in force while states are read.
    """
    options: dict[str, Any] = {"positions": positions, "pad": pad, "batch_tokens": batch_tokens, "edits": edits}
    means = difference_in_means(model, harmful, harmless, **options)
    plus, minus = (_block_inputs(model, prompts, options) for prompts in (harmful, harmless))
    part = share(means.vectors.shape[1])
    lines = [_line(plus[:, :, layer], minus[:, :, layer], kind) for layer in part.indices]
    unit = unit_vector(torch.stack(part.joined(lines), dim=1))
    return replace(means, vectors=unit * (unit * means.vectors).sum(-1, keepdim=True))


def _block_inputs(model: nn.Module, encoded: Sequence[Sequence[int]], options: dict[str, Any]) -> torch.Tensor:
    """Every block's input, `[N, P, L, d_model]` float32, on every rank."""
    layers = range(len(find_blocks(model)))
    # Prompts of unlike lengths make unlike numbers of passes, which ranks that meet in every pass cannot have.
    if rank_count() == 1 or is_sharded(model):
        return read(model, encoded, layers=layers, place="input", **options).states
    part = share(len(encoded))
    own = read(model, part.of(encoded), layers=layers, place="input", **options).states
    rows = [states.clone() for states in own]  # a view would be sent along with all that it is a view of
    return torch.stack(part.joined(rows))


def _line(harmful: torch.Tensor, harmless: torch.Tensor, kind: Kind) -> torch.Tensor:
    return main_difference(harmful, harmless) if kind == "pca" else fit_probe(harmful, harmless).weight


def main_difference(harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
    """First principal component of differences between paired states, of either sign.

    The i-th harmful state is paired with the i-th harmless one; the smaller set begins again where it ends, so that
    every state is used. Differences are not centred: they and their negatives are the sample, as in RepE.

    Args:
        harmful: `[N, ..., d_model]`.
        harmless: `[M, ..., d_model]`.

    Returns:
        `[..., d_model]` float64 of length 1, or 0 where no pair differs or a state is not finite.
    """
    index = torch.arange(max(len(harmful), len(harmless)))
    differences = harmful[index % len(harmful)].double() - harmless[index % len(harmless)].double()
    differences = differences.movedim(0, -2)
    finite = differences.isfinite().all(-1).all(-1)
    differences = torch.where(finite[..., None, None], differences, 0)
    if differences.shape[-2] < differences.shape[-1]:  # the smaller of two matrices with the same eigenvalues
        _, vectors = torch.linalg.eigh(differences @ differences.mT)
        return unit_vector((vectors[..., None, :, -1] @ differences).squeeze(-2))
    _, vectors = torch.linalg.eigh(differences.mT @ differences)
    differ = differences.any(-1).any(-1)
    return torch.where(differ[..., None], vectors[..., -1], 0)
