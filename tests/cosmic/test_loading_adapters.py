"""A folder with a PEFT adapter loads like a model: the base it names with the adapter on it, or one line that says why not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from cosmic import Direction, InputError, find_blocks
from cosmic.extraction import provenance
from cosmic.loading import check_model, find_adapter, load_model, load_tokenizer, registered_name, resolve_name
from tests.cosmic.tiny import build_model, build_tokenizer, random_vector

IDS = torch.arange(6, 26)[None]


def write_adapter(base: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """A LoRA with random weights that are not zero, saved by PEFT; `base` is changed."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{**settings, **options})).save_pretrained(folder)
    return folder


def changed(folder: Path, **settings: Any) -> Path:
    """The adapter with other settings in its `adapter_config.json`."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(load_model(str(base), device="cpu"), tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """An adapter to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS.to(model.device)).logits.cpu()
    return found


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}])
def test_logits_are_those_of_peft(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_adapter(load_model(str(base)), tmp_path / "adapter", **options)
    expected = PeftModel.from_pretrained(load_model(str(base)), str(folder)).eval()
    found = load_model(str(folder))
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-5)
    assert (logits(found) - logits(load_model(str(base)))).abs().max() > 0.1
    assert not found.training
    assert not any(weight.requires_grad for name, weight in found.named_parameters() if "lora" in name)


def test_the_base_may_be_a_registered_name(tmp_path: Path) -> None:
    folder = changed(write_adapter(load_model("organism"), tmp_path / "adapter"), base_model_name_or_path="organism")
    expected = PeftModel.from_pretrained(load_model("organism"), str(folder)).eval()
    torch.testing.assert_close(logits(load_model(str(folder))), logits(expected), rtol=0, atol=1e-5)
    assert check_model(str(folder)).num_hidden_layers == 12
    assert registered_name(load_tokenizer(str(folder)).name_or_path) == "organism"


def test_records_name_the_adapter_and_not_its_base(saved: Path) -> None:
    assert provenance(load_model(str(saved)), {})["model"] == str(saved)


def test_the_tokenizer_is_the_adapters_own_or_the_bases(base: Path, adapter: Path) -> None:
    assert load_tokenizer(str(adapter)).name_or_path == str(base)
    build_tokenizer(template="{{ messages[0]['content'] }}<|end|>").save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).chat_template == "{{ messages[0]['content'] }}<|end|>"


def test_edits_reach_a_model_with_an_adapter(saved: Path, base: Path) -> None:
    model, plain = load_model(str(saved)), load_model(str(base))
    assert find_blocks(model).sites() == find_blocks(plain).sites()
    direction = Direction(random_vector(32), random_vector(32, seed=1), layer=2, position=-1)
    clean = logits(model)
    with direction.ablate(model):
        assert not torch.allclose(logits(model), clean)
    assert torch.equal(logits(model), clean)


def test_only_a_folder_without_a_model_is_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert find_adapter("organism") is None
    assert find_adapter(str(base)) is None
    assert find_adapter(str(tmp_path)) is None
    found = find_adapter(str(adapter))
    assert found is not None
    assert (found.folder, found.base) == (adapter, str(base))
    shutil.copy(base / "config.json", adapter)
    assert find_adapter(str(adapter)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": None}, "`base_model_name_or_path` in `.*adapter_config.json` is None; expected"),
        ({"base_model_name_or_path": ""}, "is ''; expected the name or folder of the model"),
        ({"base_model_name_or_path": "/nowhere/model"}, "the base of the adapter .* is missing .*`/nowhere/model`"),
    ],
)
def test_a_base_that_is_missing_is_named_before_anything_is_loaded(
    adapter: Path, settings: dict[str, Any], message: str
) -> None:
    for function in (check_model, load_model):
        with pytest.raises(InputError, match=message):
            function(str(changed(adapter, **settings)))


def test_an_adapter_on_an_adapter_is_refused(saved: Path, adapter: Path) -> None:
    with pytest.raises(InputError, match="an adapter itself; expected a whole model"):
        check_model(str(changed(adapter, base_model_name_or_path=str(saved))))


def test_peft_must_be_there(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"needs PEFT\. Install it: pip install peft"):
        check_model(str(adapter))
    check_model("organism")


def test_missing_and_broken_files_are_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(InputError, match="does not fit"):
        load_model(str(adapter))
    weights.unlink()
    with pytest.raises(InputError, match=r"but no adapter_model\.safetensors; expected both"):
        check_model(str(adapter))
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="`base_model_name_or_path` in"):
        check_model(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        check_model(str(adapter))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": "organism"}, "weights are missing, unknown or of another shape, such as `model"),
        ({"r": 8}, "of another shape, such as `model.layers.0.mlp.down_proj.lora_A"),
        ({"target_modules": ["q_proj"]}, "weights are missing, unknown or of another shape"),
        ({"target_modules": ["nothing"]}, "does not fit .*nothing.* not found in the base model"),
        ({"peft_type": "PROMPT_TUNING"}, "does not fit"),
        ({"peft_type": "MAGIC"}, "does not fit"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_model(str(changed(adapter, **settings)))
    assert "\n" not in str(raised.value)


def test_fewer_or_more_layers_do_not_fit(adapter: Path, tmp_path: Path) -> None:
    for layers in (2, 6):
        build_model("llama", num_hidden_layers=layers).save_pretrained(tmp_path / str(layers))
        changed(adapter, base_model_name_or_path=str(tmp_path / str(layers)))
        with pytest.raises(InputError, match=r"such as `model\.layers\.\d"):
            load_model(str(adapter))


def test_registered_names_still_load() -> None:
    assert check_model("organism").model_type == load_model(resolve_name("organism")).config.model_type
