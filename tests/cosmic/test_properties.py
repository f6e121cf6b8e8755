"""What must not matter, for any prompts' order, padding, batches and directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from cosmic import Edit, Extraction, ExtractionConfig, apply_edit, extract
from cosmic.interventions import affine, unit_vector
from tests.cosmic.tiny import HARMFUL, HARMLESS, build_tokenizer, random_vector

WIDTH = 16
SETTINGS: dict[str, Any] = {"train_prompts": 4, "validation_prompts": 3, "positions": 2, "full_map": True}


@pytest.fixture(scope="module")
def reference(llama: PreTrainedModel) -> Extraction:
    return extract(llama, build_tokenizer(), HARMFUL, HARMLESS, ExtractionConfig(**SETTINGS))


@settings(max_examples=20, deadline=None)
@given(
    harmful=st.permutations(HARMFUL),
    harmless=st.permutations(HARMLESS),
    tokens=st.integers(1, 400),
    side=st.sampled_from(["left", "right"]),
)
def test_order_padding_and_batches_do_not_matter(
    llama: PreTrainedModel, reference: Extraction, harmful: list[str], harmless: list[str], tokens: int, side: str
) -> None:
    config = ExtractionConfig(**SETTINGS, batch_tokens=tokens)
    found = extract(llama, build_tokenizer(padding_side=side), harmful, harmless, config)
    assert found.selection.chosen == reference.selection.chosen
    for name, values in reference.scores.items():
        torch.testing.assert_close(found.scores[name], values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.vectors, reference.vectors, rtol=1e-5, atol=1e-5)


def ablation(vector: torch.Tensor) -> Edit:
    return Edit(unit_vector(vector), torch.tensor(0.0), torch.tensor(1.0))


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-20, 1e6), sign=st.sampled_from([-1, 1]))
def test_the_length_of_a_direction_does_not_change_its_ablation(seed: int, scale: float, sign: int) -> None:
    x, r = random_vector(2, 3, WIDTH, seed=seed).double(), random_vector(WIDTH, seed=seed + 1).double()
    expected = apply_edit(x, ablation(r))
    torch.testing.assert_close(apply_edit(x, ablation(sign * scale * r)), expected, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_ablating_twice_is_ablating_once(seed: int, scale: float) -> None:
    x, r = scale * random_vector(2, 3, WIDTH, seed=seed).double(), random_vector(WIDTH, seed=seed + 1).double()
    once = apply_edit(x, ablation(r))
    torch.testing.assert_close(apply_edit(once, ablation(r)), once, rtol=1e-9, atol=1e-9 * scale)


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_an_affine_edit_without_addition_is_ablation_re_centred(seed: int, scale: float) -> None:
    """x ↦ ablate(x - r⁻) + r⁻, whatever the length of r."""
    x, r, origin = (
        random_vector(*size, seed=seed + n).double() for n, size in enumerate(((2, 3, WIDTH), (WIDTH,), (WIDTH,)))
    )
    [[edit]] = affine(scale * r, origin, layer=0, alpha=0.0).values()
    expected = apply_edit(x - origin, ablation(r)) + origin
    torch.testing.assert_close(apply_edit(x, edit), expected, rtol=1e-9, atol=1e-9)
