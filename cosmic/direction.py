"""What extraction finds: a `Direction`, or one per layer, with all that is needed to use it and to know its origin."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cosmic import interventions
from cosmic.blocks import DecoderBlocks, Site, find_blocks
from cosmic.errors import InputError
from cosmic.interventions import Edit, Interventions, intervene
from cosmic.storage import read_json, read_tensors, write_json, write_tensors


@dataclass(frozen=True)
class Direction:
    """One refusal direction.

    Attributes:
        vector: r = r⁺ - r⁻ (`[d_model]`, float32), harmful minus harmless mean, not normalised, or its part along a
            line that was fitted otherwise.
        reference: r⁻ (`[d_model]`, float32), the harmless mean at the same place; the origin of affine edits.
        layer: index of the block at whose input it was read (0-based).
        position: token it was read at, counted from the end of the prompt (-1 is the last).
        token: that token's text.
        scores: the scores it was chosen by.
        provenance: model, revision, prompts' fingerprint, method and versions.
    """

    vector: torch.Tensor
    reference: torch.Tensor
    layer: int
    position: int
    token: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def ablate(self, model: nn.Module) -> Interventions:
        """Context manager: linear ablation (LCE) at every block input, attention output and MLP output."""
        return intervene(model, self.ablation_edits(model))

    def add(self, model: nn.Module, alpha: float = 1.0) -> Interventions:
        """Context manager: x + αr at the input of this direction's block."""
        return intervene(model, self.addition_edits(model, alpha))

    def affine(self, model: nn.Module, alpha: float = 0.0) -> Interventions:
        """Context manager: affine edit (ACE) at the input of this direction's block; α = 0 ablates, α = 1 adds."""
        return intervene(model, self.affine_edits(model, alpha))

    def ablation_edits(self, model: nn.Module) -> dict[Site, list[Edit]]:
        """The edits of `ablate`."""
        return interventions.ablation(self.vector, self._blocks_of(model).sites())

    def addition_edits(self, model: nn.Module, alpha: float = 1.0) -> dict[Site, list[Edit]]:
        """The edits of `add`."""
        self._blocks_of(model)
        return interventions.addition(self.vector, self.layer, alpha)

    def affine_edits(self, model: nn.Module, alpha: float = 0.0) -> dict[Site, list[Edit]]:
        """The edits of `affine`."""
        self._blocks_of(model)
        return interventions.affine(self.vector, self.reference, self.layer, alpha)

    def _blocks_of(self, model: nn.Module) -> DecoderBlocks:
        blocks = find_blocks(model)
        if not 0 <= self.layer < len(blocks) or len(self.vector) != blocks.hidden_size:
            raise InputError(
                f"the direction (layer {self.layer}, width {len(self.vector)}) does not fit a model of "
                f"{len(blocks)} layers and width {blocks.hidden_size}. Use one extracted from this architecture."
            )
        return blocks

    def cosine(self, other: Direction) -> float:
        """Cosine similarity of the two vectors, in float64."""
        return float(interventions.unit_vector(self.vector) @ interventions.unit_vector(other.vector))

    def save(self, folder: Path | str) -> None:
        """Write `direction.safetensors` and `direction.json`."""
        folder = Path(folder)
        write_tensors(folder / "direction.safetensors", {"vector": self.vector, "reference": self.reference})
        write_json(
            folder / "direction.json",
            {
                "layer": self.layer,
                "position": self.position,
                "token": self.token,
                "scores": {name: value if math.isfinite(value) else None for name, value in self.scores.items()},
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, folder: Path | str) -> Direction:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or malformed.
        """
        folder = Path(folder)
        tensors, record = read_tensors(folder / "direction.safetensors"), read_json(folder / "direction.json")
        try:
            scores = {name: math.nan if value is None else value for name, value in record["scores"].items()}
            direction = cls(tensors["vector"], tensors["reference"], **{**record, "scores": scores})
            valid = direction.layer >= 0 and direction.position < 0 and direction.vector.dim() == 1
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"`{folder}` does not hold a saved direction: {error!r}.") from error
        if not valid or direction.vector.shape != direction.reference.shape:
            raise InputError(
                f"`{folder}` does not hold a saved direction: layer {direction.layer}, position {direction.position}, "
                f"shapes {tuple(direction.vector.shape)} and {tuple(direction.reference.shape)}."
            )
        return direction


@dataclass(frozen=True)
class LayerDirections:
    """One direction per layer, for layerwise ablation (RFA, ReFAT §3.1).

    Attributes:
        vectors: `[L, d_model]` float32, harmful minus harmless mean at each block's input, last token.
        references: `[L, d_model]` float32, the harmless means.
    """

    vectors: torch.Tensor
    references: torch.Tensor

    def edits(self, share: float = 0.75, mean: Literal["harmless", "zero"] = "harmless") -> dict[Site, list[Edit]]:
        """The edits of `ablate`."""
        references = self.references if mean == "harmless" else None
        return interventions.layerwise(self.vectors, references, first_layer(share, len(self.vectors)))

    def ablate(
        self, model: nn.Module, share: float = 0.75, mean: Literal["harmless", "zero"] = "harmless"
    ) -> Interventions:
        """Context manager: x - r̂ₗr̂ₗᵀx + r̂ₗr̂ₗᵀr⁻ₗ at the inputs of the last `share` of the blocks."""
        blocks = find_blocks(model)
        if tuple(self.vectors.shape) != (len(blocks), blocks.hidden_size):
            raise InputError(
                f"layer directions of shape {tuple(self.vectors.shape)} do not fit a model of {len(blocks)} layers "
                f"and width {blocks.hidden_size}. Use those extracted from this architecture."
            )
        return intervene(model, self.edits(share, mean))

    def save(self, folder: Path | str) -> None:
        """Write `layers.safetensors`."""
        write_tensors(Path(folder) / "layers.safetensors", {"vectors": self.vectors, "references": self.references})

    @classmethod
    def load(cls, folder: Path | str) -> LayerDirections:
        """Read what `save` wrote."""
        path = Path(folder) / "layers.safetensors"
        tensors = read_tensors(path)
        if set(tensors) != {"vectors", "references"}:
            raise InputError(f"`{path}` does not hold layer directions: it has {sorted(tensors)}.")
        return cls(**tensors)


def first_layer(share: float, count: int) -> int:
    """The first of the last `share` of `count` layers, e.g. layer 3 of 12 for 0.75."""
    return int((1 - share) * count + 1e-9)
