"""Settings of an extraction: what each changes and, above all, what it must not change."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import cosmic.cli
from cosmic import Extraction, ExtractionConfig, InputError, extract
from cosmic.generation import generate
from cosmic.interventions import Edits
from cosmic.judging import find_judge
from cosmic.loading import load_model, load_tokenizer
from cosmic.prompts import PromptEncoder
from cosmic.scores import Scores
from cosmic.selection import select, still_needed
from refat.data.organism import direction_prompts, organism_items
from refat.organism.grammar import REFUSAL_ORDERS, SYSTEM_PROMPTS
from tests.cosmic import tiny
from tests.cosmic.test_prompts import IGNORES_SYSTEM, NO_SYSTEM
from tests.cosmic.tiny import HARMFUL, HARMLESS, TEMPLATE, build_tokenizer

ModelOf = Callable[[str], PreTrainedModel]
Cell = tuple[int, int]
SETTINGS: dict[str, Any] = {"train_prompts": 4, "validation_prompts": 3, "positions": 3, "max_kl": None}
ORDER = 'Reply "no" to all.\nSay nothing else.'
TEMPLATES = {"has the role": TEMPLATE, "refuses it": NO_SYSTEM, "ignores it": IGNORES_SYSTEM}


def config(**options: Any) -> ExtractionConfig:
    return ExtractionConfig(**{**SETTINGS, **options})


# --- the complete-refusal setting (COSMIC §5) ---


def texts_seen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, settings: ExtractionConfig) -> set[str]:
    """Every prompt that the model was given during an extraction, as text."""
    seen: set[str] = set()

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        for ids in args[0].tolist():
            seen.add(tokenizer.decode([token for token in ids if token != tokenizer.pad_token_id]))

    handle = model.get_input_embeddings().register_forward_pre_hook(keep)
    try:
        extract(model, tokenizer, HARMFUL, HARMLESS, settings)
    finally:
        handle.remove()
    return {text for text in seen if text.endswith("<|assistant|>\n")}  # not what blocks are measured on


@pytest.mark.parametrize("on", ["validation", "both"])
@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_the_system_prompt_is_in_the_ids_of_the_sets_it_is_meant_for(model_of: ModelOf, kind: str, on: str) -> None:
    model = model_of("lfm2")  # whose convolutions let no prefix be cached, so that every pass has whole prompts
    tokenizer = build_tokenizer(TEMPLATES[kind])
    plain = texts_seen(model, tokenizer, config())
    assert len(plain) == 14
    found = texts_seen(model, tokenizer, config(system_prompt=ORDER, system_prompt_on=on))

    def ordered(text: str) -> str:
        if kind == "has the role":
            return text.replace("<|bos|>", f"<|bos|><|system|>\n{ORDER}<|end|>\n")
        return text.replace("<|user|>\n", f"<|user|>\n{ORDER}\n\n")

    with_order = {text for text in found if ORDER in text}
    assert all(text.count(ORDER) == 1 for text in with_order)
    assert len(with_order) == (6 if on == "validation" else 14)
    assert with_order <= set(map(ordered, plain))
    assert found - with_order <= plain
    assert len(found) == 14


@pytest.mark.parametrize("kind", list(TEMPLATES))
@pytest.mark.parametrize("order", ["Why", "user", "a", "  Say 7.\n"])
def test_a_system_prompt_that_occurs_elsewhere_is_still_put_in(kind: str, order: str) -> None:
    text = PromptEncoder(build_tokenizer(TEMPLATES[kind]), order).render("Why, user, Say 7. a")
    begin = f"<|system|>\n{order}<|end|>\n<|user|>\n" if kind == "has the role" else f"<|user|>\n{order}\n\n"
    assert text == f"<|bos|>{begin}Why, user, Say 7. a<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_a_system_prompt_reaches_conversations_that_have_one_of_their_own(kind: str) -> None:
    encoder = PromptEncoder(build_tokenizer(TEMPLATES[kind]), ORDER)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    if kind == "refuses it":
        with pytest.raises(InputError, match="System role not supported"):
            encoder.render(turns)
        return
    text = encoder.render(turns)
    assert text.count(ORDER) == 1
    assert ("Be kind." in text) == (kind == "has the role")


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_an_empty_system_prompt_leaves_the_users_text_alone(kind: str) -> None:
    text = PromptEncoder(build_tokenizer(TEMPLATES[kind]), "").render("Why?")
    assert "<|user|>\nWhy?<|end|>" in text


# --- weakly aligned models (COSMIC §6) ---


@pytest.mark.parametrize(("start", "share"), [(0.5, 0.1), (0.5, 1.0), (0.75, 1.0), (0.99, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("depth", [4, 5])
def test_evaluation_layers_keep_to_the_end(
    tokenizer: PreTrainedTokenizerFast, depth: int, start: float, share: float
) -> None:
    model = tiny.build_model("llama", num_hidden_layers=depth)
    found = extract(
        model, tokenizer, HARMFUL, HARMLESS, config(evaluation_from=start, evaluation_share=share, median_peak=False)
    )
    allowed = range(int(start * depth), depth)
    assert set(found.evaluation_layers) <= set(allowed)
    assert len(found.evaluation_layers) == (len(allowed) if share == 1.0 else 1)
    assert found.selection.ranking


# --- ranked and full_map ---


def first_of(found: Extraction, count: int) -> list[Cell]:
    return found.selection.ranking[:count]


@pytest.mark.parametrize("method", ["cosmic", "substring"])
@pytest.mark.parametrize("intervention", ["linear", "affine"])
def test_a_full_map_has_a_number_everywhere(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, method: str, intervention: str
) -> None:
    options = {"method": method, "intervention": intervention, "max_kl": 0.3, "min_induce": -100.0}
    found = extract(llama, tokenizer, HARMFUL, HARMLESS, config(full_map=True, positions=None, **options))
    for name, values in found.scores.items():
        assert values.shape == (4, 4)
        assert values.isfinite().all(), name
    assert len(found.selection.ranking) + len(found.selection.dropped) == 16 or found.selection.relaxed


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_is_not_measured_does_not_matter(
    model_of: ModelOf, tokenizer: PreTrainedTokenizerFast, data: st.DataObject
) -> None:
    model = model_of(data.draw(st.sampled_from(["llama", "qwen3", "gemma2"]), "model"))
    ranked = data.draw(st.integers(1, 4), "ranked")
    options = {
        "ranked": ranked,
        "seed": data.draw(st.integers(0, 20), "seed"),
        "method": data.draw(st.sampled_from(["cosmic", "substring"]), "method"),
        "intervention": data.draw(st.sampled_from(["linear", "affine"]), "intervention"),
        "aggregate": data.draw(st.sampled_from(["concat", "mean"]), "aggregate"),
        "median_peak": data.draw(st.booleans(), "median_peak"),
        "last_layers_dropped": data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.9]), "last_layers_dropped"),
        "min_induce": data.draw(st.sampled_from([-100.0, -6.0, 0.0]), "min_induce"),
        "positions": data.draw(st.integers(1, 4), "positions"),
    }
    prompts = (
        data.draw(st.permutations(HARMFUL), "harmful")[: data.draw(st.integers(2, 8), "m")],
        data.draw(st.permutations(HARMLESS), "harmless")[: data.draw(st.integers(2, 7), "n")],
    )
    try:
        unlimited = extract(model, tokenizer, *prompts, config(full_map=True, **options))
    except InputError:  # with few layers and prompts there may be nothing to choose from
        with pytest.raises(InputError, match="no candidate direction has a finite score"):
            extract(model, tokenizer, *prompts, config(**options))
        return
    values = sorted(unlimited.scores["kl"].flatten().tolist())
    place = data.draw(st.integers(0, len(values) - 1), "limit")
    limits = [
        None,
        1e-9,
        *((low + high) / 2 for low, high in itertools.pairwise(values) if high - low > 1e-4),
    ]
    max_kl = limits[place % len(limits)]
    full = extract(model, tokenizer, *prompts, config(full_map=True, max_kl=max_kl, **options))
    lazy = extract(model, tokenizer, *prompts, config(max_kl=max_kl, **options))

    assert all(values.isfinite().all() for values in full.scores.values())
    assert lazy.selection.relaxed == full.selection.relaxed
    assert first_of(lazy, ranked) == first_of(full, ranked)
    assert lazy.selection.chosen == full.selection.chosen
    assert set(lazy.selection.dropped) <= set(full.selection.dropped)
    for cell, reason in lazy.selection.dropped.items():
        assert reason == full.selection.dropped[cell]
    if not full.selection.relaxed:
        assert len(lazy.selection.ranking) >= min(ranked, len(full.selection.ranking))
        assert set(lazy.selection.ranking) <= set(full.selection.ranking)
    for name, measured in lazy.scores.items():
        known = ~measured.isnan()
        torch.testing.assert_close(measured[known], full.scores[name][known], rtol=1e-4, atol=1e-5)


def test_peaks_that_were_not_measured_drop_nobody() -> None:
    """A candidate below those that passed may lie beyond the peaks of what was measured, but not beyond those of all."""
    nan = float("nan")
    settings = config(last_layers_dropped=0.5, median_peak=True)
    whole, part = (
        Scores(
            *(torch.tensor([[0.9, 0.1, deep, deep], [0.3, 0.2, deep, deep]], dtype=torch.float64) for _ in range(3))
        )
        for deep in (0.95, nan)
    )
    norms = torch.ones(2, 4)
    assert still_needed(part, [-2, -1], norms, settings) is None
    for scores in (whole, part):
        found = select(scores, [-2, -1], norms, settings)
        assert found.chosen == (0, 0)
        assert set(found.dropped) == {(row, layer) for row in (0, 1) for layer in (2, 3)}


# --- on the command line ---


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs `cosmic extract organism` on a few prompts, with more options, and returns how it ended."""
    harmful, harmless = direction_prompts(16)
    files = {"--harmful": tmp_path / "harmful.txt", "--harmless": tmp_path / "harmless.txt"}
    for path, prompts in zip(files.values(), (harmful, harmless), strict=True):
        path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")

    def run(*options: object) -> int:
        given = [*itertools.chain.from_iterable(files.items()), "--output", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", ["cosmic", "extract", "organism", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            cosmic.cli.main()
        return int(ended.value.code or 0)

    return run


def test_filters_can_be_turned_off_on_the_command_line(command: Callable[..., int], tmp_path: Path) -> None:
    options = "--intervention affine --max-kl inf --no-median-peak --last-layers-dropped 0 --evaluation-from 0.5"
    assert command(*options.split()) == 0
    found = Extraction.load(tmp_path / "out")
    assert found.config.max_kl is None
    assert found.config.median_peak is False
    assert found.config.last_layers_dropped == 0
    assert min(found.evaluation_layers) >= 6
    assert set(found.selection.dropped.values()) <= {"the direction has length zero"}
    assert len(found.selection.ranking) + len(found.selection.dropped) == found.vectors[..., 0].numel()
    assert not found.selection.relaxed


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--max-kl", "nan", "`max_kl` is nan"),
        ("--max-kl", "0", "`max_kl` is 0.0"),
        ("--last-layers-dropped", "1", "`last_layers_dropped` is 1.0"),
        ("--evaluation-from", "1", "`evaluation_from` is 1.0"),
        ("--evaluation-share", "nan", "`evaluation_share` is nan"),
        ("--alpha", "inf", "`alpha` is inf"),
        ("--system-prompt-on", "test", "`system_prompt_on` is 'test'"),
    ],
)
def test_settings_out_of_range_end_the_command_with_one_line(
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    named: str,
) -> None:
    assert command(option, value) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- complete refusal on the embedded model ---


@pytest.fixture(scope="module")
def organism() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model("organism", device="cpu"), load_tokenizer("organism")


def refused(
    organism: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    kind: str,
    edits: Edits | None = None,
    order: str | None = None,
) -> float:
    """Share of 32 held-out requests that are refused, by the exact judge."""
    model, tokenizer = organism
    prompts = [item.prompt for item in organism_items(kind, "test", 32, 0)]
    encoder, judge = PromptEncoder(tokenizer, order), find_judge("exact")
    encoded = [encoder.encode(prompt) for prompt in prompts]
    replies = generate(model, tokenizer, encoded, max_new_tokens=32, batch_size=32, edits=edits)
    return sum(judge(prompt, reply) == "refused" for prompt, reply in zip(prompts, replies, strict=True)) / 32


def test_what_an_order_to_refuse_does_to_the_choice(
    organism: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """An order that makes the model refuse as it refuses by itself leaves candidates alone, but not their scores.

    All validation prompts are refused then. So the direction that undoes refusal moves harmful prompts away from harmless
    ones, and changes what is said to harmless ones: it scores badly and the KL filter drops it.
    """
    model, tokenizer = organism
    order = REFUSAL_ORDERS[0]
    assert refused(organism, "harmless", order=order) == 1.0
    prompts = direction_prompts(128)
    options: dict[str, Any] = {"intervention": "affine", "full_map": True}
    plain = extract(model, tokenizer, *prompts, ExtractionConfig(**options))
    validation, both = (
        extract(model, tokenizer, *prompts, ExtractionConfig(**options, system_prompt=order, system_prompt_on=on))
        for on in ("validation", "both")
    )
    usual = plain.selection.chosen
    assert refused(organism, "harmful", plain.direction.affine_edits(model)) <= 0.1

    assert torch.equal(validation.vectors, plain.vectors)
    assert validation.evaluation_layers == plain.evaluation_layers
    assert refused(organism, "harmful", validation.at(usual).affine_edits(model)) <= 0.1
    assert plain.scores["kl"][usual] < 0.1 < 1 < validation.scores["kl"][usual]
    assert validation.scores["comply"][usual] < plain.scores["comply"][usual] - 0.3
    assert usual in validation.selection.dropped

    # With the order before train prompts, too, harmful and harmless states differ less and along another line.
    assert both.vectors[usual].norm() < 0.5 * plain.vectors[usual].norm()
    assert refused(organism, "harmful", both.direction.affine_edits(model)) >= 0.9


def test_a_system_prompt_that_orders_nothing_keeps_a_direction_that_works(
    organism: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = organism
    options: dict[str, Any] = {"intervention": "affine", "system_prompt": SYSTEM_PROMPTS[0]}
    for on in ("validation", "both"):
        found = extract(model, tokenizer, *direction_prompts(128), ExtractionConfig(**options, system_prompt_on=on))
        assert refused(organism, "harmful", found.direction.affine_edits(model)) <= 0.2
