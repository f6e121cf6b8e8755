"""Extraction where memory runs out: the same result, nothing done twice, or one clear line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cosmic import Extraction, ExtractionConfig, InputError, extract
from cosmic.activations import Recorder, mean_states
from cosmic.blocks import evaluation_mode
from cosmic.prompts import PromptEncoder, TokenBatch
from cosmic.stream import Stream, open_passage
from tests.cosmic.tiny import HARMFUL, HARMLESS, build_tokenizer

SETTINGS: dict[str, Any] = {"train_prompts": 4, "validation_prompts": 3, "positions": 3, "max_kl": None}
ORDER = 'Reply "no" to all.\nSay nothing else.'


def config(**options: Any) -> ExtractionConfig:
    return ExtractionConfig(**{**SETTINGS, **options})


class Narrow(nn.Module):
    """An MLP that has no room for more than `room` tokens at once, and counts those it has passed."""

    def __init__(self, inner: nn.Module, room: float = float("inf")) -> None:
        super().__init__()
        self.inner, self.room = inner, room
        self.passed = 0
        self.refused = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.shape[0] * hidden.shape[1]
        if tokens > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("no room")
        self.passed += tokens
        out: torch.Tensor = self.inner(hidden)
        return out


def narrow(model: PreTrainedModel, block: int) -> tuple[PreTrainedModel, Narrow]:
    """A copy of a model, and its one block that may be short of memory."""
    copied = copy.deepcopy(model)
    gate = Narrow(copied.model.layers[block].mlp)
    copied.model.layers[block].mlp = gate
    return copied, gate


def equal_length(prompts: list[str]) -> list[str]:
    """The prompts, filled up with digits, so that their ids are as many."""
    return [prompt + "7" * (70 - len(build_tokenizer()(prompt)["input_ids"])) for prompt in prompts]


def assert_alike(one: Extraction, two: Extraction) -> None:
    assert one.selection.ranking == two.selection.ranking
    for name, values in one.scores.items():
        torch.testing.assert_close(values, two.scores[name], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(one.vectors, two.vectors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("system_prompt", [None, ORDER], ids=["short prefix", "prefix"])
@pytest.mark.parametrize("method", ["cosmic", "substring"])
@pytest.mark.parametrize("intervention", ["linear", "affine"])
@pytest.mark.parametrize("block", [1, 3])
def test_passes_that_do_not_fit_are_cut_and_the_rest_is_not_repeated(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    block: int,
    intervention: str,
    method: str,
    system_prompt: str | None,
) -> None:
    model, gate = narrow(llama, block)
    harmful, harmless = equal_length(HARMFUL), equal_length(HARMLESS)
    options = config(
        batch_tokens=600, intervention=intervention, method=method, system_prompt=system_prompt, max_kl=0.3,
        min_induce=-100.0, full_map=True,
    )  # fmt: skip
    extract(model, tokenizer, harmful, harmless, options)  # also measures the blocks, once and for all
    gate.passed = 0
    expected = extract(model, tokenizer, harmful, harmless, options)
    whole = gate.passed
    gate.passed, gate.room = 0, 230
    found = extract(model, tokenizer, harmful, harmless, options)
    assert gate.refused > 3
    assert_alike(found, expected)
    assert gate.passed <= whole * 1.02, "what was finished has been repeated"


def test_what_was_counted_before_memory_ran_out_is_not_counted_twice(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The logits of a pass are often the largest thing that is made, so memory runs out after states were read."""
    encoded = [PromptEncoder(tokenizer).encode(prompt) for prompt in HARMFUL]

    def measure(room: int) -> tuple[torch.Tensor, torch.Tensor]:
        def metric(clean: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
            if len(now) > room:
                raise torch.OutOfMemoryError("no room")
            return now.double().sum(-1)

        with evaluation_mode(llama):
            stream = Stream(open_passage(llama, encoded, pad=0, batch_tokens=1000), encoded)
            stream.run([{}], first=0, last=3, layers=[1, 3], keep_logits=True)
            outcome = stream.run([{}, {}], first=0, last=3, layers=[1, 3], metric=metric)
        return outcome.states, outcome.metric

    for found, expected in zip(measure(1), measure(1000), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("intervention", ["linear", "affine"])
def test_a_long_prefix_under_many_interventions_is_cut_too(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, intervention: str
) -> None:
    model, gate = narrow(llama, 2)
    options = config(batch_tokens=600, intervention=intervention, system_prompt="Say no. " * 10, full_map=True)
    harmful, harmless = ([f"{verb} it {n}" for n in range(6)] for verb in ("Burn", "Paint"))
    expected = extract(model, tokenizer, harmful, harmless, options)
    gate.room = 120  # the longest prompt has fewer
    found = extract(model, tokenizer, harmful, harmless, options)
    assert gate.refused
    assert_alike(found, expected)


def test_one_prompt_that_does_not_fit_is_bad_input(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model, gate = narrow(llama, 2)
    extract(model, tokenizer, HARMFUL, HARMLESS, config())
    gate.room = 30
    with pytest.raises(
        InputError, match=r"does not fit into memory\. Lower `batch_tokens`, shorten the longest"
    ) as error:
        extract(model, tokenizer, HARMFUL, HARMLESS, config())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("intervention", ["linear", "affine"])
def test_a_token_per_pass_is_a_prompt_per_pass(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, intervention: str
) -> None:
    found, expected = (
        extract(
            llama, tokenizer, HARMFUL, HARMLESS,
            config(batch_tokens=tokens, intervention=intervention, system_prompt=ORDER, max_kl=0.3),
        )
        for tokens in (1, None)
    )  # fmt: skip
    assert_alike(found, expected)


def test_states_read_before_memory_ran_out_are_not_averaged_twice(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = [PromptEncoder(tokenizer).encode(prompt) for prompt in HARMFUL]
    expected = mean_states(llama, encoded, positions=[-2, -1], pad=0)
    take = Recorder.take

    def short(self: Recorder, batch: TokenBatch, positions: Sequence[int]) -> torch.Tensor:
        if len(batch) > 2 and list(positions) == [-1]:  # which are read after all positions
            raise torch.OutOfMemoryError("no room")
        return take(self, batch, positions)

    monkeypatch.setattr(Recorder, "take", short)
    for found, wanted in zip(mean_states(llama, encoded, positions=[-2, -1], pad=0), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
