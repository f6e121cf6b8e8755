"""Edits do what their formulas say, row by row, and the hooks that make them leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from cosmic import (
    Direction,
    Edit,
    InputError,
    Interventions,
    LayerDirections,
    Site,
    apply_edit,
    find_blocks,
    intervene,
)
from cosmic.activations import mean_states, read
from cosmic.blocks import hidden_states, replace_hidden_states
from cosmic.interventions import ablation, addition, affine, combined, layerwise, unit_vector
from tests.cosmic.tiny import hook_counts, random_ids, random_vector

ModelOf = Callable[[str], PreTrainedModel]

WIDTH = 32


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def edit_of(edits: dict[Site, list[Edit]]) -> Edit:
    """The one edit of an intervention at one site."""
    [[edit]] = edits.values()
    return edit


@pytest.fixture(scope="module")
def direction() -> Direction:
    return Direction(random_vector(WIDTH, seed=1), random_vector(WIDTH, seed=2), layer=2, position=-1)


# --- the formulas ---


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.floats(-3, 3), scale=st.floats(1e-3, 1e3))
def test_each_intervention_is_its_formula(seed: int, alpha: float, scale: float) -> None:
    x = random_vector(2, 3, WIDTH, seed=seed).double()
    r, origin = (random_vector(WIDTH, seed=seed + n).double() for n in (1, 2))
    r = r * scale

    def projected(v: torch.Tensor) -> torch.Tensor:
        return (v @ r)[..., None] * r / (r @ r)

    site = Site(0, "block_input")
    cases = [
        (edit_of(ablation(r, [site])), x - projected(x)),
        (edit_of(addition(r, 0, alpha)), x + alpha * r),
        (edit_of(affine(r, origin, 0, alpha)), x - projected(x) + projected(origin) + alpha * r),
        (edit_of(layerwise(r[None], origin[None], 0)), x - projected(x) + projected(origin)),
        (edit_of(layerwise(r[None], None, 0)), x - projected(x)),
    ]
    for edit, expected in cases:
        torch.testing.assert_close(apply_edit(x, edit), expected, rtol=1e-9, atol=1e-9 * max(1, scale))


def test_edits_may_differ_from_row_to_row() -> None:
    x, units = random_vector(3, 4, WIDTH), unit_vector(random_vector(3, WIDTH, seed=1))
    offset, remove = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 1.0])
    edited = apply_edit(x, Edit(units, offset, remove))
    for row in range(3):
        alone = apply_edit(x[row : row + 1], Edit(units[row], offset[row], remove[row]))
        torch.testing.assert_close(edited[row : row + 1], alone)
    torch.testing.assert_close(edited[1], x[1] + 2 * units[1].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_rows_stay_bit_identical(dtype: torch.dtype) -> None:
    x = random_vector(4, 5, WIDTH).to(dtype)
    edit = Edit(unit_vector(random_vector(4, WIDTH, seed=1)), torch.tensor(3.0), torch.tensor(1.0))
    rows = torch.tensor([True, False, True, False])
    edited = apply_edit(x, Edit(edit.unit, edit.offset, edit.remove, rows))
    assert edited.dtype == dtype
    assert torch.equal(edited[~rows], x[~rows])
    assert torch.equal(edited[rows], apply_edit(x, edit)[rows])
    assert not torch.isclose(edited[rows], x[rows]).all(-1).any()
    tokens = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    edited = apply_edit(x, Edit(edit.unit, edit.offset, edit.remove, tokens))
    assert torch.equal(edited[~tokens], x[~tokens])
    assert torch.equal(edited[tokens], apply_edit(x, edit)[tokens])


def test_low_precision_is_edited_in_float32() -> None:
    x, r = random_vector(4, 50, WIDTH).bfloat16(), random_vector(WIDTH, seed=1).double()
    exact = x.double() - (x.double() @ r)[..., None] * r / (r @ r)
    edited = apply_edit(x, edit_of(ablation(r, [Site(0, "block_input")])))
    assert (edited == exact.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("rows", [None, torch.tensor([True, False])])
def test_autocast_does_not_reach_into_an_edit(rows: torch.Tensor | None) -> None:
    x, unit = random_vector(2, 3, WIDTH), unit_vector(random_vector(WIDTH, seed=1)).float()
    for edit in (
        Edit(unit, torch.tensor(0.3), torch.tensor(1.0), rows),
        Edit(unit.expand(2, -1), torch.tensor([0.3, 0.1]), torch.ones(2), rows),
    ):
        expected = apply_edit(x, edit)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(apply_edit(x, edit), expected, rtol=1e-6, atol=1e-6)


def test_the_input_is_not_changed_in_place_and_gradients_flow() -> None:
    x = random_vector(2, 3, WIDTH).requires_grad_()
    before = x.detach().clone()
    unit = unit_vector(random_vector(WIDTH, seed=1))
    rows = torch.tensor([True, False])
    apply_edit(x, Edit(unit, torch.tensor(0.0), torch.tensor(1.0), rows)).pow(2).sum().backward()
    assert torch.equal(x.detach(), before)
    assert x.grad is not None
    projected = (before @ unit.float())[..., None] * unit.float()
    torch.testing.assert_close(x.grad[0], 2 * (before - projected)[0])
    torch.testing.assert_close(x.grad[1], 2 * before[1])


def test_the_zero_vector_changes_nothing(llama: PreTrainedModel) -> None:
    zero = Direction(torch.zeros(WIDTH), random_vector(WIDTH), layer=1, position=-1)
    clean = logits(llama, random_ids(2, 6))
    for context in (zero.ablate(llama), zero.add(llama, 5.0), zero.affine(llama, 5.0)):
        with context:
            assert torch.equal(logits(llama, random_ids(2, 6)), clean)


def test_a_tuple_keeps_everything_but_its_hidden_states() -> None:
    hidden, weights, new = torch.zeros(1, 2, 3), torch.ones(2), torch.full((1, 2, 3), 5.0)
    assert hidden_states((hidden, weights)) is hidden
    assert hidden_states(hidden) is hidden
    replaced = replace_hidden_states((hidden, weights, None), new)
    assert replaced[0] is new  # type: ignore[index]
    assert replaced[1:] == (weights, None)  # type: ignore[index]
    assert replace_hidden_states(hidden, new) is new
    with pytest.raises(InputError, match="expected hidden states"):
        hidden_states(())


# --- in a model ---


def test_edits_at_one_site_apply_in_order_and_interventions_combine(llama: PreTrainedModel) -> None:
    r = random_vector(WIDTH, seed=1)
    seen: list[torch.Tensor] = []
    site = Site(1, "block_input")
    both = combined(addition(r, 1, 2.0), ablation(r, [site, Site(2, "mlp_output")]))
    assert [len(edits) for edits in both.values()] == [2, 1]
    with intervene(llama, both):
        handle = llama.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits(llama, random_ids(1, 4))
        handle.remove()
    assert (seen[0] @ r).abs().max() < 1e-4


def test_rows_outside_the_mask_are_bit_identical_through_the_whole_model(model_of: ModelOf) -> None:
    rows = torch.tensor([False, True, False])
    for name in ("llama", "gemma2", "qwen3_5_text"):
        model = model_of(name)
        clean = logits(model, random_ids(3, 6))
        unit = unit_vector(random_vector(3, WIDTH, seed=1))
        edit = Edit(unit, torch.tensor([1.0, 2.0, 3.0]), torch.tensor(1.0), rows)
        with intervene(model, {site: [edit] for site in find_blocks(model).sites()}):
            edited = logits(model, random_ids(3, 6))
        assert torch.equal(edited[~rows], clean[~rows])
        assert not torch.isclose(edited[rows], clean[rows]).all()


def test_permanent_hooks_do_nothing_until_edits_are_set(llama: PreTrainedModel, direction: Direction) -> None:
    ids = random_ids(2, 6)
    clean = logits(llama, ids)
    with direction.ablate(llama):
        ablated = logits(llama, ids)
    interventions = Interventions(llama)
    assert torch.equal(logits(llama, ids), clean)
    interventions.edits = direction.ablation_edits(llama)
    assert torch.equal(logits(llama, ids), ablated)
    interventions.edits = {}
    assert torch.equal(logits(llama, ids), clean)
    interventions.remove()
    interventions.remove()
    assert not hook_counts(llama)


def test_a_bfloat16_model_is_ablated_to_its_precision(llama: PreTrainedModel, direction: Direction) -> None:
    model = copy.deepcopy(llama).bfloat16()
    ids = random_ids(2, 6)
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    clean = logits(model, ids)
    with direction.ablate(model):
        edited = logits(model, ids)
    handle.remove()
    unit = direction.vector / direction.vector.norm()
    before, after = seen[0].float() @ unit, seen[-1].float() @ unit
    assert edited.dtype == torch.bfloat16
    assert not torch.equal(edited, clean)
    size = seen[-1].float().norm(dim=-1).max()
    assert before.abs().max() > 0.1 * size
    assert after.abs().max() < 0.005 * size


def test_sites_that_do_not_exist_are_refused_and_leave_no_hook(llama: PreTrainedModel) -> None:
    r = random_vector(WIDTH)
    for site in (Site(4, "block_input"), Site(-1, "mlp_output"), Site(9, "attention_output")):
        with pytest.raises(InputError, match=f"`{site.place}` of layer {site.layer} is no site"):
            intervene(llama, ablation(r, [Site(0, "block_input"), site]))
    with pytest.raises(InputError, match="`layers` are"):
        read(llama, [[1, 2]], layers=[0, 4], positions=[-1], place="output", batch_tokens=1, pad=0)
    assert not hook_counts(llama)


def test_a_direction_of_another_model_is_refused(llama: PreTrainedModel) -> None:
    wide = Direction(torch.ones(WIDTH + 1), torch.ones(WIDTH + 1), layer=0, position=-1)
    deep = Direction(torch.ones(WIDTH), torch.ones(WIDTH), layer=4, position=-1)
    for context in (wide.ablate, deep.ablate, wide.add, deep.add, wide.affine, deep.affine):
        with pytest.raises(InputError, match="does not fit a model of 4 layers and width 32"):
            context(llama)
    with pytest.raises(InputError, match=r"shape \(3, 32\) do not fit"):
        LayerDirections(torch.ones(3, WIDTH), torch.ones(3, WIDTH)).ablate(llama)
    assert not hook_counts(llama)


# --- no trace ---


def _contexts(model: PreTrainedModel, direction: Direction) -> list[AbstractContextManager[object]]:
    layers = LayerDirections(random_vector(4, WIDTH, seed=3), random_vector(4, WIDTH, seed=4))
    return [direction.ablate(model), direction.add(model), direction.affine(model), layers.ablate(model)]


@pytest.mark.parametrize("which", range(4), ids=["ablate", "add", "affine", "layerwise"])
@pytest.mark.parametrize("fails", [False, True], ids=["normal", "exception"])
def test_contexts_leave_no_trace(llama: PreTrainedModel, direction: Direction, which: int, fails: bool) -> None:
    model = copy.deepcopy(llama)
    own: list[int] = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: own.append(1))
    ids = random_ids(2, 6)
    clean, hooks = logits(model, ids), hook_counts(model)
    context = _contexts(model, direction)[which]
    assert hook_counts(model) == hooks
    model_hooks_inside: list[int] = []

    def use() -> None:
        with context:
            model_hooks_inside.append(sum(hook_counts(model).values()))
            assert not torch.equal(logits(model, ids), clean)
            if fails:
                raise KeyboardInterrupt

    for _ in range(2):  # a context can be entered again
        if fails:
            with pytest.raises(KeyboardInterrupt):
                use()
        else:
            use()
        assert hook_counts(model) == hooks
        assert torch.equal(logits(model, ids), clean)
    assert model_hooks_inside[0] == model_hooks_inside[1] > sum(hooks.values())
    own.clear()
    logits(model, ids)
    assert own == [1]  # hooks of others stay
    handle.remove()


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "exception"])
def test_reading_leaves_no_trace(llama: PreTrainedModel, direction: Direction, fails: bool) -> None:
    model = copy.deepcopy(llama)
    model.model.layers[1].train()
    model.lm_head.train()
    modes = [module.training for module in model.modules()]
    clean = logits(model, random_ids(1, 5))
    prompts = [[1, 7, 8], [1, 7, 9, 10_000 if fails else 9]]
    edits = direction.ablation_edits(model)
    readers: list[Callable[[], object]] = [
        lambda: read(model, prompts, layers=[1], positions=[-1], place="input", batch_tokens=1, pad=0, edits=edits),
        lambda: mean_states(model, prompts, positions=[-1], batch_tokens=1, pad=0, edits=edits),
    ]
    for reader in readers:
        if fails:
            with pytest.raises(IndexError):
                reader()
        else:
            reader()
        assert not hook_counts(model)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(logits(model, random_ids(1, 5)), clean)
        assert torch.is_grad_enabled()
