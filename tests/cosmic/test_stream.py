"""Partial passes find what whole ones find, on every architecture, and are not made where they would not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cosmic import ExtractionConfig, InputError, extract, prompts
from cosmic.activations import read
from cosmic.blocks import evaluation_mode, find_blocks
from cosmic.budget import run_within_memory
from cosmic.interventions import Edits, ablation, addition, affine, combined
from cosmic.prompt_split import split_prompts
from cosmic.prompts import PromptEncoder, batches, length_groups
from cosmic.scores import similarity
from cosmic.stream import Stream, common_prefix, open_passage
from tests.cosmic.tiny import ARCHITECTURES, HARMFUL, HARMLESS, blocks_of, build_model, hook_counts, random_vector

ModelOf = Callable[[str], PreTrainedModel]
DEPTH = 4
WITHOUT_PREFIX = {"qwen3_5_text", "lfm2"}
"""Their recurrent and convolutional layers keep more than keys and values."""


@pytest.fixture(scope="module")
def encoded(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Prompts that begin with the same 21 tokens."""
    encoder = PromptEncoder(tokenizer, "Answer briefly.")
    return [encoder.encode(prompt) for prompt in [*HARMFUL, *HARMLESS]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_may_be_left_out_is_found_by_trial(name: str, model_of: ModelOf, encoded: list[list[int]]) -> None:
    model = model_of(name)
    with evaluation_mode(model):
        passage = open_passage(model, encoded, pad=0)
    assert passage.parts
    assert len(passage.prefix) == (0 if name in WITHOUT_PREFIX else 21)
    assert not hook_counts(model)
    assert all("forward" not in block.__dict__ for block in blocks_of(model))


def intervention(kind: str, layer: int, seed: int) -> Edits:
    vector, reference = random_vector(32, seed=seed), random_vector(32, seed=seed + 1000)
    if kind == "addition":
        return addition(vector, layer, 2.0)
    return affine(vector, reference, layer, 0.5)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["llama", "gemma3_text", "qwen3_moe", "lfm2", "mistral"]),
    kind=st.sampled_from(["ablation", "addition", "affine"]),
    first=st.integers(0, DEPTH - 1),
    before=st.integers(0, DEPTH - 1),
    count=st.integers(1, 4),
    tokens=st.sampled_from([1, 40, 150, 10_000]),
)
def test_a_partial_pass_is_a_whole_one(
    model_of: ModelOf, encoded: list[list[int]], name: str, kind: str, first: int, before: int, count: int, tokens: int
) -> None:
    """Whatever block it begins at, and wherever the prompts have been before."""
    model = model_of(name)
    if kind == "ablation":
        first = 0
    sites = find_blocks(model).sites()
    edits = [
        ablation(random_vector(32, seed=seed), sites) if kind == "ablation" else intervention(kind, first, seed)
        for seed in range(count)
    ]
    layers = range(first, DEPTH)
    with evaluation_mode(model):
        stream = Stream(open_passage(model, encoded, pad=0, batch_tokens=tokens), encoded)
        stream.run([{}], first=before, last=DEPTH - 1, layers=[DEPTH - 1])
        found = stream.run(edits, first=first, last=DEPTH - 1, layers=layers).states
    options: dict[str, Any] = {"layers": layers, "positions": [-1], "place": "output", "pad": 0}
    for index, edit in enumerate(edits):
        expected = read(model, encoded, edits=edit, **options).states[:, 0].double().mean(0)
        torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-5)


def test_logits_of_partial_passes(llama: PreTrainedModel, encoded: list[list[int]]) -> None:
    """Averages over rows of products with the clean logits, so that a mix-up of rows would show."""
    edits = [addition(random_vector(32, seed=seed), 2, 3.0) for seed in range(3)]
    options: dict[str, Any] = {"layers": [3], "positions": [-1], "place": "output", "pad": 0, "logits": True}
    clean = read(llama, encoded, **options).logits
    assert clean is not None
    with evaluation_mode(llama):
        stream = Stream(open_passage(llama, encoded, pad=0, batch_tokens=100), encoded)
        stream.run([{}], first=0, last=3, layers=[3], keep_logits=True)
        found = stream.run(edits, first=2, last=3, layers=[3], metric=lambda plain, now: (plain * now).sum(-1)).metric
    for index, edit in enumerate(edits):
        now = read(llama, encoded, edits=edit, **options).logits
        assert now is not None
        assert float(found[index]) == pytest.approx(float((clean * now).sum(-1).mean()), rel=1e-5)


def wrap(block: nn.Module, around: Callable[[Callable[..., torch.Tensor]], Callable[..., Any]]) -> None:
    block.forward = around(block.forward)  # type: ignore[method-assign]


def test_a_model_whose_blocks_remember_is_passed_whole(llama: PreTrainedModel, encoded: list[list[int]]) -> None:
    """A later block that looks at what an earlier one saw would look at another prompt's."""
    model = copy.deepcopy(llama)
    seen: list[torch.Tensor] = []
    find_blocks(model)  # which of the children write is another question

    def remembering(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor, **inputs: Any) -> torch.Tensor:
            seen.append(forward(hidden, **inputs))
            return seen[-1]

        return run

    def recalling(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda hidden, **inputs: forward(hidden, **inputs) + seen[-1].mean(dim=(0, 1))

    wrap(blocks_of(model)[0], remembering)
    wrap(blocks_of(model)[3], recalling)
    wrapped = [block.__dict__.get("forward") for block in blocks_of(model)]
    with evaluation_mode(model):
        passage = open_passage(model, encoded, pad=0)
    assert not passage.parts
    assert not passage.prefix
    assert [block.__dict__.get("forward") for block in blocks_of(model)] == wrapped


def test_blocks_that_return_tuples_are_passed_whole(llama: PreTrainedModel, encoded: list[list[int]]) -> None:
    model = copy.deepcopy(llama)

    for block in blocks_of(model):
        wrap(block, lambda forward: lambda hidden, **inputs: (forward(hidden, **inputs), None))
        block.register_forward_pre_hook(lambda _, args: args[0][:1] if isinstance(args[0], tuple) else args)
    wrap(model.get_decoder().norm, lambda forward: lambda states: forward(states[0]))
    with evaluation_mode(model):
        passage = open_passage(model, encoded, pad=0)
        assert not passage.parts
        found = Stream(passage, encoded).run([{}], first=2, last=3, layers=[3]).states[0, 0]
    expected = read(llama, encoded, layers=[3], positions=[-1], place="output", pad=0).states.double().mean(0)[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_whose_outputs_are_steered_by_others_is_passed_whole(
    llama: PreTrainedModel, encoded: list[list[int]]
) -> None:
    """A hook on a block's output would work a second time on the states that are handed in in its place."""
    model = copy.deepcopy(llama)
    find_blocks(model)
    blocks_of(model)[2].register_forward_hook(lambda _, __, out: out + 1.0)
    with evaluation_mode(model):
        assert not open_passage(model, encoded, pad=0).parts


@pytest.mark.parametrize("intervention_kind", ["linear", "affine"])
def test_scores_under_edits_that_are_always_in_force(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, intervention_kind: Literal["linear", "affine"]
) -> None:
    """Equal to whole passes with both edits, ablation at every site; an edit in between may write along the candidate."""
    under = affine(random_vector(32, seed=7), random_vector(32, seed=8), layer=2, alpha=0.7)
    settings_ = {
        "train_prompts": 4,
        "validation_prompts": 3,
        "positions": 2,
        "full_map": True,
        "evaluation_share": 0.5,
    }
    config = ExtractionConfig(intervention=intervention_kind, **settings_)  # type: ignore[arg-type]
    found = extract(llama, tokenizer, HARMFUL, HARMLESS, config, under=under)
    encoder, parts = PromptEncoder(tokenizer), split_prompts(HARMFUL, HARMLESS, config)
    b, a = ([encoder.encode(one) for one in parts[f"validation_{kind}"]] for kind in ("harmful", "harmless"))
    options: dict[str, Any] = {"layers": found.evaluation_layers, "positions": [-1], "place": "output", "pad": 0}

    def mean(prompts: list[list[int]], *edits: Edits) -> torch.Tensor:
        return read(llama, prompts, edits=combined(under, *edits), **options).states[:, 0].double().mean(0)

    for cell in ((0, 1), (1, 1), (1, 2), (0, 3)):
        direction = found.at(cell)
        ablate = direction.ablation_edits(llama) if intervention_kind == "linear" else direction.affine_edits(llama)
        expected = similarity(mean(b, ablate), mean(a), "concat")
        assert float(found.scores["comply"][cell]) == pytest.approx(float(expected), abs=1e-5)


def test_the_shared_prefix_leaves_every_prompt_a_token() -> None:
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9, 9]]) == (1, 2)
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == (1, 2)
    assert common_prefix([[7], [7, 8]]) == ()
    assert common_prefix([[1], [2]]) == ()


# --- batches and budgets ---


@given(lengths=st.lists(st.integers(1, 60), max_size=30), tokens=st.integers(1, 300))
def test_batches_keep_to_their_tokens(lengths: list[int], tokens: int) -> None:
    groups = length_groups(sorted(lengths), tokens)
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * sorted(lengths)[group[-1]] <= tokens


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25), world=st.integers(1, 5), tokens=st.integers(1, 200)
)
def test_prompts_are_dealt_out_evenly(lengths: list[int], world: int, tokens: int) -> None:
    ids = [[5] * length for length in lengths]
    dealt = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "rank_count", lambda: world)
        for rank in range(world):
            patch.setattr(prompts, "rank", lambda rank=rank: rank)
            dealt.append(batches(ids, tokens, 0, torch.device("cpu"), shared=True))
    shapes = {tuple(batch.input_ids.shape for batch in hand) for hand in dealt}
    assert len(shapes) == 1, "every rank makes the same passes"
    counted = [row for hand in dealt for batch in hand for row in batch.rows[batch.counted].tolist()]
    assert sorted(counted) == list(range(len(lengths)))


@given(sizes=st.lists(st.integers(1, 20), max_size=8), room=st.integers(1, 20))
def test_what_does_not_fit_is_cut_and_nothing_is_done_twice(
    llama: PreTrainedModel, sizes: list[int], room: int
) -> None:
    done: list[int] = []

    def run(piece: range) -> None:
        if len(piece) > room:
            raise torch.OutOfMemoryError("no room")
        done.extend(piece)

    def halves(piece: range) -> list[range]:
        middle = (piece.start + piece.stop) // 2
        return [range(piece.start, middle), range(middle, piece.stop)]

    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    run_within_memory(
        llama, [range(start, start + size) for start, size in zip(starts, sizes, strict=True)], run, halves
    )
    assert done == list(range(sum(sizes)))


def test_only_a_lack_of_memory_is_answered_by_cutting(llama: PreTrainedModel) -> None:
    def fail(error: Exception) -> Callable[[int], None]:
        def run(_: int) -> None:
            raise error

        return run

    with pytest.raises(RuntimeError, match="shapes"):
        run_within_memory(llama, [1], fail(RuntimeError("shapes differ")), lambda piece: [piece, piece])
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        with pytest.raises(InputError, match="Lower `batch_tokens`"):
            run_within_memory(llama, [1], fail(error), lambda piece: [piece])


def test_a_deeper_window_than_the_prefix(encoded: list[list[int]]) -> None:
    """A sliding window shorter than the prefix, and one that ends within it."""
    for window in (5, 18, 40):
        model = build_model("mistral", sliding_window=window)
        with evaluation_mode(model):
            passage = open_passage(model, encoded, pad=0)
            assert len(passage.prefix) == 21
            found = Stream(passage, encoded).run([{}], first=0, last=3, layers=[3]).states[0, 0]
        expected = (
            read(model, encoded, layers=[3], positions=[-1], place="output", pad=0).states.double().mean(0)[0, 0]
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
