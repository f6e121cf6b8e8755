"""`extract` as a whole: what it refuses, what its settings do, and that it leaves the model alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cosmic import Direction, ExtractionConfig, InputError, extract
from cosmic.activations import read
from cosmic.blocks import find_blocks
from cosmic.candidates import difference_in_means
from cosmic.interventions import ablation
from cosmic.prompt_split import split_prompts
from cosmic.prompts import PromptEncoder
from tests.cosmic.tiny import HARMFUL, HARMLESS, build_tokenizer, hook_counts, random_ids

SETTINGS: dict[str, Any] = {"train_prompts": 4, "validation_prompts": 3, "positions": 2, "max_kl": None}


def config(**options: Any) -> ExtractionConfig:
    return ExtractionConfig(**{**SETTINGS, **options})


@pytest.mark.parametrize(
    ("harmful", "harmless", "message"),
    [
        ([], HARMLESS, "`harmful` has 0 distinct prompts; expected at least 2"),
        (HARMFUL, [], "`harmless` has 0 distinct prompts"),
        (HARMFUL, ["one", "one"], "`harmless` has 1 distinct prompts"),
        ([*HARMFUL, " \n"], HARMLESS, "`harmful` prompt 9 is empty"),
        (HARMFUL, ["", "fine"], "`harmless` prompt 1 is empty"),
        (HARMFUL, [[], "fine"], "`harmless` prompt 1 is empty"),
        (HARMFUL, [*HARMLESS, HARMFUL[3]], "1 prompts are in both .*forge a passport"),
        (HARMFUL, [*HARMLESS, [{"role": "user", "content": HARMFUL[3]}]], "1 prompts are in both .*forge a passport"),
        ([*HARMFUL, "word " * 200], HARMLESS, "a prompt of `harmful` has .* tokens; expected at most 160"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, harmful: list[Any], harmless: list[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        extract(llama, tokenizer, harmful, harmless, ExtractionConfig())


def test_other_bad_input(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="no chat template"):
        extract(llama, build_tokenizer(None), HARMFUL, HARMLESS)
    with pytest.raises(InputError, match=r"`refusal_tokens` has \[300, -1\]; expected token ids from 0 to 299"):
        extract(llama, tokenizer, HARMFUL, HARMLESS, config(method="substring", refusal_tokens=(5, 300, -1)))
    deaf = copy.deepcopy(llama)
    torch.nn.init.zeros_(deaf.get_input_embeddings().weight)
    with pytest.raises(InputError, match="Give prompts that the model tells apart"):
        extract(deaf, tokenizer, HARMFUL, HARMLESS, config())


def test_the_model_is_left_as_it_was_even_if_extraction_is_stopped(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = copy.deepcopy(llama)
    model.model.layers[2].train()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        clean = model(input_ids=random_ids(2, 5)).logits
    done: list[tuple[int, int]] = []

    def count(now: int, total: int) -> None:
        done.append((now, total))

    def stop(now: int, total: int) -> None:
        if 2 * now > total:
            raise KeyboardInterrupt

    extract(model, tokenizer, HARMFUL, HARMLESS, config(), progress=count)
    work, totals = zip(*done, strict=True)
    assert list(work) == sorted(set(work))
    assert totals[-1] == max(totals) >= work[-1] >= 0.9 * totals[-1], "what remains is estimated honestly"
    with pytest.raises(KeyboardInterrupt):
        extract(model, tokenizer, HARMFUL, HARMLESS, config(), progress=stop)
    assert [module.training for module in model.modules()] == modes
    assert not hook_counts(model)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_ids(2, 5)).logits, clean)


def test_a_system_prompt_on_validation_leaves_the_candidates_alone(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = extract(llama, tokenizer, HARMFUL, HARMLESS, config())
    on_validation = extract(llama, tokenizer, HARMFUL, HARMLESS, config(system_prompt="Refuse everything."))
    on_both = extract(
        llama, tokenizer, HARMFUL, HARMLESS, config(system_prompt="Refuse everything.", system_prompt_on="both")
    )
    assert torch.equal(plain.vectors, on_validation.vectors)
    assert not torch.isclose(plain.scores["comply"], on_validation.scores["comply"]).any()
    assert not torch.isclose(plain.vectors[:, 1:], on_both.vectors[:, 1:]).all()


def test_prompts_are_divided_reproducibly_and_in_proportion() -> None:
    harmful, harmless = [f"bad {n}" for n in range(50)], [f"good {n}" for n in range(300)]
    parts = split_prompts(harmful, harmless, ExtractionConfig())
    sizes = {name: len(prompts) for name, prompts in parts.items()}
    assert sizes == {"train_harmful": 32, "validation_harmful": 18, "train_harmless": 180, "validation_harmless": 100}
    for name in ("harmful", "harmless"):
        train, validation = set(map(str, parts[f"train_{name}"])), set(map(str, parts[f"validation_{name}"]))
        assert not train & validation
    assert parts == split_prompts(harmful[::-1], harmless, ExtractionConfig())
    assert parts != split_prompts(harmful, harmless, ExtractionConfig(seed=1))
    few = split_prompts(["a", "b"], ["c", "d"], ExtractionConfig(train_prompts=1000, validation_prompts=1))
    assert {name: len(prompts) for name, prompts in few.items()} == dict.fromkeys(few, 1)


def test_template_tokens_before_the_first_block_have_no_direction(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = extract(llama, tokenizer, HARMFUL, HARMLESS, ExtractionConfig(max_kl=None))
    assert found.positions == [-4, -3, -2, -1]
    assert found.tokens == ["<|end|>", "\n", "<|assistant|>", "\n"]
    for row in range(4):
        assert found.selection.dropped[row, 0] == "the direction has length zero"
        assert found.selection.dropped[row, 3] if row == 3 else True
    assert found.direction.layer > 0
    assert torch.equal(found.layers.vectors, found.vectors[-1])


def test_candidates_are_differences_of_plain_means(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(tokenizer)
    plus, minus = ([encoder.encode(prompt) for prompt in prompts] for prompts in (HARMFUL, HARMLESS))
    found = difference_in_means(llama, plus, minus, positions=[-3, -1], batch_tokens=60, pad=0)
    options: dict[str, Any] = {"layers": range(4), "batch_tokens": 60, "pad": 0}
    near = {"rtol": 1e-5, "atol": 1e-5}
    inputs = [
        read(llama, prompts, positions=[-3, -1], place="input", **options).states.double().mean(0)
        for prompts in (plus, minus)
    ]
    torch.testing.assert_close(found.vectors, inputs[0] - inputs[1], **near)
    torch.testing.assert_close(found.references, inputs[1], **near)
    for prompts, outputs in ((plus, found.harmful_outputs), (minus, found.harmless_outputs)):
        expected = read(llama, prompts, positions=[-1], place="output", **options).states.double().mean(0)[0]
        torch.testing.assert_close(outputs, expected, **near)


def test_candidates_found_under_an_ablation_have_nothing_along_it(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = PromptEncoder(tokenizer)
    plus, minus = ([encoder.encode(prompt) for prompt in prompts] for prompts in (HARMFUL, HARMLESS))
    options: dict[str, Any] = {"positions": [-1], "batch_tokens": 60, "pad": 0}
    first = difference_in_means(llama, plus, minus, **options)
    r = first.vectors[0, 2]
    again = difference_in_means(llama, plus, minus, edits=ablation(r, find_blocks(llama).sites()), **options)
    assert (again.vectors @ (r / r.norm())).abs().max() < 1e-5
    assert (again.harmful_outputs @ (r / r.norm())).abs().max() < 1e-5
    assert again.vectors[0, 2].norm() > 0.01 * r.norm()


def test_read_gives_inputs_after_their_edit_and_outputs_before_the_next(llama: PreTrainedModel) -> None:
    direction = Direction(torch.arange(32.0), torch.zeros(32), layer=2, position=-1)
    options: dict[str, Any] = {"positions": [-1], "batch_tokens": 1, "pad": 0}
    edits = direction.addition_edits(llama)
    clean = read(llama, [[1, 7, 8]], layers=[2], place="input", **options).states
    edited = read(llama, [[1, 7, 8]], layers=[2], place="input", edits=edits, **options).states
    torch.testing.assert_close(edited, clean + direction.vector)
    before = read(llama, [[1, 7, 8]], layers=[1], place="output", edits=edits, **options).states
    torch.testing.assert_close(before, clean)


def test_steering_with_the_found_direction_works_around_generate(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    direction = extract(llama, tokenizer, HARMFUL, HARMLESS, config()).direction
    ids = tokenizer(PromptEncoder(tokenizer).render("Why?"), return_tensors="pt", add_special_tokens=False)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    clean = llama.generate(**ids, **settings)
    with direction.add(llama, alpha=20.0):
        steered = llama.generate(**ids, **settings)
    assert not torch.equal(clean, steered)
    assert torch.equal(llama.generate(**ids, **settings), clean)
