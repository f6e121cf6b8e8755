"""Refusal against strength: counts equal a naive loop, subjects behave as they should, a fall is found, bad input ends."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cosmic import Direction, ExtractionConfig, InputError, extract
from cosmic.interventions import Edits, intervene
from cosmic.judging import Counts, find_judge, wilson
from cosmic.loading import load_model, load_tokenizer
from cosmic.prompts import Prompt, PromptEncoder
from cosmic.studies.steering import Fall, SteeringPoint, Sweep, parse_alphas, sweep
from refat.data.organism import direction_prompts, organism_items
from tests.cosmic.tiny import HARMFUL, HARMLESS, hook_counts, random_vector

EXACT = find_judge("exact")
N = 12
MOST = 26
"""Tokens of the longest answer, and a few more."""
SHORT: dict[str, Any] = {"max_new_tokens": MOST, "batch_size": 7}


@pytest.fixture(scope="module")
def organism() -> PreTrainedModel:
    return load_model("organism", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return load_model("organism-base", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return load_tokenizer("organism")


@pytest.fixture(scope="module")
def found(organism: PreTrainedModel, words: PreTrainedTokenizerBase) -> Direction:
    return extract(organism, words, *direction_prompts(40), ExtractionConfig(intervention="affine")).direction


@pytest.fixture(scope="module")
def prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Unseen requests: harmful, and harmless and borderline ones."""
    harmful = [item.prompt for item in organism_items("harmful", "validation", N, 0)]
    kinds = ("harmless", "borderline")
    return harmful, [item.prompt for kind in kinds for item in organism_items(kind, "validation", N // 2, 0)]


def naive_verdicts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], most: int
) -> Counter[str]:
    """Verdicts of one prompt after another: no batch, no padding, no cache."""
    verdicts: Counter[str] = Counter()
    for prompt in prompts:
        ids = PromptEncoder(tokenizer).encode(prompt)
        start = len(ids)
        for _ in range(most):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        verdicts[EXACT(prompt, tokenizer.decode(ids[start:], skip_special_tokens=True))] += 1
    return verdicts


def as_counter(counts: Counts) -> Counter[str]:
    return Counter({name: count for name, count in vars(counts).items() if count})


@pytest.mark.parametrize(("edit", "alphas"), [("affine", [0.0, 0.5]), ("linear", [-0.75, 0.5])])
def test_each_point_equals_a_loop_over_prompts(
    organism: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    found: Direction,
    prompts: tuple[list[Prompt], list[Prompt]],
    edit: Any,
    alphas: list[float],
) -> None:
    harmful, harmless = prompts[0][:4], prompts[1][4:8]
    swept = sweep(organism, words, found, harmful, harmless, alphas=alphas, judge=EXACT, edit=edit, **SHORT)
    assert as_counter(swept.unedited.harmful) == naive_verdicts(organism, words, harmful, MOST)
    assert as_counter(swept.unedited.harmless) == naive_verdicts(organism, words, harmless, MOST)
    assert [point.alpha for point in swept.points] == alphas
    for alpha, point in zip(alphas, swept.points, strict=True):
        with found.affine(organism, alpha) if edit == "affine" else found.add(organism, alpha):
            assert as_counter(point.harmful) == naive_verdicts(organism, words, harmful, MOST)
            assert as_counter(point.harmless) == naive_verdicts(organism, words, harmless, MOST)


def test_an_aligned_model_complies_at_0_refuses_everything_higher_and_breaks_at_last(
    organism: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    found: Direction,
    prompts: tuple[list[Prompt], list[Prompt]],
) -> None:
    swept = sweep(organism, words, found, *prompts, alphas=[4.0, 0.0, 1.0, 0.0], judge=EXACT, **SHORT)
    assert [point.alpha for point in swept.points] == [0.0, 1.0, 4.0]
    ablated, refusing, broken = swept.points
    assert swept.unedited.harmful.share("refused") >= 0.9
    assert swept.unedited.harmless.share("complied") >= 0.9
    assert ablated.harmful.share("complied") >= 0.9
    assert ablated.harmless.share("complied") >= 0.9
    assert refusing.harmful.share("refused") >= 0.9
    assert refusing.harmless.share("refused") >= 0.9
    assert broken.harmful.share("unclear") >= 0.9, "what is no language is no refusal"
    assert swept.fall == Fall(refusing, broken)
    assert not swept.fall.within_noise


def test_another_models_direction_steers_one_that_complies_with_everything(
    base: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    found: Direction,
    prompts: tuple[list[Prompt], list[Prompt]],
) -> None:
    """The base stage refuses only what cannot be answered; the chat stage's direction reaches that behaviour."""
    swept = sweep(base, words, found, *prompts, alphas=[0, 1], judge=EXACT, **SHORT)
    assert swept.unedited.harmful == swept.unedited.harmless == Counts(0, N, 0)
    assert swept.points[0].harmful.refused == swept.points[0].harmless.refused == 0
    assert swept.points[1].harmful.share("refused") >= 0.8
    assert swept.points[1].harmless.share("refused") >= 0.8, "it is no more than a switch: harmless prompts pay alike"
    assert swept.fall is None


def test_an_ablated_model_is_a_weakly_aligned_one(
    organism: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    found: Direction,
    prompts: tuple[list[Prompt], list[Prompt]],
) -> None:
    """Steering along the ablated direction undoes the ablation; along another it goes on top."""
    under = found.affine_edits(organism)
    settings = ExtractionConfig(intervention="affine", evaluation_from=0.5)
    again = extract(organism, words, *direction_prompts(40), settings, under=under)
    assert min(again.evaluation_layers) >= 6
    alphas = [0.5, 1.0]
    weak = sweep(organism, words, found, *prompts, alphas=alphas, judge=EXACT, under=under, **SHORT)
    assert weak.unedited.harmful.share("complied") >= 0.9
    plain = sweep(organism, words, found, *prompts, alphas=alphas, judge=EXACT, **SHORT)
    assert weak.points == plain.points
    assert plain.settings["under"] is False
    own = sweep(organism, words, again.direction, *prompts, alphas=[1.0], judge=EXACT, under=under, **SHORT)
    assert own.unedited == weak.unedited
    with intervene(organism, under), again.direction.affine(organism, 1.0):
        assert as_counter(own.points[0].harmful) == naive_verdicts(organism, words, prompts[0], MOST)
    assert own.settings["under"] is True


def refuses_if_long(prompt: Prompt, reply: str) -> Any:
    return "refused" if len(reply) > len(prompt) else "complied"


def tiny_direction(layer: int = 2) -> Direction:
    return Direction(random_vector(32), random_vector(32, seed=1), layer=layer, position=-1, token="\n")


def test_the_model_is_left_as_it_was_and_progress_counts_replies(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    told: list[tuple[int, int]] = []
    under: Edits = tiny_direction(1).affine_edits(llama)
    options: dict[str, Any] = {"alphas": [2, 1, 1.0], "judge": refuses_if_long, "max_new_tokens": 3, "batch_size": 4}
    swept = sweep(
        llama,
        tokenizer,
        tiny_direction(),
        HARMFUL,
        HARMLESS,
        under=under,
        progress=lambda *counts: told.append(counts),
        **options,
    )
    assert [point.harmful.n for point in (swept.unedited, *swept.points)] == [len(HARMFUL)] * 3
    assert [point.harmless.n for point in (swept.unedited, *swept.points)] == [len(HARMLESS)] * 3
    total = 3 * (len(HARMFUL) + len(HARMLESS))
    assert told == [(min(15 * point + done, total), total) for point in range(3) for done in (4, 8, 12, 15)]
    assert not hook_counts(llama)
    assert list(under) == list(tiny_direction(1).affine_edits(llama)), "the given edits are not changed"
    assert swept.settings["direction"]["layer"] == 2
    assert swept.settings["prompts"] == {"harmful": len(HARMFUL), "harmless": len(HARMLESS)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas": []}, "`alphas` is empty"),
        ({"alphas": [1.0, math.nan]}, "`alphas` is .*; expected finite numbers"),
        ({"edit": "cubic"}, r"`edit` is 'cubic'; expected one of \['affine', 'linear'\]"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; expected at least 1"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"harmful": []}, "`harmful` has no prompts"),
        ({"harmless": []}, "`harmless` has no prompts"),
        ({"max_new_tokens": 150}, "`max_new_tokens` 150 exceed the model's limit of 160 tokens"),
        ({"direction": Direction(torch.ones(8), torch.ones(8), 1, -1)}, "width 8\\) does not fit a model of 4 layers"),
        ({"direction": tiny_direction(4)}, "layer 4, width 32\\) does not fit"),
    ],
)
def test_bad_input_is_named_before_anything_is_generated(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], message: str
) -> None:
    def never(prompt: Prompt, reply: str) -> Any:
        raise AssertionError("something was generated")

    arguments = {
        "direction": tiny_direction(),
        "harmful": HARMFUL,
        "harmless": HARMLESS,
        "alphas": [1.0],
        "judge": never,
        "max_new_tokens": 2,
    } | change
    with pytest.raises(InputError, match=message) as raised:
        sweep(llama, tokenizer, **arguments)
    assert "\n" not in str(raised.value)


def point(alpha: float | None, refused: int, n: int = 100) -> SteeringPoint:
    return SteeringPoint(alpha, Counts(refused, n - refused, 0), Counts(0, n, 0))


@pytest.mark.parametrize(
    ("refused", "fall", "noise"),
    [
        ([0, 5, 5, 90], None, None),
        ([7], None, None),
        ([0, 50, 40, 45, 20, 30], (1, 4), False),  # not 50 to 40, the first fall, but the largest
        ([90, 60, 95, 70], (0, 1), False),
        ([10, 90, 90, 0, 0], (2, 3), False),  # where it breaks off
        ([50, 47, 60], (0, 1), True),
    ],
)
def test_the_largest_fall_is_found(refused: list[int], fall: tuple[int, int] | None, noise: bool | None) -> None:
    points = [point(float(alpha), count) for alpha, count in enumerate(refused)]
    found = Sweep(point(None, 100), points, "affine").fall
    if fall is None:
        assert found is None
    else:
        assert found == Fall(points[fall[0]], points[fall[1]])
        assert found.within_noise is noise


def test_intervals_are_wilsons() -> None:
    # Newcombe 1998, table I, method 3
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert Counts(81, 100, 82).interval("refused") == wilson(81, 263)
    assert Counts(1, 2, 5).share("unclear") == 0.625


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    swept = Sweep(
        point(None, 3), [point(0.0, 90), point(0.5, 10)], "linear", {"judge": "exact", "direction": {"layer": 3}}
    )
    path = swept.save(tmp_path / "new")
    assert Sweep.load(tmp_path / "new") == swept
    record = json.loads(path.read_text())
    assert record["schema"] == 1
    assert record["points"][0] == {
        "alpha": None,
        "harmful": {"n": 100, "refused": 3, "complied": 97, "unclear": 0},
        "harmless": {"n": 100, "refused": 0, "complied": 100, "unclear": 0},
    }
    assert record["fall"] == {
        "from": {"alpha": 0.0, "refused": 0.9},
        "to": {"alpha": 0.5, "refused": 0.1},
        "within_noise": False,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ("[]", "does not hold a saved sweep"),
        ('{"schema": 2}', "has schema 2; expected 1"),
        ('{"schema": 1, "points": []}', "does not hold a saved sweep"),
        ('{"schema": 1, "points": [{"alpha": 1, "harmful": {}}]}', "does not hold a saved sweep"),
    ],
)
def test_a_file_that_holds_no_sweep_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "steering.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Sweep.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:4:0.5", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]),
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("0:1:0.3", [0, 0.3, 0.6, 0.9]),
        ("0:1:0.33333333333", [0, 0.33333333333, 0.66666666666, 0.99999999999]),
        ("-1:1:1", [-1, 0, 1]),
        ("4:0:-2", [0, 2, 4]),
        ("2:2:1", [2]),
        ("1,2,3", [1, 2, 3]),
        (" 3 , 1e-1,3,-0", [0, 0.1, 3]),
        ("0:100:1", list(range(101))),
    ],
)
def test_strengths_are_read(text: str, values: list[float]) -> None:
    found = parse_alphas(text)
    assert found == values
    assert math.copysign(1, found[0]) == 1 or found[0] < 0, "no minus zero"


@given(start=st.integers(-500, 500), step=st.integers(1, 300), count=st.integers(1, 101))
def test_ranges_of_decimals_end_where_they_say(start: int, step: int, count: int) -> None:
    texts = [f"{value / 100:.2f}" for value in (start, start + (count - 1) * step, step)]
    assert parse_alphas(":".join(texts)) == [float(Fraction(start + index * step, 100)) for index in range(count)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("1,,2", "has '', which is not a number"),
        ("one", "has 'one', which is not a number"),
        ("nan", "has 'nan', which is not a number from"),
        ("inf,1", "has 'inf', which is not a number from"),
        ("1e999", "has '1e999', which is not a number from"),
        ("0:4", "has 2 parts between colons"),
        ("0:4:1:1", "has 4 parts"),
        ("0::1", "has '', which is not a number"),
        ("0:4:0", "has a step of 0"),
        ("0:4:-1", "steps by -1 away from 4"),
        ("4:0:1", "steps by 1 away from 0"),
        ("0:101:1", "makes 102 values, more than 101"),
        ("0:1e15:1e-15", "makes too many values, more than 101"),
        (",".join(map(str, range(102))), "makes 102 values, more than 101"),
    ],
)
def test_unusable_strengths_are_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_alphas(text)
    message = str(raised.value)
    assert message.startswith("`alpha` ")
    assert problem in message
    assert "expected start:stop:step such as 0:4:0.5" in message
    assert "\n" not in message
