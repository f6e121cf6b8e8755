"""`extract` agrees with the naive loops of `naive.py`: candidates, every score, and the choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cosmic import Extraction, ExtractionConfig, extract
from cosmic.extraction import refusal_token_ids
from cosmic.prompt_split import split_prompts
from cosmic.prompts import PromptEncoder
from tests.cosmic import naive
from tests.cosmic.tiny import HARMFUL, HARMLESS

TOLERANCE = 1e-5
TOKENS = (40, 77, 130)


@dataclass(frozen=True)
class Case:
    architecture: str
    affine: bool
    share: float = 0.3
    alpha: float = 1.0
    system: str | None = None
    """Before all prompts, so that they have a long beginning in common."""


SYSTEM = "Answer briefly."
CASES = [
    Case("llama", affine=False),
    Case("llama", affine=False, system=SYSTEM),
    Case("llama", affine=True, alpha=1.5, system=SYSTEM),
    Case("gemma2", affine=False, share=0.5),
    Case("gemma3_text", affine=False, share=0.5, system=SYSTEM),
    Case("gemma3_text", affine=True, system=SYSTEM),
    Case("qwen3", affine=False, system=SYSTEM),
    Case("qwen3", affine=True, share=0.1),
    Case("qwen3_moe", affine=False, system=SYSTEM),
    Case("qwen3_moe", affine=True, share=0.5, system=SYSTEM),
    Case("lfm2", affine=False, share=0.5, system=SYSTEM),
    Case("lfm2", affine=True, system=SYSTEM),
]
POSITIONS = (-4, -3, -2, -1)


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda case: f"{case.architecture}-{'ace' if case.affine else 'lce'}{'-system' if case.system else ''}",
)
def both(
    request: pytest.FixtureRequest, model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> tuple[Case, PreTrainedModel, naive.Found, Callable[..., Extraction]]:
    """The case, the oracle's scores (computed in float64), and a function that runs `extract` (in float32)."""
    case: Case = request.param
    model = model_of(case.architecture)
    settings = {
        "intervention": "affine" if case.affine else "linear",
        "evaluation_share": case.share,
        "alpha": case.alpha,
        "train_prompts": 4,
        "validation_prompts": 3,
        "positions": 4,
        "batch_tokens": 120,
        "system_prompt": case.system,
        "system_prompt_on": "both",
        "full_map": True,
        "refusal_tokens": TOKENS,
    }

    def run(**changes: object) -> Extraction:
        return extract(model, tokenizer, HARMFUL, HARMLESS, ExtractionConfig(**{**settings, **changes}))  # type: ignore[arg-type]

    parts = split_prompts(HARMFUL, HARMLESS, ExtractionConfig(train_prompts=4, validation_prompts=3))
    begin = f"<|bos|><|system|>\n{case.system}<|end|>\n" if case.system else "<|bos|>"
    ids = {
        name: [
            tokenizer.encode(f"{begin}<|user|>\n{prompt}<|end|>\n<|assistant|>\n", add_special_tokens=False)
            for prompt in prompts
        ]
        for name, prompts in parts.items()
    }
    precise = copy.deepcopy(model).double()
    precise.set_experts_implementation("eager")  # the grouped product of a mixture of experts knows no float64
    found = naive.extract(
        precise,
        (ids["train_harmful"], ids["train_harmless"]),
        (ids["validation_harmful"], ids["validation_harmless"]),
        positions=POSITIONS,
        affine=case.affine,
        share=case.share,
        alpha=case.alpha,
        refusal_tokens=TOKENS,
    )
    return case, model, found, run


Both = tuple[Case, PreTrainedModel, naive.Found, Callable[..., Extraction]]


def as_map(scores: Mapping[tuple[int, int], float]) -> torch.Tensor:
    """`[P, L]` from a dictionary by (position, layer)."""
    return torch.tensor(
        [[scores[position, layer] for layer in range(4)] for position in POSITIONS], dtype=torch.float64
    )


def assert_near(found: torch.Tensor, expected: Mapping[tuple[int, int], float]) -> None:
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, as_map(expected), rtol=TOLERANCE, atol=TOLERANCE)


def naive_choice(
    final: Mapping[tuple[int, int], float], found: naive.Found, allowed: Callable[[tuple[int, int]], bool]
) -> tuple[int, int]:
    """Best allowed (position, layer) outside the last fifth of four layers, zero directions apart."""
    cells = [cell for cell in final if cell[1] < 0.8 * 4 and found.vectors[cell].any() and allowed(cell)]
    return max(cells, key=lambda cell: final[cell])


def median_peaks(found: naive.Found, aggregate: str) -> list[int]:
    """Of the positions other than the last, the middle one of the layers where each score peaks."""
    return [
        sorted(
            max(range(4), key=[scores[position, layer] for layer in range(4)].__getitem__)
            for position in POSITIONS[:3]
        )[1]
        for scores in (found.comply[aggregate], found.refuse[aggregate])
    ]


def test_candidates_and_evaluation_layers(both: Both) -> None:
    _, _, found, run = both
    extraction = run()
    assert extraction.evaluation_layers == found.evaluation_layers
    for row, position in enumerate(extraction.positions):
        for layer in range(4):
            for values, expected in ((extraction.vectors, found.vectors), (extraction.references, found.references)):
                torch.testing.assert_close(
                    values[row, layer].double(), expected[position, layer], rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("aggregate", ["concat", "mean"])
def test_cosmic_scores_and_choice(both: Both, aggregate: str) -> None:
    _, _, found, run = both
    limit = sorted(found.kl.values())[8] * 1.001  # some candidates pass, some do not
    extraction = run(aggregate=aggregate, max_kl=limit)
    assert_near(extraction.scores["comply"], found.comply[aggregate])
    assert_near(extraction.scores["refuse"], found.refuse[aggregate])
    assert_near(extraction.scores["kl"], found.kl)
    final = {cell: found.comply[aggregate][cell] + found.refuse[aggregate][cell] for cell in found.kl}
    assert_near(extraction.scores["final"], final)
    peaks = median_peaks(found, aggregate)
    expected = naive_choice(
        final,
        found,
        lambda cell: found.kl[cell] <= limit and not (cell[0] == -1 and cell[1] > peaks[0] and cell[1] > peaks[1]),
    )
    assert (extraction.direction.position, extraction.direction.layer) == expected
    assert not extraction.selection.relaxed
    assert extraction.direction.scores["final"] == pytest.approx(final[expected], abs=TOLERANCE)
    frugal = run(aggregate=aggregate, max_kl=limit, full_map=False)
    assert frugal.selection.chosen == extraction.selection.chosen
    for name, values in frugal.scores.items():  # what is measured is the same, and the rest was not needed
        known = values.isfinite()
        torch.testing.assert_close(values[known], extraction.scores[name][known], rtol=TOLERANCE, atol=TOLERANCE)
    assert frugal.scores["kl"].isnan().any()


def test_top_ten(both: Both) -> None:
    _, _, found, run = both
    extraction = run(max_kl=None, median_peak=False, last_layers_dropped=0.0)
    final = {cell: found.comply["concat"][cell] + found.refuse["concat"][cell] for cell in found.kl}
    expected = sorted(
        (cell for cell in final if found.vectors[cell].any()),
        key=lambda cell: (-round(final[cell], 9), cell[1], cell[0]),
    )
    ranking = [(extraction.positions[row], layer) for row, layer in extraction.selection.ranking]
    assert ranking[:10] == expected[:10]


def test_the_aggregates_differ(both: Both) -> None:
    case, _, found, _ = both
    layers = len(found.evaluation_layers)
    assert (as_map(found.comply["concat"]) != as_map(found.comply["mean"])).any() == (layers > 1), case


def test_substring_scores_and_choice(both: Both) -> None:
    _, _, found, run = both
    threshold = sorted(found.induce.values())[4] + 1e-4
    extraction = run(method="substring", min_induce=threshold, max_kl=None)
    assert_near(extraction.scores["bypass"], found.bypass)
    assert_near(extraction.scores["induce"], found.induce)
    assert_near(extraction.scores["kl"], found.kl)
    expected = naive_choice(
        {cell: -value for cell, value in found.bypass.items()}, found, lambda cell: found.induce[cell] > threshold
    )
    assert (extraction.direction.position, extraction.direction.layer) == expected
    assert set(run().scores) == {"comply", "refuse", "kl", "final"}


def test_derived_refusal_tokens_are_the_first_of_common_refusals(tokenizer: PreTrainedTokenizerFast) -> None:
    first = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("I cannot", "I'm", "Sorry", "As an AI")]
    assert refusal_token_ids(PromptEncoder(tokenizer)) == sorted(set(first))
