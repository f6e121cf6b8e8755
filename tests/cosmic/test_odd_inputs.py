"""Templates, prompts and models at the edges: the right positions, or one clear line of error."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cosmic import Extraction, ExtractionConfig, InputError, extract
from cosmic.prompts import PromptEncoder
from tests.cosmic import tiny
from tests.cosmic.test_prompts import NO_SYSTEM
from tests.cosmic.tiny import HARMFUL, HARMLESS, TEMPLATE, build_tokenizer

ModelOf = Callable[[str], PreTrainedModel]
SETTINGS: dict[str, Any] = {"train_prompts": 4, "validation_prompts": 3, "max_kl": None}
BODY = "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
TURN = "<|end|>\n<|assistant|>\n"


def config(**options: Any) -> ExtractionConfig:
    return ExtractionConfig(**{**SETTINGS, **options})


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- templates ---

ENDINGS = {
    "thinking begins": (TEMPLATE + "{{ '<think>\n' }}", TURN + "<think>\n"),
    "empty thinking": (TEMPLATE + "{{ '<think>\n\n</think>\n\n' }}", TURN + "<think>\n\n</think>\n\n"),
    "thinking by default": (
        TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}no{% endif %}",
        TURN + "<think>\n",
    ),
    "no thinking by default": (
        TEMPLATE + "{% if not (enable_thinking is defined and enable_thinking) %}<think>\n\n</think>\n\n{% endif %}",
        TURN + "<think>\n\n</think>\n\n",
    ),
    "no system role": (NO_SYSTEM, TURN),
    "a date": (
        TEMPLATE.replace(
            "{{ bos_token }}", "{{ bos_token }}<|system|>\nToday is {{ strftime_now('%d %B %Y') }}<|end|>\n"
        ),
        TURN,
    ),
    "a default system prompt": (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|system|>\nYou are kind.<|end|>\n{% endif %}"
        + TEMPLATE.removeprefix("{{ bos_token }}"),
        TURN,
    ),
    "text is stripped": (TEMPLATE.replace("message['content']", "message['content'] | trim"), TURN),
    "words after the text": (BODY.replace("'<|end|>\n'", "' Answer now.<|end|>\n'"), " Answer now.<|end|>\n"),
    "a single token": (BODY.replace("'<|end|>\n'", "'<|end|>'"), "<|end|>"),
    "the text comes last": (BODY.replace("+ '<|end|>\n'", ""), None),
}


@pytest.mark.parametrize("name", list(ENDINGS))
def test_candidates_lie_at_what_the_template_puts_after_the_text(llama: PreTrainedModel, name: str) -> None:
    template, ending = ENDINGS[name]
    tokenizer = build_tokenizer(template)
    found = extract(llama, tokenizer, HARMFUL, HARMLESS, config())
    if ending is None:
        assert found.positions == [-1]
        assert found.tokens[0] not in ("", "<|end|>")
    else:
        assert "".join(found.tokens) == ending
        assert found.positions == list(range(-len(found.tokens), 0))
    assert found.tokens[0] in {"<|end|>", " ", " A", "?", "."} or ending is None
    if len(found.positions) == 1:  # no other positions, so no peaks to compare with
        assert not any("median" in reason for reason in found.selection.dropped.values())
    for row, layer in found.selection.ranking:
        assert layer > 0 or ending is None, found.tokens[row]


def test_spaces_around_the_text_change_nothing_if_the_template_strips_it(llama: PreTrainedModel) -> None:
    tokenizer = build_tokenizer(ENDINGS["text is stripped"][0])
    plain = extract(llama, tokenizer, HARMFUL, HARMLESS, config())
    spaced = extract(llama, tokenizer, [f"  {text}\n " for text in HARMFUL], HARMLESS, config())
    assert spaced.tokens == plain.tokens
    torch.testing.assert_close(spaced.direction.vector.shape, plain.direction.vector.shape)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A template whose first sign, a space, begins a token with the words after it, and whose text may end in one."""
    return build_tokenizer("{{ bos_token }}{% for m in messages %}{{ 'U: ' + m['content'] }}{% endfor %}g the<|end|>")


def test_a_text_that_merges_with_the_template_costs_positions_and_no_more(llama: PreTrainedModel) -> None:
    tokenizer = merging_tokenizer()
    plain = extract(llama, tokenizer, HARMFUL, HARMLESS, config())
    merged = extract(llama, tokenizer, [f"{text} Paintin" for text in HARMFUL], HARMLESS, config())
    assert "".join(plain.tokens) == "g the<|end|>"
    assert "g the<|end|>".endswith("".join(merged.tokens))
    assert 1 <= len(merged.positions) < len(plain.positions)
    encoder = PromptEncoder(tokenizer)
    for text in [*HARMLESS, *(f"{text} Paintin" for text in HARMFUL)]:
        ids = encoder.encode(text)
        assert [tokenizer.decode([ids[position]]) for position in merged.positions] == merged.tokens


def test_a_template_that_is_wrong_is_bad_input(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError) as error:
        extract(llama, build_tokenizer("{{ messages[0]['content'] "), HARMFUL, HARMLESS, config())
    assert "chat template" in one_line(error)
    with pytest.raises(InputError) as error:
        extract(llama, build_tokenizer("{{ nothing.at.all }}"), HARMFUL, HARMLESS, config())
    assert "chat template" in one_line(error)
    named = build_tokenizer()
    named.chat_template = {"tool_use": TEMPLATE}
    with pytest.raises(InputError) as error:
        extract(llama, named, HARMFUL, HARMLESS, config())
    assert "chat template" in one_line(error)


# --- prompts ---


def test_a_prompt_beyond_the_models_context_is_named(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = len(PromptEncoder(tokenizer).encode("word " * 90))
    for harmful, harmless, name in (
        ([*HARMFUL, "word " * 90], HARMLESS, "harmful"),
        (HARMFUL, [*HARMLESS, "word " * 90], "harmless"),
    ):
        with pytest.raises(InputError) as error:
            extract(llama, tokenizer, harmful, harmless, ExtractionConfig())
        text = one_line(error)
        assert f"`{name}` has {tokens} tokens; expected at most 160" in text
    longest = "7" * (160 - len(PromptEncoder(tokenizer).encode("")))
    assert len(PromptEncoder(tokenizer).encode(longest)) == 160
    assert extract(llama, tokenizer, [*HARMFUL, longest], HARMLESS, ExtractionConfig(max_kl=None)).selection.ranking


def test_a_system_prompt_counts_against_the_context(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="expected at most 160"):
        extract(llama, tokenizer, HARMFUL, HARMLESS, config(system_prompt="word " * 80))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_prompt_in_several_forms_is_one(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = extract(llama, tokenizer, HARMFUL, HARMLESS, config())
    for again in (
        extract(llama, tokenizer, [*HARMFUL, [user(HARMFUL[0])]], HARMLESS, config()),
        extract(llama, tokenizer, [[user(HARMFUL[0])], *HARMFUL], HARMLESS, config()),
        extract(llama, tokenizer, [[user(text)] for text in HARMFUL], HARMLESS * 2, config()),
    ):
        assert torch.equal(again.vectors, plain.vectors)
        assert again.selection == plain.selection
        assert again.provenance == plain.provenance


def test_conversations_that_end_in_the_user(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def conversation(text: str) -> list[dict[str, str]]:
        return [user("Hi"), {"role": "assistant", "content": "Hello!"}, user(text)]

    harmful: list[Any] = [conversation(text) for text in HARMFUL]
    harmless: list[Any] = [conversation(text) if n % 2 else text for n, text in enumerate(HARMLESS)]
    found = extract(llama, tokenizer, harmful, harmless, config())
    assert "".join(found.tokens) == TURN
    with pytest.raises(InputError, match="1 prompts are in both"):
        extract(llama, tokenizer, harmful, [*harmless, conversation(HARMFUL[3])], config())


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
        [{"role": "system", "content": "Be kind."}],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"content": "Why?"}],
        [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
        ["Why?"],
        None,
        7,
        {"prompt": "Why?"},
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_bad_input(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: Any
) -> None:
    with pytest.raises(InputError) as error:
        extract(llama, tokenizer, HARMFUL, [*HARMLESS, prompt], config())
    assert "`harmless` prompt 8" in one_line(error)


def test_one_text_instead_of_a_list_is_bad_input(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError) as error:
        extract(llama, tokenizer, "poison", HARMLESS, config())
    assert "`harmful` is one text" in one_line(error)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 50), (50, 2), (180, 60)])
@pytest.mark.parametrize("kind", ["mean", "pca", "probe"])
def test_sets_of_unequal_size(
    model_of: ModelOf, tokenizer: PreTrainedTokenizerFast, sizes: tuple[int, int], kind: str
) -> None:
    """Before the first block the template's tokens are what they are: no rounding of unequal sums is a direction."""
    harmful, harmless = [f"Burn {n}" for n in range(sizes[0])], [f"Paint {n} twice" for n in range(sizes[1])]
    for name in ("llama", "gemma2"):
        options = config(train_prompts=180, validation_prompts=2, candidates=kind, intervention="affine")
        found = extract(model_of(name), tokenizer, harmful, harmless, options)
        assert not found.vectors[:, 0].any()
        assert found.vectors[:, 1:].any(-1).all()
        for row in range(4):
            assert found.selection.dropped[row, 0] == "the direction has length zero"
        assert found.direction.layer > 0
        assert found.vectors.isfinite().all()


def test_rounding_is_no_direction_in_half_precision_either(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    half = copy.deepcopy(llama).to(torch.bfloat16)
    harmful, harmless = [f"Burn {n}" for n in range(97)], [f"Paint {n} twice" for n in range(31)]
    found = extract(half, tokenizer, harmful, harmless, config(train_prompts=90, validation_prompts=5))
    assert not found.vectors[:, 0].any()
    assert found.direction.layer > 0


# --- models ---


@pytest.mark.parametrize("intervention", ["linear", "affine"])
@pytest.mark.parametrize("method", ["cosmic", "substring"])
@pytest.mark.parametrize("depth", [2, 3])
def test_shallow_models(tokenizer: PreTrainedTokenizerFast, depth: int, method: str, intervention: str) -> None:
    model = tiny.build_model("llama", num_hidden_layers=depth)
    options = {"method": method, "intervention": intervention}
    found = extract(model, tokenizer, HARMFUL, HARMLESS, config(full_map=True, **options))
    assert found.vectors.shape[:2] == (4, depth)
    assert found.direction.layer in range(1, depth)
    assert all(values.isfinite().all() for values in found.scores.values())


def test_a_model_of_one_block(tokenizer: PreTrainedTokenizerFast) -> None:
    """What enters its only block at the template's tokens is the same for all prompts; at the text it is not."""
    model = tiny.build_model("llama", num_hidden_layers=1)
    with pytest.raises(InputError) as error:
        extract(model, tokenizer, HARMFUL, HARMLESS, config())
    assert "no candidate direction has a finite score" in one_line(error)
    found = extract(model, build_tokenizer(ENDINGS["the text comes last"][0]), HARMFUL, HARMLESS, config())
    assert found.selection.chosen == (0, 0)
    assert found.evaluation_layers == [0]
    for intervention in ("linear", "affine"):
        checked: Extraction = extract(
            model,
            build_tokenizer(ENDINGS["the text comes last"][0]),
            HARMFUL,
            HARMLESS,
            config(intervention=intervention, full_map=True),
        )
        assert all(values.isfinite().all() for values in checked.scores.values())


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", float("nan")), ("alpha", float("inf")), ("min_induce", float("nan"))]
)
def test_settings_that_are_no_number_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"`{field}` is {re.escape(repr(value))}"):
        config(**{field: value})
