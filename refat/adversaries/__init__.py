"""Adversaries by name."""

from __future__ import annotations

from collections.abc import Sequence

from cosmic.blocks import DecoderBlocks, Site
from cosmic.errors import InputError
from refat.adversaries.base import Adversary
from refat.adversaries.layerwise import LayerwiseAdversary
from refat.adversaries.mixed import MixedAdversary
from refat.adversaries.none import NoAdversary
from refat.adversaries.static import StaticAdversary
from refat.config import RefatConfig

__all__ = [
    "Adversary",
    "LayerwiseAdversary",
    "MixedAdversary",
    "NoAdversary",
    "StaticAdversary",
    "editable_sites",
    "make_adversary",
    "require_layers",
]


def make_adversary(config: RefatConfig, blocks: DecoderBlocks) -> Adversary:
    """The adversary that `config.adversary` names, for a model with these blocks."""
    recenter = config.recenter
    if config.adversary == "cosmic":
        return MixedAdversary(
            editable_sites(blocks, config.layer_range),
            config.forms,
            config.form_weights,
            config.candidates,
            config.layer_share,
            recenter,  # type: ignore[arg-type]
        )
    if config.adversary == "layerwise":
        return LayerwiseAdversary(config.layer_share, recenter)  # type: ignore[arg-type]
    if config.adversary == "static":
        return StaticAdversary(editable_sites(blocks, config.layer_range))
    return NoAdversary()


def editable_sites(blocks: DecoderBlocks, layer_range: Sequence[int] | None) -> list[Site]:
    """The sites of the layers from the first to the last of `layer_range`; of all layers by default.

    Raises:
        InputError: a layer does not exist.
    """
    if layer_range is None:
        return blocks.sites()
    require_layers(layer_range, len(blocks))
    first, last = layer_range
    return [site for site in blocks.sites() if first <= site.layer <= last]


def require_layers(layer_range: Sequence[int] | None, count: int) -> None:
    """Refuse layers that a model of `count` layers does not have.

    Raises:
        InputError: `layer_range` names one.
    """
    if layer_range is not None and layer_range[-1] >= count:
        raise InputError(
            f"`layer_range` is {list(layer_range)}, but the model has layers 0 to {count - 1}. Correct it."
        )
