"""Selection on score maps small enough to work out by hand."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from cosmic import ExtractionConfig, InputError
from cosmic.scores import Scores, evaluation_layers, kl_divergence, refusal_metric, similarity
from cosmic.selection import select

NAN = math.nan


def scores(comply: list[list[float]], **others: list[list[float]]) -> Scores:
    """Scores with `comply` as given; refuse and KL are 0 unless they are given, too."""
    maps = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in {"comply": comply, **others}.items()}
    zero = torch.zeros_like(maps["comply"])
    return Scores(**{"refuse": zero, "kl": zero, **maps})


def config(**options: object) -> ExtractionConfig:
    """Settings with every filter off."""
    plain = {"max_kl": None, "median_peak": False, "last_layers_dropped": 0.0}
    return ExtractionConfig(**{**plain, **options})  # type: ignore[arg-type]


def ones(found: Scores) -> torch.Tensor:
    return torch.ones_like(found.comply)


def test_the_best_sum_wins_and_ties_go_to_the_earlier_layer_then_position() -> None:
    found = scores([[0.125, 0.5, 0.25], [0.5, 0.5, 0.25]], refuse=[[0.0, 0.5, 0.75], [0.0, 0.5, 0.0]])
    selection = select(found, [-2, -1], ones(found), config())
    assert selection.ranking == [(0, 1), (1, 1), (0, 2), (1, 0), (1, 2), (0, 0)]
    assert selection.chosen == (0, 1)
    assert not selection.dropped
    assert not selection.relaxed


def test_the_last_layers_are_dropped() -> None:
    found = scores([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]])
    selection = select(found, [-1], ones(found), config(last_layers_dropped=0.2))
    assert selection.chosen == (0, 7)
    assert selection.dropped == {(0, 8): "in the last 20% of the layers", (0, 9): "in the last 20% of the layers"}
    twelve = scores([[float(layer) for layer in range(12)]])  # 0.8 * 12 = 9.6: layer 9 is inside
    assert select(twelve, [-1], ones(twelve), config(last_layers_dropped=0.2)).chosen == (0, 9)


def test_a_kl_above_the_limit_is_dropped() -> None:
    found = scores([[0.3, 0.9, 0.5, 0.8]], kl=[[0.0, 0.1000001, 0.1, math.inf]])
    selection = select(found, [-1], ones(found), config(max_kl=0.1))
    assert selection.chosen == (0, 2)
    assert set(selection.dropped) == {(0, 1), (0, 3)}
    assert "KL 0.100 above 0.1" in selection.dropped[0, 1]
    assert select(found, [-1], ones(found), config()).chosen == (0, 1)


def test_the_last_token_may_not_lie_deeper_than_both_median_peaks() -> None:
    # Peaks at the other four positions: of comply layers 0, 1, 2, 4, of refuse 3, 3, 0, 1; both lower middles are 1.
    comply = [[9, 0, 0, 0, 0], [0, 9, 0, 0, 0], [0, 0, 9, 0, 0], [0, 0, 0, 0, 9], [5, 6, 20, 30, 40]]
    refuse = [[0, 0, 0, 9, 0], [0, 0, 0, 9, 0], [9, 0, 0, 0, 0], [0, 9, 0, 0, 0], [0, 0, 0, 0, 0]]
    found = scores([[float(x) for x in row] for row in comply], refuse=[[float(x) for x in row] for row in refuse])
    selection = select(found, [-5, -4, -3, -2, -1], ones(found), config(median_peak=True))
    assert set(selection.dropped) == {(4, 2), (4, 3), (4, 4)}
    assert all("deeper than both median peaks (layers 1 and 1)" in reason for reason in selection.dropped.values())
    assert selection.chosen == (0, 0)  # four sums are 9; this is the earliest layer and position
    assert select(found, [-5, -4, -3, -2, -1], ones(found), config()).chosen == (4, 4)


def test_one_median_peak_that_is_deep_enough_suffices() -> None:
    found = scores([[9.0, 0, 0], [1.0, 2.0, 10.0]], refuse=[[0, 9.0, 0], [0, 0, 0]])
    selection = select(found, [-2, -1], ones(found), config(median_peak=True))
    assert set(selection.dropped) == {(1, 2)}  # layer 1 exceeds the first peak (0) but not the second (1)


def test_the_median_rule_needs_other_positions_and_ignores_missing_scores() -> None:
    alone = scores([[1.0, 2.0, 3.0]])
    assert not select(alone, [-1], ones(alone), config(median_peak=True)).dropped
    found = scores([[NAN, 9.0, 0.0], [1.0, 2.0, 3.0]], refuse=[[NAN, 9.0, 0.0], [0.0, 0.0, 0.0]])
    selection = select(found, [-2, -1], ones(found), config(median_peak=True))
    assert set(selection.dropped) == {(0, 0), (1, 2)}
    assert "not finite" in selection.dropped[0, 0]


def test_substring_takes_the_least_bypass_that_induces_enough() -> None:
    found = scores(
        [[9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0]],
        bypass=[[-3.0, -9.0, -5.0, -8.0], [-1.0, -2.0, -3.0, -4.0]],
        induce=[[1.0, -0.1, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]],
    )
    selection = select(found, [-2, -1], ones(found), config(method="substring", median_peak=True))
    assert selection.chosen == (0, 2)
    assert set(selection.dropped) == {(0, 1), (0, 3)}  # not above 0; the median rule is COSMIC's
    assert selection.dropped[0, 1] == "induce -0.100 not above 0.0"
    assert selection.ranking[:3] == [(0, 2), (1, 3), (0, 0)]


def test_directions_without_length_are_dropped() -> None:
    found = scores([[9.0, 1.0]])
    selection = select(found, [-1], torch.tensor([[0.0, 1.0]]), config())
    assert selection.chosen == (0, 1)
    assert selection.dropped == {(0, 0): "the direction has length zero"}


def test_if_nothing_passes_the_best_outside_the_last_layers_is_taken() -> None:
    found = scores([[0.5, 0.7, NAN, 0.6, 0.9]], kl=[[1.0, 1.0, 1.0, 1.0, 0.0]])
    selection = select(
        found, [-1], torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]]), config(max_kl=0.1, last_layers_dropped=0.2)
    )
    assert selection.relaxed
    assert selection.ranking == [(0, 3), (0, 0)]
    assert selection.chosen == (0, 3)
    assert set(selection.dropped) == {(0, layer) for layer in range(5)}
    only_deep = select(
        found, [-1], torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0]]), config(max_kl=0.1, last_layers_dropped=0.2)
    )
    assert only_deep.relaxed
    assert only_deep.chosen == (0, 4)


def test_nothing_usable_at_all_is_an_error() -> None:
    found = scores([[1.0, NAN]])
    with pytest.raises(ArithmeticError, match="no candidate direction has a finite score"):
        select(found, [-1], torch.tensor([[0.0, 1.0]]), config())


def test_every_candidate_is_ranked_or_dropped_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(5, 20, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = Scores(maps[0], maps[1], maps[2] * 0.2)
    with caplog.at_level(logging.WARNING):
        selection = select(found, [-5, -4, -3, -2, -1], ones(found), ExtractionConfig())
    assert len(selection.ranking) + len(selection.dropped) == 100
    assert not set(selection.ranking) & set(selection.dropped)
    assert all(selection.dropped.values())
    assert selection.chosen == selection.ranking[0]


# --- evaluation layers and the score formulas ---


def outputs_with_cosines(cosines: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean outputs whose cosine at each layer is as given, with lengths that must not matter."""
    one = torch.tensor([[1.0, 0.0]] * len(cosines), dtype=torch.float64)
    two = torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines], dtype=torch.float64)
    lengths = torch.arange(1, len(cosines) + 1, dtype=torch.float64)[:, None]
    return 7 * one, lengths * two


@pytest.mark.parametrize(
    ("layers", "share", "count"),
    [(4, 0.1, 1), (9, 0.1, 1), (10, 0.1, 1), (11, 0.1, 2), (12, 0.1, 2), (20, 0.1, 2), (30, 0.1, 3), (3, 1.0, 3)],
)
def test_the_number_of_evaluation_layers_is_rounded_up(layers: int, share: float, count: int) -> None:
    assert len(evaluation_layers(*outputs_with_cosines([0.5] * layers), share, 0.0)) == count


def test_evaluation_layers_are_the_least_alike() -> None:
    found = outputs_with_cosines([0.9, 0.1, 0.8, -0.5, 0.7, 0.0])
    assert evaluation_layers(*found, 0.5, 0.0) == [1, 3, 5]
    assert evaluation_layers(*found, 0.1, 0.0) == [3]
    assert evaluation_layers(*found, 0.3, 0.7) == [4, 5]
    assert evaluation_layers(*found, 1.0, 0.5) == [3, 4, 5]


def test_similarity_joins_or_averages_layers() -> None:
    a = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 0.0]]])
    b = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    assert similarity(a, b, "concat").tolist() == pytest.approx([0.5, 1.0])  # (2, 0, 0, 2) and (2, 0, 2, 0)
    assert similarity(a, b, "mean").tolist() == pytest.approx([math.sqrt(0.5), 1.0])  # (1, 1) and (2, 0)


def test_kl_divergence_is_that_of_clean_from_edited_in_nats() -> None:
    clean = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]])) + 3.0
    edited = torch.log(torch.tensor([[0.25, 0.75], [0.9, 0.1]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(clean, edited).tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_refusal_metric_is_the_log_odds() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]))
    expected = [math.log(0.5 / 0.5), math.log(0.2 / 0.8)]
    assert refusal_metric(logits, [0, 1]).tolist() == pytest.approx(expected, abs=1e-6)
    assert math.isfinite(refusal_metric(torch.tensor([[1000.0, 0.0]]), [0]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "magic"),
        ("intervention", "cubic"),
        ("aggregate", "max"),
        ("system_prompt_on", "train"),
        ("train_prompts", 0),
        ("validation_prompts", 0),
        ("batch_tokens", 0),
        ("positions", 0),
        ("evaluation_share", 0.0),
        ("evaluation_share", 1.1),
        ("evaluation_from", 1.0),
        ("last_layers_dropped", -0.1),
        ("max_kl", 0.0),
    ],
)
def test_settings_outside_their_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{field}` is .*; expected"):
        ExtractionConfig(**{field: value})  # type: ignore[arg-type]
