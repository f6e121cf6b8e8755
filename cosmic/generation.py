"""Greedy generation in batches, with any intervention in force: what the model says, row for row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cosmic.blocks import causal_lm, evaluation_mode
from cosmic.interventions import Edits, intervene
from cosmic.prompts import pad_id
from cosmic.ranks import input_device, is_sharded, rank_count, share

_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
}
"""Plain greedy decoding, spelt out because what is left out is filled in from the model's own generation config."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    edits: Edits | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue each of `encoded` (token ids, chat template applied) greedily; the new text only, in the given order.

    Several processes divide the rows among them, and all get every text.

    Args:
        edits: interventions in force during the whole generation.
        progress: called with the number of rows finished after each batch.
    """
    inner = causal_lm(model)
    device = input_device(inner.get_input_embeddings())
    pad = pad_id(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=_stop_ids(inner, tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        **_GREEDY,
    )
    generator, together = _generator_of(model, inner), is_sharded(model)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    part = share(len(order))
    own = part.of(order)
    texts: list[str] = []
    with evaluation_mode(model), intervene(model, edits or {}):
        for start in range(0, len(own), batch_size):
            rows = [encoded[row] for row in own[start : start + batch_size]]
            longest = max(map(len, rows))
            ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            output = generator.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                synced_gpus=together and rank_count() > 1,
            )
            texts += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            if progress:
                before = min(start * rank_count(), len(order))
                progress(min(len(rows) * rank_count(), len(order) - before))
    found = part.joined(texts)
    replies = dict(zip(order, found, strict=True))
    return [replies[row] for row in range(len(encoded))]


def _generator_of(model: nn.Module, inner: PreTrainedModel) -> Any:
    """What to call `generate` on: FSDP prepares its outermost module only, everything else is best left out."""
    return model if isinstance(model, FSDPModule) else inner


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Everything that ends a turn: the tokenizer's end token and those the model's own generation config names."""
    ids: list[int] = []
    for value in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
        ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    return sorted(set(ids)) or None
