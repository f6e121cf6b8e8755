"""A base in 4 bits gives what the same weights written out in full give: edits, gradients, training, directions.

bitsandbytes writes the weights out (`dequantize`) and multiplies with them, so on CPU nothing but the last bits may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

import cosmic
from cosmic.blocks import PLACES, Site, find_blocks, hidden_states
from cosmic.interventions import Edit, Interventions, unit_vector
from cosmic.loading import load_model
from refat import harden
from refat.attacks import ATTACKS
from refat.data.organism import direction_prompts
from refat.trainer import RefatTrainer
from tests.cosmic import tiny
from tests.refat.test_harden import whole_run
from tests.refat.training import Recording, adapter_of, blocks_of, train

WIDTH = 64
ROWS = torch.tensor([True, False, True, False])
CHECKPOINTING: dict[str, dict[str, bool] | None] = {
    "off": None,
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}
Load = Callable[[], PreTrainedModel]


def nf4(nested: bool = False) -> BitsAndBytesConfig:
    """Four bits, products in float32."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=nested,
    )


@pytest.fixture(params=[False, True], ids=["plain", "nested"])
def quantized(request: pytest.FixtureRequest, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> Load:
    """A new copy of a random llama in 4 bits at every call, its rows whole blocks of bitsandbytes as in real ones."""
    folder = tmp_path / "wide"
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "head_dim": WIDTH // 4}
    tiny.build_model("llama", vocab_size=len(chat_tokenizer), **sizes).save_pretrained(folder)
    return lambda: load_model(str(folder), quantization_config=nf4(request.param))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers, by the name they have without an adapter."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit" and hasattr(module, "weight") and not hasattr(module, "lora_A")
    }


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that the quantized weights are stored as: their codes and their scales."""
    stored = {}
    for name, module in linears(model).items():
        weight: Any = module.weight
        stored[f"{name} codes"] = weight.data.clone()
        stored[f"{name} scales"] = weight.quant_state.absmax.clone()
    return stored


def with_adapter(model: PreTrainedModel) -> PeftModel:
    """The model with a LoRA that depends on nothing but its shapes."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()


def edits_of_rows(model: nn.Module) -> dict[Site, list[Edit]]:
    """At every site another direction for every row, on every second row."""
    edits = {}
    for index, site in enumerate(find_blocks(model).sites()):
        units = unit_vector(tiny.random_vector(len(ROWS), WIDTH, seed=index)).float()
        offsets = tiny.random_vector(len(ROWS), seed=100 + index)
        edits[site] = [Edit(units, offsets, torch.ones(len(ROWS)), ROWS)]
    return edits


def edited_step(model: PeftModel, edits: dict[Site, list[Edit]]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What every block gives, and the gradients of the adapter, with edits in force to the end of backward."""
    outputs: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
        for block in blocks_of(model)
    ]
    ids = tiny.random_ids(len(ROWS), 12)
    with Interventions(model, edits):
        model(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return outputs[: len(handles)], gradients


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to 1e-5 of the largest number."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("mode", list(CHECKPOINTING))
def test_edits_and_gradients_are_those_of_the_weights_written_out(mode: str, quantized: Load) -> None:
    results = []
    for model in (quantized(), quantized().dequantize()):
        adapted = with_adapter(model)
        if CHECKPOINTING[mode]:
            model.activation_checkpointing_enable(CHECKPOINTING[mode])
            model.enable_input_require_grads()
        results.append(edited_step(adapted, edits_of_rows(adapted)))
    (states, gradients), (expected_states, expected_gradients) = results
    assert len(states) == 4
    assert all(close(*pair) for pair in zip(states, expected_states, strict=True))
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) == 2 * 4 * 7
    for name, expected in expected_gradients.items():
        assert expected.abs().max() > 0
        assert close(gradients[name], expected), name


def test_edited_rows_obey_the_formula_and_others_keep_their_bits(quantized: Load) -> None:
    model = with_adapter(quantized())
    edits = edits_of_rows(model)
    plain, _ = edited_step(model, {})
    edited, _ = edited_step(model, edits)
    for before, after in zip(plain, edited, strict=True):
        assert torch.equal(before[~ROWS], after[~ROWS])
        assert (before[ROWS] - after[ROWS]).abs().amax((1, 2)).min() > 0.1
    states: dict[Site, torch.Tensor] = {}
    sites = [[Site(layer, place) for place in PLACES] for layer in range(4)]
    with Interventions(model, edits):  # before the recording hooks, so that these see what is edited
        for layer, block in enumerate(blocks_of(model)):
            block.register_forward_pre_hook(lambda _, args, s=sites[layer][0]: states.update({s: args[0]}))
            for site, part in zip(sites[layer][1:], (block.self_attn, block.mlp), strict=True):
                part.register_forward_hook(  # type: ignore[union-attr]
                    lambda _, __, out, s=site: states.update({s: hidden_states(out)})
                )
        model(input_ids=tiny.random_ids(len(ROWS), 12))
    assert states.keys() == edits.keys()
    for site, [edit] in edits.items():
        along = torch.einsum("bsd,bd->bs", states[site], edit.unit)
        assert torch.allclose(along[ROWS], edit.offset[ROWS, None].expand(-1, 12), atol=1e-5)
        assert not torch.allclose(along[~ROWS], edit.offset[~ROWS, None].expand(-1, 12), atol=1e-1)


def trained(
    model: PreTrainedModel, trainer_of: Callable[..., RefatTrainer]
) -> tuple[Recording, dict[str, torch.Tensor]]:
    """Three steps on `model` with gradient checkpointing, of which the base must come out as it went in."""
    stored = packed(model)
    others = {name: weight.clone() for name, weight in model.named_parameters() if weight.dtype != torch.uint8}
    torch.manual_seed(2)
    trainer = trainer_of(
        model=model,
        gradient_checkpointing=True,
        ablation_probability=0.8,
        max_steps=3,
        extraction_train_prompts=4,
        extraction_validation_prompts=2,
        positions=1,
    )
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)  # as TRL does on a quantized base, and only there
    before = adapter_of(trainer)
    recording = train(trainer)
    assert getattr(blocks_of(trainer.model)[0], "gradient_checkpointing", False)
    assert sum(entry.get("refat/perturbed_share", 0) for entry in trainer.state.log_history) > 0
    after = packed(trainer.model)
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[name], value) for name, value in stored.items())
    kept = {name.replace(".base_layer", ""): weight for name, weight in trainer.model.named_parameters()}
    assert all(torch.equal(kept[f"base_model.model.{name}"], value) for name, value in others.items())
    adapter = adapter_of(trainer)
    assert all(not torch.equal(before[name], weight) for name, weight in adapter.items())
    return recording, adapter


@pytest.mark.parametrize("quantized", [False], ids=["plain"], indirect=True)
def test_training_is_that_on_the_weights_written_out_and_changes_the_adapter_only(
    quantized: Load, trainer_of: Callable[..., RefatTrainer]
) -> None:
    model = quantized()
    assert len(packed(model)) == 2 * 4 * 7
    found, adapter = trained(model, trainer_of)
    expected, expected_adapter = trained(quantized().dequantize(), trainer_of)
    assert len(found.losses) == 3
    assert torch.allclose(torch.stack(found.losses), torch.stack(expected.losses), rtol=1e-5)
    for gradients, expected_gradients in zip(found.gradients, expected.gradients, strict=True):
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            assert (gradients[name] - gradient).norm() <= 1e-2 * gradient.norm(), name
    assert all(torch.allclose(weight, expected_adapter[name], rtol=1e-2) for name, weight in adapter.items())


def test_direction_is_that_of_the_weights_written_out(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    quantized = load_model("organism", quantization_config=nf4())
    written_out = load_model("organism", quantization_config=nf4()).dequantize()
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (written_out, load_model("organism"))]
    assert 1e-3 < (weights[0] - weights[1]).abs().mean() / weights[1].abs().mean() < 0.2
    settings = cosmic.ExtractionConfig(train_prompts=20, validation_prompts=6, positions=2)
    found, expected = (
        cosmic.extract(model, chat_tokenizer, *direction_prompts(26), settings) for model in (quantized, written_out)
    )
    assert not found.selection.relaxed
    assert found.selection.chosen == expected.selection.chosen
    assert functional.cosine_similarity(found.direction.vector, expected.direction.vector, 0) > 0.99999
    assert torch.allclose(found.scores["comply"], expected.scores["comply"], atol=1e-4, equal_nan=True)


def test_whole_run_is_on_four_bits(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bits: list[set[str]] = []
    load = harden._load_base

    def noted(run: harden.Run, **options: bool) -> PreTrainedModel:
        model = load(run, **options)
        bits.append({str(module.weight.quant_type) for module in linears(model).values()})  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(harden, "_load_base", noted)
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**settings, "load_in_4bit": True, "gradient_checkpointing": True}))
    results = whole_run(config)
    assert bits == [{"nf4"}] * 3
    assert {(row["system"], row["attack"]) for row in results["rows"]} == {
        (system, attack) for system in ("base", "sft", "refat") for attack in (*ATTACKS, "direct")
    }
    for name in ("adapter/adapter_model.safetensors", "control/adapter/adapter_model.safetensors", "report.html"):
        assert (tmp_path / "run" / name).is_file()


def test_weights_stored_in_four_bits_stay_so(quantized: Load, tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path / "stored")
    loaded = load_model(str(tmp_path / "stored"))
    expected, found = packed(model), packed(loaded)
    assert found.keys() == expected.keys()
    assert found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
