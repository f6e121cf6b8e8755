"""Candidate directions: harmful minus harmless mean of every block's input at every post-instruction token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cosmic.activations import mean_states
from cosmic.direction import LayerDirections
from cosmic.interventions import Edits

ROUNDING = 1e-9
"""Length of a difference of means in float64, relative to the mean, below which it is none."""


@dataclass(frozen=True)
class Candidates:
    """Difference-in-means candidates (COSMIC §3.1, Arditi et al. eq. 1-2).

    Attributes:
        vectors: r = r⁺ - r⁻, or its part along a fitted line, `[P, L, d_model]` float64.
        references: r⁻, `[P, L, d_model]` float64.
        positions: the `P` token positions, negative, ascending.
        harmful_outputs, harmless_outputs: mean block outputs at the last token, `[L, d_model]` float64.
    """

    vectors: torch.Tensor
    references: torch.Tensor
    positions: list[int]
    harmful_outputs: torch.Tensor
    harmless_outputs: torch.Tensor

    def layer_directions(self) -> LayerDirections:
        """One direction per layer at the last token (ReFAT §3.1)."""
        return LayerDirections(self.vectors[-1].float(), self.references[-1].float())


def difference_in_means(
    model: nn.Module,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    *,
    positions: list[int],
    pad: int,
    batch_tokens: int | None = None,
    edits: Edits | None = None,
) -> Candidates:
    """Candidates from encoded prompts, optionally while other `edits` are in force (for iterated re-extraction)."""
    plus, plus_out = mean_states(model, harmful, positions=positions, pad=pad, batch_tokens=batch_tokens, edits=edits)
    minus, minus_out = mean_states(
        model, harmless, positions=positions, pad=pad, batch_tokens=batch_tokens, edits=edits
    )
    difference = plus - minus
    # Where all prompts have the same states, what is left of unequal numbers of them is rounding, and no direction.
    same = difference.norm(dim=-1) <= ROUNDING * minus.norm(dim=-1)
    return Candidates(difference.masked_fill(same[..., None], 0.0), minus, positions, plus_out, minus_out)
