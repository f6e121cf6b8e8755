"""What can be refused before any weights are loaded: layers, adapters and prompts that do not fit.

Works on the model's skeleton, its modules without their weights, which takes a second for a model of any size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from cosmic.errors import InputError
from cosmic.loading import find_adapter, resolve_name
from refat.adversaries import require_layers
from refat.data.schema import Item
from refat.judges import Judge


def skeleton(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The causal LM called `name` without its weights.

    Raises:
        InputError: it is an adapter, on which no other can be trained or loaded.
    """
    if find_adapter(name) is not None:
        raise InputError(f"`{name}` is an adapter; expected a whole model. Name its base, or merge it first.")
    config = AutoConfig.from_pretrained(resolve_name(name), revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def check_layers(model: Any, layer_range: Sequence[int] | None, peft_config: PeftConfig) -> None:
    """Refuse layers and modules that the model does not have.

    Args:
        model: a skeleton; it gets the adapter.

    Raises:
        InputError: `layer_range` or `lora_target_modules` names something else.
    """
    require_layers(layer_range, model.config.get_text_config().num_hidden_layers)
    try:
        with warnings.catch_warnings(action="ignore"):
            get_peft_model(model, peft_config)
    except ValueError as error:
        raise InputError(f"the LoRA settings do not fit the model: {' '.join(str(error).split())}") from error


def check_adapter(model: Any, folder: Path) -> None:
    """Refuse an adapter that was trained on another architecture; PEFT would leave the layers it lacks unadapted.

    Args:
        model: a skeleton; it gets the adapter.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        InputError: a file is missing or malformed, or the adapter's weights are not those that the model needs.
    """
    path = folder / "adapter_model.safetensors"
    try:
        config = PeftConfig.from_pretrained(str(folder))
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with warnings.catch_warnings(action="ignore"):
            needed = get_peft_model_state_dict(PeftModel(model, config))
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"`{folder}` is no adapter for this model: {' '.join(str(error).split())}") from error
    expected = {name: tuple(weight.shape) for name, weight in needed.items()}
    if found != expected:
        name = min(set(found.items()) ^ set(expected.items()))[0]
        raise InputError(
            f"`{folder}` is no adapter for this model: it has `{name}` with shape {found.get(name)}, expected "
            f"{expected.get(name)}. Give the model that it was trained on."
        )


def check_items(items: Mapping[str, Sequence[Item]], judge: Judge) -> None:
    """Refuse prompts that the judge cannot judge.

    Raises:
        InputError: the judge knows nothing of such prompts, or there is no harmful one.
    """
    if not items.get("harmful"):
        raise InputError("there are no harmful prompts to evaluate; expected at least one. Give a harmful source.")
    for chosen in items.values():
        for item in chosen[:1]:
            judge.judge(item, "")
