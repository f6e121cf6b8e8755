"""Load a chat model by name: a Hub id, a folder, or a name that an installed package has registered.

Everything that can be refused without loading weights is refused before.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cosmic.errors import InputError


def resolve_name(name: str) -> str:
    """The folder behind a registered name such as `organism`; any other name as it is.

    Packages register names as entry points of the group `cosmic.models`: functions that return a folder.
    """
    for entry in entry_points(group="cosmic.models"):
        if entry.name == name:
            path = Path(entry.load()())
            if not (path / "config.json").is_file():
                raise InputError(
                    f"`{name}` is registered at `{path}`, but no checkpoint is there. Reinstall the package."
                )
            return str(path)
    return name


def registered_name(path: str) -> str:
    """The registered name of a folder, so that records carry no path of this machine; any other name as it is."""
    if Path(path).is_dir():
        for entry in entry_points(group="cosmic.models"):
            if Path(entry.load()()) == Path(path):
                return entry.name
    return path


def check_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Read the model's configuration only and refuse what cannot work.

    Raises:
        InputError: the model does not exist or is not a decoder-only language model.
    """
    path = resolve_name(name)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"`{name}` cannot be loaded as a model: {str(error).splitlines()[0]}") from error
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) | set(getattr(config, "auto_map", None) or {})
    architectures = config.architectures or []
    listed = not architectures or any(item in causal or item.endswith("ForCausalLM") for item in architectures)
    if config.is_encoder_decoder or not listed or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = ", ".join(architectures) or config.model_type
        raise InputError(
            f"`{name}` is a {kind}, not a decoder-only language model. Give a chat model such as `organism`."
        )


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a chat model.

    Raises:
        InputError: it cannot be loaded or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_name(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"`{name}` has no tokenizer that can be loaded: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of `{name}` has no chat template. Give an instruction-tuned chat model.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def default_dtype() -> torch.dtype:
    """bfloat16 on accelerators that have it, float32 elsewhere."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def load_model(
    name: str,
    revision: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantization_config: object | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    move: bool = True,
) -> PreTrainedModel:
    """A causal LM in evaluation mode, on an accelerator if there is one.

    Args:
        move: put it there; otherwise it stays where it was loaded to, as one must whose weights are sharded later.

    Raises:
        InputError: it cannot be loaded or is not a decoder-only language model.
    """
    check_model(name, revision, trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_name(name),
            revision=revision,
            dtype=dtype or default_dtype(),
            **(
                {"quantization_config": quantization_config} if quantization_config else {}
            ),  # `None` undoes the model's own
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"`{name}` cannot be loaded: {str(error).splitlines()[0]}") from error
    if move and not getattr(model, "is_quantized", False):
        model.to(device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"))
    assert isinstance(model, PreTrainedModel)
    return model.eval()
