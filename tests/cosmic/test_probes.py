"""Probes: they minimise the loss they name, whatever the shape, size and place of the states."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import softplus

from cosmic import InputError
from cosmic.probes import Probe, fit_probe
from tests.cosmic.tiny import random_vector

NEAR = {"rtol": 1e-8, "atol": 1e-8}


def classes(rows: tuple[int, int], *shape: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two clouds around a place far from the origin, `apart` from each other along the first coordinate."""
    positive = 20 + 3 * random_vector(rows[0], *shape, seed=seed).double()
    negative = 20 + 3 * random_vector(rows[1], *shape, seed=seed + 1).double()
    positive[..., 0] += apart
    return positive, negative


def standardised(positive: torch.Tensor, negative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One cell's states `[n, d]` as the documentation has it, with the centre and the scale."""
    centre = (positive.mean(0) + negative.mean(0)) / 2
    squares = [((states - centre) ** 2).sum(1).mean() for states in (positive, negative)]
    return torch.cat([positive, negative]) - centre, centre, math.sqrt(float(sum(squares)) / 2)


def loss(
    z: torch.Tensor, rows: tuple[int, int], weight: torch.Tensor, bias: torch.Tensor, strength: float
) -> torch.Tensor:
    """The documented loss of one cell."""
    f = z @ weight + bias
    fit = (softplus(-f[: rows[0]]).mean() + softplus(f[rows[0] :]).mean()) / 2
    return fit + strength / 2 * weight @ weight


def inner(probe: Probe, cell: int, centre: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe of one cell in standardised coordinates."""
    weight = probe.weight[cell]
    return (weight * scale).clone().requires_grad_(), (probe.bias[cell] + weight @ centre).clone().requires_grad_()


@pytest.mark.parametrize("strength", [10.0, 1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize(("rows", "width"), [((9, 14), 64), ((40, 25), 5), ((1, 1), 8)])
@pytest.mark.parametrize("apart", [0.0, 2.0, 1000.0])
def test_the_loss_has_no_slope_at_the_solution(
    rows: tuple[int, int], width: int, apart: float, strength: float
) -> None:
    positive, negative = classes(rows, 3, width, apart=apart)
    probe = fit_probe(positive, negative, strength)
    assert probe.weight.shape == (3, width)
    assert probe.bias.shape == (3,)
    for cell in range(3):
        z, centre, scale = standardised(positive[:, cell], negative[:, cell])
        weight, bias = inner(probe, cell, centre, scale)
        loss(z / scale, rows, weight, bias, strength).backward()
        assert weight.grad is not None
        assert bias.grad is not None
        assert float(weight.grad.abs().max()) < 1e-8
        assert float(bias.grad.abs()) < 1e-8


@pytest.mark.parametrize(("rows", "width", "apart"), [((7, 12), 30, 1.0), ((30, 20), 6, 1.0), ((8, 8), 30, 50.0)])
def test_lbfgs_finds_the_same(rows: tuple[int, int], width: int, apart: float) -> None:
    positive, negative = classes(rows, 2, width, apart=apart)
    probe = fit_probe(positive, negative, 1e-2)
    for cell in range(2):
        z, centre, scale = standardised(positive[:, cell], negative[:, cell])
        weight, bias = torch.zeros(width, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        optimizer = torch.optim.LBFGS(
            [weight.requires_grad_(), bias.requires_grad_()],
            max_iter=500,
            tolerance_grad=1e-11,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

        def closure(z: torch.Tensor = z / scale, w: torch.Tensor = weight, b: torch.Tensor = bias) -> torch.Tensor:
            w.grad = b.grad = None
            value = loss(z, rows, w, b, 1e-2)
            value.backward()
            return value

        optimizer.step(closure)
        found_weight, found_bias = inner(probe, cell, centre, scale)
        torch.testing.assert_close(found_weight, weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found_bias, bias, rtol=1e-5, atol=1e-6)


def test_predictions_do_not_know_units_or_origin_and_cells_do_not_know_one_another() -> None:
    positive, negative = classes((20, 30), 2, 3, 40, apart=3.0)
    probe = fit_probe(positive, negative)
    moved = fit_probe(positive * 1e4 - 7e3, negative * 1e4 - 7e3)
    logits = probe.logits(positive)
    assert logits.shape == (20, 2, 3)
    torch.testing.assert_close(moved.logits(positive * 1e4 - 7e3), logits, rtol=1e-6, atol=1e-6)
    alone = fit_probe(positive[:, 1, 2], negative[:, 1, 2])
    torch.testing.assert_close(alone.logits(positive[:, 1, 2]), logits[:, 1, 2], **NEAR)
    torch.testing.assert_close(alone.weight, probe.weight[1, 2], **NEAR)
    flipped = fit_probe(negative, positive)
    torch.testing.assert_close(flipped.weight, -probe.weight, **NEAR)
    doubled = fit_probe(positive.repeat(2, 1, 1, 1), negative)
    torch.testing.assert_close(doubled.weight, probe.weight, **NEAR)
    again = fit_probe(positive, negative)
    assert torch.equal(again.weight, probe.weight)
    assert torch.equal(again.bias, probe.bias)


def test_many_cells_are_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    positive, negative = classes((6, 5), 7, 20, apart=3.0)
    whole = fit_probe(positive, negative)
    monkeypatch.setattr("cosmic.probes._CHUNK_BYTES", 2 * 8 * 11 * (20 + 44))
    parts = fit_probe(positive, negative)
    torch.testing.assert_close(parts.weight, whole.weight, **NEAR)
    torch.testing.assert_close(parts.bias, whole.bias, **NEAR)


def test_much_regularisation_gives_the_difference_in_means_and_little_the_widest_margin() -> None:
    positive, negative = classes((20, 30), 40, apart=3.0)
    difference = positive.mean(0) - negative.mean(0)
    strong = fit_probe(positive, negative, 1e6).weight
    assert float(strong @ difference / strong.norm() / difference.norm()) == pytest.approx(1, abs=1e-6)
    # Four corners: the means differ along (3, 1), the margin lies along the first axis.
    corners = torch.tensor([[1.0, 0.0], [5.0, 2.0]]), torch.tensor([[-1.0, 0.0], [-1.0, 0.0]])
    narrow = fit_probe(*corners, strength=1e-8).weight
    assert float(narrow[1] / narrow[0]) == pytest.approx(0, abs=0.01)
    wide = fit_probe(*corners, strength=1e6).weight
    assert float(wide[1] / wide[0]) == pytest.approx(1 / 4, abs=1e-4)


def test_constant_states_have_no_weight_and_broken_ones_a_weight_that_is_no_number() -> None:
    positive, negative = classes((3, 7), 4, 16, apart=3.0)
    clean = fit_probe(positive, negative)
    positive[:, 0] = negative[:, 0] = 1 / 3 + random_vector(16).double()
    positive[:, 1] = negative[:, 1] = 0
    positive[2, 2, 5] = math.inf
    probe = fit_probe(positive, negative)
    assert not probe.weight[:2].any()
    assert float(probe.logits(positive)[:, :2].abs().max()) < 1e-12
    assert probe.weight[2].isnan().all()
    torch.testing.assert_close(probe.weight[3], clean.weight[3], **NEAR)
    # Classes that vary but have equal means give no direction, too.
    same = fit_probe(positive[:, 3], positive[:, 3])
    assert float(same.weight.norm()) < 1e-10


def test_half_precision_and_views_are_read_as_they_are() -> None:
    positive, negative = classes((8, 8), 3, 16, apart=3.0)
    rounded = positive.bfloat16(), negative.bfloat16()
    expected = fit_probe(rounded[0].double(), rounded[1].double())
    torch.testing.assert_close(fit_probe(*rounded).weight, expected.weight)
    mixed, exact = fit_probe(rounded[0], negative), fit_probe(rounded[0].double(), negative)
    assert torch.equal(mixed.weight, exact.weight)
    views = positive.transpose(1, 2).contiguous().transpose(1, 2), negative
    before = views[0].clone()
    torch.testing.assert_close(fit_probe(*views).weight, fit_probe(positive, negative).weight)
    assert torch.equal(views[0], before)


@pytest.mark.parametrize(
    ("positive", "negative", "strength", "message"),
    [
        (torch.ones(0, 3), torch.ones(2, 3), 1.0, r"`positive` has shape \(0, 3\); expected \[N, ..., d_model\]"),
        (torch.ones(2, 3), torch.tensor(1.0), 1.0, r"`negative` has shape \(\)"),
        (torch.ones(2, 4, 3), torch.ones(2, 3), 1.0, r"`negative` has states of shape \(3,\); expected \(4, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3), 0.0, "`strength` is 0.0; expected a number above 0"),
        (torch.ones(2, 3), torch.ones(2, 3), math.nan, "`strength` is nan"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    positive: torch.Tensor, negative: torch.Tensor, strength: float, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        fit_probe(positive, negative, strength)
    assert "\n" not in str(error.value)
