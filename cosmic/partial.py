"""Running only a part of a model: the blocks that an edit can have changed, and the tokens in which prompts differ.

Before an edit's block the residual stream is what it was without it, after the last block that is read nothing matters,
and under edits of all tokens the tokens that all prompts begin with have the same states in every prompt. None of this is
taken on trust: `cosmic.stream` compares a partial pass with a whole one before it relies on it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cosmic.blocks import causal_lm, find_blocks


@contextlib.contextmanager
def only_blocks(model: nn.Module, first: int, last: int, states: torch.Tensor | None = None) -> Iterator[None]:
    """Within, a pass runs the blocks `first` to `last`; the others hand on what they are given.

    Args:
        states: `[batch, seq, d_model]`, what block `first` begins with; needed unless `first` is 0.
    """
    layers = find_blocks(model).layers

    def begin(*_: Any, **__: Any) -> torch.Tensor:
        assert states is not None
        return states

    def hand_on(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden

    skipped: dict[int, Any] = {index: hand_on for index in range(len(layers)) if not first <= index <= last}
    if first > 0:
        skipped[first - 1] = begin
    before = {index: layers[index].__dict__.get("forward") for index in skipped}
    try:
        for index, forward in skipped.items():
            layers[index].forward = forward
        yield
    finally:
        for index, forward in before.items():
            del layers[index].forward
            if forward is not None:
                layers[index].forward = forward


class PrefixCache(DynamicCache):
    """Keys and values of tokens that many rows begin with, stored once and never changed by a pass.

    Args:
        prefix: a cache of `C` rows after a pass over those tokens.
        rows: which of the `C` are used.
        repeats: how many rows of the batch begin with each of them, one after the other.
    """

    def __init__(self, prefix: DynamicCache, rows: slice, repeats: int) -> None:
        super().__init__()
        self.layers = prefix.layers
        self.rows, self.repeats = rows, repeats

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the prefix and of the batch's own tokens; what is joined here is kept nowhere."""
        layer = copy.copy(self.layers[layer_idx])
        layer.keys, layer.values = (self._spread(states) for states in (layer.keys, layer.values))
        joined: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return joined

    def _spread(self, states: torch.Tensor) -> torch.Tensor:
        return states[self.rows].repeat_interleave(self.repeats, dim=0)


def new_cache(model: nn.Module) -> DynamicCache | None:
    """An empty cache whose layers hold nothing but keys and values, or `None` if this model's layers hold more."""
    cache = DynamicCache(config=causal_lm(model).config)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)  # not their subclasses, which keep other states beside
    return cache if all(type(layer) in plain for layer in cache.layers) else None


def filled(cache: DynamicCache, before: DynamicCache, first: int) -> DynamicCache:
    """`cache` after a pass from block `first` on, with the layers before taken from a whole pass.

    Nothing reads their keys, but a cache is asked for its length at its first layers.
    """
    cache.layers[:first] = before.layers[:first]
    return cache
