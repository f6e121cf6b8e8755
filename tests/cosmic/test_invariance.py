"""What must not matter does not: padding side, batch size, order of the prompts, wrapping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cosmic import Extraction, ExtractionConfig, extract
from cosmic.activations import read
from cosmic.prompts import PromptEncoder
from tests.cosmic import tiny
from tests.cosmic.tiny import HARMFUL, HARMLESS, hook_counts

ModelOf = Callable[[str], PreTrainedModel]
SETTINGS: dict[str, Any] = {
    "train_prompts": 4,
    "validation_prompts": 3,
    "positions": 2,
    "batch_tokens": 75,
    "evaluation_share": 0.5,
    "method": "substring",
    "full_map": True,
    "max_kl": None,
}


def assert_same(one: Extraction, two: Extraction) -> None:
    assert one.positions == two.positions
    assert one.tokens == two.tokens
    assert one.evaluation_layers == two.evaluation_layers
    assert one.selection.chosen == two.selection.chosen
    assert one.scores.keys() == two.scores.keys()
    near = {"rtol": 1e-5, "atol": 1e-5}
    for name, values in one.scores.items():
        torch.testing.assert_close(values, two.scores[name], **near)
    torch.testing.assert_close(one.vectors, two.vectors, **near)
    torch.testing.assert_close(one.direction.vector, two.direction.vector, **near)
    torch.testing.assert_close(one.layers.references, two.layers.references, **near)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe", "qwen3_5_text", "lfm2"])
def test_padding_side_batches_and_order_do_not_matter(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    if name == "qwen3_5_text":  # its linear attention forgets so fast that some candidates are near zero in float32
        model = copy.deepcopy(model).double()
    left, right = (tiny.build_tokenizer(padding_side=side) for side in ("left", "right"))
    first = extract(model, left, HARMFUL, HARMLESS, ExtractionConfig(**SETTINGS))
    alone = extract(model, right, HARMFUL, HARMLESS, ExtractionConfig(**{**SETTINGS, "batch_tokens": 1}))
    assert_same(first, alone)
    together = extract(
        model,
        right,
        HARMFUL[::-1],
        [*HARMLESS[3:], *HARMLESS[:3]],
        ExtractionConfig(**{**SETTINGS, "batch_tokens": 5000}),
    )
    assert_same(first, together)
    assert first.provenance == together.provenance


def test_repeated_prompts_count_once(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    first = extract(llama, tokenizer, HARMFUL, HARMLESS, ExtractionConfig(**SETTINGS))
    as_messages = [[{"role": "user", "content": prompt}] for prompt in HARMFUL]
    again = extract(llama, tokenizer, [*HARMFUL, *as_messages], HARMLESS * 2, ExtractionConfig(**SETTINGS))
    assert_same(first, again)


def test_states_and_logits_come_back_in_the_given_order(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = copy.deepcopy(llama)  # as transformers leaves hooks of its own behind
    encoder = PromptEncoder(tokenizer)
    encoded = [encoder.encode(prompt) for prompt in HARMFUL]
    options: dict[str, Any] = {"layers": [3, 1], "positions": [-2, -1], "place": "input", "pad": 0, "logits": True}
    together = read(llama, encoded, batch_tokens=150, **options)
    assert together.states.shape == (8, 2, 2, 32)
    assert together.logits is not None
    for row, ids in enumerate(encoded):
        alone = read(llama, [ids], batch_tokens=1, **options)
        assert alone.logits is not None
        torch.testing.assert_close(together.states[row], alone.states[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            everything = other(input_ids=torch.tensor([ids]), output_hidden_states=True)
        torch.testing.assert_close(alone.logits[0], everything.logits[0, -1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.states[0, :, 1], everything.hidden_states[1][0, -2:], rtol=1e-5, atol=1e-5)


def test_a_model_that_gives_every_logit_is_read_at_the_right_place(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = copy.deepcopy(llama)
    forward = model.forward
    model.forward = lambda logits_to_keep=0, **inputs: forward(**inputs)  # type: ignore[method-assign]
    encoded = [PromptEncoder(tokenizer).encode(prompt) for prompt in HARMFUL]
    options: dict[str, Any] = {"layers": [0], "positions": [-1], "place": "output", "batch_tokens": 5000, "pad": 0}
    found, expected = (read(one, encoded, logits=True, **options).logits for one in (model, llama))
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_lora_that_does_nothing_does_not_matter(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    wrapped = get_peft_model(copy.deepcopy(llama), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    wrapped.train()
    modes = [module.training for module in wrapped.modules()]
    found = extract(wrapped, tokenizer, HARMFUL, HARMLESS, ExtractionConfig(**SETTINGS))
    assert_same(found, extract(llama, tokenizer, HARMFUL, HARMLESS, ExtractionConfig(**SETTINGS)))
    assert [module.training for module in wrapped.modules()] == modes
    assert not hook_counts(wrapped)
    assert all(parameter.grad is None for parameter in wrapped.parameters())
