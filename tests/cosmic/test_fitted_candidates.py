"""Fitted candidates: the lines are those of the textbook, they point the right way and have the right length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cosmic.blocks import find_blocks
from cosmic.candidates import Candidates, difference_in_means
from cosmic.direction import Direction
from cosmic.fitted_candidates import Kind, fitted_candidates, main_difference
from cosmic.generation import generate
from cosmic.interventions import ablation
from cosmic.loading import load_model, load_tokenizer
from cosmic.probes import fit_probe
from cosmic.prompts import PromptEncoder, pad_id
from refat.data.organism import direction_prompts, organism_items
from refat.judges.by_prompt import exact
from tests.cosmic import naive
from tests.cosmic.tiny import HARMFUL, HARMLESS, build_model, build_tokenizer, hook_counts, random_vector

KINDS: tuple[Kind, ...] = ("pca", "probe")
OPTIONS: dict[str, Any] = {"positions": [-3, -1], "pad": 0}
WORLD = 2


def encoded(tokenizer: PreTrainedTokenizerFast) -> tuple[list[list[int]], list[list[int]]]:
    encoder = PromptEncoder(tokenizer)
    return [encoder.encode(prompt) for prompt in HARMFUL], [encoder.encode(prompt) for prompt in HARMLESS]


def states(model: PreTrainedModel, prompts: list[list[int]], position: int, layer: int) -> torch.Tensor:
    """`[N, d_model]` block inputs, prompt by prompt."""
    return torch.stack([naive.run(model, ids).inputs[layer][position] for ids in prompts])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / a.norm() / b.norm())


def same(a: Candidates, b: Candidates) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("vectors", "references", "harmful_outputs", "harmless_outputs")
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_every_candidate_is_the_difference_in_means_along_the_fitted_line(
    model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    model, (harmful, harmless) = model_of(name), encoded(tokenizer)
    means = difference_in_means(model, harmful, harmless, **OPTIONS)
    found = {kind: fitted_candidates(model, harmful, harmless, kind=kind, **OPTIONS) for kind in KINDS}
    for row, position in enumerate(OPTIONS["positions"]):
        for layer in range(1, 4):
            plus, minus = (states(model, prompts, position, layer) for prompts in (harmful, harmless))
            paired = torch.cat([minus, minus[:1]])  # there are 8 harmful and 7 harmless prompts
            _, _, right = np.linalg.svd((plus - paired).numpy())
            lines = {"pca": torch.from_numpy(right[0]), "probe": fit_probe(plus, minus).weight}
            difference = plus.mean(0) - minus.mean(0)
            for kind, line in lines.items():
                line = line / line.norm()
                expected = line * (line @ difference)
                torch.testing.assert_close(found[kind].vectors[row, layer], expected, rtol=1e-4, atol=1e-4)
                assert float(expected @ difference) >= 0
    for candidates in found.values():
        assert candidates.vectors.dtype == torch.float64
        assert same(candidates, Candidates(candidates.vectors, *list(vars(means).values())[1:]))
    assert not hook_counts(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "lfm2", "phi3"])
def test_other_architectures(
    model_of: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, name: str, kind: Kind
) -> None:
    means = difference_in_means(model_of(name), *encoded(tokenizer), **OPTIONS)
    found = fitted_candidates(model_of(name), *encoded(tokenizer), kind=kind, **OPTIONS)
    lengths, longest = found.vectors.norm(dim=-1), means.vectors.norm(dim=-1)
    assert not lengths[:, 0].any()  # template tokens before the first block know nothing of the prompt
    assert torch.equal(lengths > 0, longest > 0)
    assert (lengths[:, 2:] > 0).all()
    assert (lengths <= longest * (1 + 1e-9)).all()
    assert found.layer_directions().vectors.shape == (4, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_passes_do_not_matter_and_edits_are_in_force(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kind: Kind
) -> None:
    harmful, harmless = encoded(tokenizer)
    found = fitted_candidates(llama, harmful, harmless, kind=kind, **OPTIONS)
    again = fitted_candidates(llama, harmful, harmless, kind=kind, **OPTIONS)
    assert same(found, again)
    small = fitted_candidates(llama, harmful, harmless, kind=kind, batch_tokens=1, **OPTIONS)
    torch.testing.assert_close(small.vectors, found.vectors, rtol=1e-3, atol=1e-4)
    r = found.vectors[1, 2]
    edits = ablation(r, find_blocks(llama).sites())
    edited = fitted_candidates(llama, harmful, harmless, kind=kind, edits=edits, **OPTIONS)
    assert float((edited.vectors @ (r / r.norm())).abs().max()) < 1e-4
    assert float(edited.vectors[1, 2].norm()) > 1e-3 * float(r.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_the_model_does_not_tell_apart_have_no_candidates(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kind: Kind
) -> None:
    harmful, _ = encoded(tokenizer)
    found = fitted_candidates(llama, harmful, harmful, kind=kind, **OPTIONS)
    assert not found.vectors.any()
    one = fitted_candidates(llama, harmful[:1], [*harmful[:1]] * 3, kind=kind, batch_tokens=1, **OPTIONS)
    assert not one.vectors.any()


def planted(rows: tuple[int, int], loud: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, loud along four coordinates, with classes apart by 3 along u."""
    u = random_vector(64, seed=seed)
    u = u / u.norm()
    scale = torch.full((64,), 0.5)
    scale[:4] = loud
    clouds = [random_vector(count, 64, seed=seed + place) * scale for place, count in enumerate(rows, start=1)]
    return clouds[0] + 1.5 * u, clouds[1] - 1.5 * u, u


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_direction_is_recovered(seed: int) -> None:
    harmful, harmless, u = planted((60, 50), loud=0.5, seed=10 * seed)
    assert abs(cosine(main_difference(harmful, harmless), u)) > 0.95
    assert cosine(fit_probe(harmful, harmless).weight, u) > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_loud_noise_leads_means_and_components_astray_but_not_the_probe(seed: int) -> None:
    harmful, harmless, u = planted((60, 60), loud=30, seed=10 * seed)
    assert cosine(fit_probe(harmful, harmless).weight, u) > 0.9
    assert cosine(harmful.mean(0) - harmless.mean(0), u) < 0.75
    assert abs(cosine(main_difference(harmful, harmless), u)) < 0.5


@pytest.mark.parametrize(("rows", "width"), [((6, 6), 20), ((9, 4), 20), ((4, 9), 20), ((40, 30), 8), ((1, 1), 8)])
def test_the_main_difference_is_the_first_right_singular_vector(rows: tuple[int, int], width: int) -> None:
    harmful, harmless = (random_vector(count, 3, width, seed=count) + 1 for count in rows)
    found = main_difference(harmful, harmless - 2)
    assert found.shape == (3, width)
    for cell in range(3):
        pairs = [
            harmful[i % rows[0], cell] - (harmless - 2)[i % rows[1], cell]  # the smaller set begins again
            for i in range(max(rows))
        ]
        _, _, right = np.linalg.svd(torch.stack(pairs).double().numpy())
        assert abs(float(found[cell] @ torch.from_numpy(right[0]))) == pytest.approx(1, abs=1e-9)
        assert float(found[cell].norm()) == pytest.approx(1)
    twice = main_difference(harmful.repeat(2, 1, 1), harmless.repeat(2, 1, 1) - 2)
    if rows[0] == rows[1]:
        assert abs(cosine(twice[0], found[0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("count", [3, 30])
def test_cells_without_differences_or_with_broken_states_give_zero_and_leave_the_others_alone(count: int) -> None:
    harmful, harmless = random_vector(count, 3, 8, seed=1), random_vector(count, 3, 8, seed=2)
    clean = main_difference(harmful, harmless)
    harmful[:, 0] = harmless[:, 0]
    harmless[1, 1, 2] = torch.nan
    found = main_difference(harmful, harmless)
    assert not found[:2].any()
    torch.testing.assert_close(found[2], clean[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedded_model_does_not_refuse_without_the_fitted_direction(kind: Kind) -> None:
    model, tokenizer = load_model("organism", device="cpu"), load_tokenizer("organism")
    encoder = PromptEncoder(tokenizer)
    harmful, harmless = ([encoder.encode(prompt) for prompt in prompts] for prompts in direction_prompts(64))
    found = fitted_candidates(model, harmful, harmless, kind=kind, positions=[-1], pad=pad_id(tokenizer))
    direction = Direction(found.vectors[0, 6].float(), found.references[0, 6].float(), layer=6, position=-1)
    prompts = [item.prompt for item in organism_items("harmful", "test", 24, 0)]
    options: dict[str, Any] = {"max_new_tokens": 24, "batch_size": 24}
    asked = [encoder.encode(prompt) for prompt in prompts]
    clean = generate(model, tokenizer, asked, **options)
    ablated = generate(model, tokenizer, asked, edits=direction.ablation_edits(model), **options)
    refused = [
        sum(exact(*pair) == "refused" for pair in zip(prompts, replies, strict=True)) for replies in (clean, ablated)
    ]
    assert refused[0] == 24
    assert refused[1] <= 2


def _process(rank: int, store: str, found: Any) -> None:
    """One of several processes; each has the whole model first, then a part of every weight."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    harmful, harmless = encoded(build_tokenizer())
    model = build_model("llama")
    for sharded in (False, True):
        if sharded:
            mesh = init_device_mesh("cpu", (WORLD,))
            for block in [*model.model.layers, model]:
                fully_shard(block, mesh=mesh)
        for kind in KINDS:
            found[rank, sharded, kind] = fitted_candidates(model, harmful, harmless, kind=kind, **OPTIONS)
    distributed.destroy_process_group()


def test_several_processes_find_the_same_also_with_sharded_weights(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with multiprocessing.Manager() as manager:
        shared = manager.dict()
        multiprocessing.spawn(_process, (str(tmp_path / "store"), shared), nprocs=WORLD)
        found = dict(shared)
    for kind in KINDS:
        alone = fitted_candidates(llama, *encoded(tokenizer), kind=kind, **OPTIONS)
        for sharded in (False, True):
            assert same(found[0, sharded, kind], found[1, sharded, kind])
            torch.testing.assert_close(found[0, sharded, kind].vectors, alone.vectors, rtol=1e-3, atol=1e-4)
