"""`refat eval` refuses bad input before the model's weights are read; directions only fit the model they come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cosmic.config import ExtractionConfig
from cosmic.direction import Direction
from cosmic.errors import InputError
from cosmic.extraction import extract
from refat.evaluation_run import EvaluationRun
from tests.refat.places import listing
from tests.refat.training import HARMFUL, HARMLESS, lora_config


def evaluation(**changes: Any) -> EvaluationRun:
    given: dict[str, Any] = {
        "model": "weightless",
        "adapter": None,
        "output": Path("results"),
        "attacks": ["direct"],
        "judge": None,
        "files": {"harmful": Path("harmful.txt"), "borderline": None, "harmless": Path("harmless.txt")},
        "prompts": 4,
        "max_new_tokens": 4,
        "batch_size": 4,
        "benign_under_attack": False,
        "framings": "",
        "seed": 0,
    }
    return EvaluationRun(**{**given, **changes})


def files(harmful: str | None, harmless: str | None) -> dict[str, Path | None]:
    return {
        "harmful": Path(harmful) if harmful else None,
        "borderline": None,
        "harmless": Path(harmless) if harmless else None,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"files": files("nowhere.txt", "harmless.txt")}, "nowhere.txt.*does not exist"),
        ({"files": files("broken.jsonl", "harmless.txt")}, "broken.jsonl"),
        ({"files": files("harmful.txt", None)}, "`--harmless` is missing"),
        ({"files": files(None, None)}, "only the embedded model"),
        ({"files": files("harmful.txt", "harmful.txt")}, "both `harmful` and `harmless`"),
        ({"attacks": ["gcg"]}, "gcg"),
        ({"attacks": []}, "nothing"),
        ({"judge": "exact"}, "substring"),
        ({"judge": "gpt"}, "`judge` is 'gpt'"),
        ({"prompts": 0}, "`--prompts` is 0"),
        ({"max_new_tokens": 0}, "`--max-new-tokens` is 0"),
        ({"batch_size": 0}, "`--batch-size` is 0"),
        ({"framings": "nowhere.txt"}, "nowhere.txt"),
        ({"adapter": Path("taken")}, "adapter_config.json"),
        ({"output": Path("taken")}, "`taken` is not empty"),
        ({"output": Path("harmful.txt")}, "is a file"),
        ({"model": "bert"}, "not a decoder-only"),
        ({"model": "untemplated"}, "no chat template"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"adapter": Path("adapter")}, "no adapter for this model.*expected"),
        ({"adapter": Path("torn-adapter")}, "no adapter for this model"),
    ],
    ids=lambda value: " ".join(f"{key}={val}" for key, val in value.items())[:60] if isinstance(value, dict) else "",
)
def test_evaluation_is_refused(
    changes: dict[str, Any], expected: str, place: Path, random_model: Callable[[], PreTrainedModel]
) -> None:
    if "adapter" in str(changes.get("adapter")):  # of a model with four layers, not twelve
        get_peft_model(random_model(), lora_config()).save_pretrained("adapter")
        shutil.copytree("adapter", "torn-adapter")
        Path("torn-adapter/adapter_model.safetensors").write_bytes(b"torn")
    before = listing(place)
    with pytest.raises(InputError, match=expected) as caught:
        evaluation(**changes).evaluate()
    assert "\n" not in str(caught.value)
    assert listing(place) == before


def test_adapter_with_fewer_layers_is_refused(place: Path, chat_model: Callable[[], PreTrainedModel]) -> None:
    """PEFT would load it and leave the other layers without an adapter."""
    get_peft_model(chat_model(), lora_config()).save_pretrained("adapter")
    config = json.loads(Path("weightless/config.json").read_text())
    Path("weightless/config.json").write_text(json.dumps({**config, "num_hidden_layers": 13}))
    with pytest.raises(InputError, match="no adapter for this model"):
        evaluation(adapter=Path("adapter")).evaluate()


def test_an_adapter_is_no_base_for_another(place: Path, chat_model: Callable[[], PreTrainedModel]) -> None:
    get_peft_model(chat_model(), lora_config()).save_pretrained("adapter")
    with pytest.raises(InputError, match="`adapter` is an adapter; expected a whole model"):
        evaluation(model="adapter", adapter=Path("adapter")).evaluate()


# --- directions of another architecture


def test_direction_of_another_architecture_is_refused(
    random_model: Callable[[], PreTrainedModel],
    chat_model: Callable[[], PreTrainedModel],
    chat_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    config = ExtractionConfig(train_prompts=4, validation_prompts=2)
    found = extract(random_model(), chat_tokenizer, HARMFUL, HARMLESS, config)
    found.save(tmp_path)
    direction, model = Direction.load(tmp_path), chat_model()
    for use in (direction.ablate, direction.add, direction.affine, found.layers.ablate):
        with pytest.raises(InputError, match="not fit a model of 12 layers"):
            use(model)
