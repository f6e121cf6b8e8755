"""Load a chat model by name: a Hub id, a folder, or a name that an installed package has registered.

A folder may also hold a PEFT adapter (`adapter_config.json` and no `config.json`): its base, which the adapter names, is
loaded and the adapter put on it. Everything that can be refused without loading weights is refused before.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cosmic.errors import InputError
from cosmic.storage import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """A folder that holds a PEFT adapter.

    Attributes:
        folder: where it lies.
        base: name of the model it belongs on: registered, a Hub id or a folder.
        revision: the base's commit, tag or branch, if the adapter names one.
    """

    folder: Path
    base: str
    revision: str | None

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved with it."""
        return (self.folder / "tokenizer_config.json").is_file()


def find_adapter(name: str) -> Adapter | None:
    """The adapter in the folder `name`, or `None` if `name` is anything else, such as a whole model.

    Raises:
        InputError: its `adapter_config.json` cannot be read or names no base, or its base is an adapter, too.
    """
    folder = Path(name)
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    record = read_json(folder / ADAPTER_CONFIG)
    base = record.get("base_model_name_or_path") if isinstance(record, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(
            f"`base_model_name_or_path` in `{folder / ADAPTER_CONFIG}` is {base!r}; expected the name or folder of the "
            "model that the adapter was trained on. Put it there."
        )
    if (Path(base) / ADAPTER_CONFIG).is_file() and not (Path(base) / "config.json").is_file():
        raise InputError(
            f"`base_model_name_or_path` in `{folder / ADAPTER_CONFIG}` is {base!r}, an adapter itself; expected a whole "
            "model. Merge that adapter into its base first."
        )
    return Adapter(folder, base, record.get("revision"))


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


def check_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the model's configuration only and refuse what cannot work.

    Args:
        name: a Hub id, a folder, a registered name, or the folder of an adapter, whose base is read.
        revision: the model's commit, tag or branch; for an adapter its base's.

    Returns:
        The configuration.

    Raises:
        InputError: the model does not exist or is not a decoder-only language model; an adapter has no weights or no
            base that can be loaded, or PEFT is not installed.
    """
    adapter = find_adapter(name)
    if adapter is not None:
        return _check_adapter(adapter, revision, trust_remote_code)
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
    assert isinstance(config, PreTrainedConfig)
    return config


def _check_adapter(adapter: Adapter, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    if find_spec("peft") is None:
        raise InputError(f"`{adapter.folder}` holds an adapter, which needs PEFT. Install it: pip install peft.")
    if not any((adapter.folder / file).is_file() for file in ADAPTER_WEIGHTS):
        raise InputError(
            f"`{adapter.folder}` has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS[0]}; expected both. Copy the whole folder."
        )
    try:
        return check_model(adapter.base, revision or adapter.revision, trust_remote_code)
    except InputError as error:
        raise InputError(
            f"the base of the adapter `{adapter.folder}` is missing or cannot be used: {error} Correct "
            f"`base_model_name_or_path` in its {ADAPTER_CONFIG}."
        ) from error


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a chat model; of an adapter the one in its folder, or its base's if there is none.

    Raises:
        InputError: it cannot be loaded or has no chat template.
    """
    adapter = find_adapter(name)
    if adapter is not None and not adapter.has_tokenizer:
        return load_tokenizer(adapter.base, revision or adapter.revision, trust_remote_code)
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
    """A causal LM in evaluation mode, on an accelerator if there is one; with its adapter if `name` is one's folder.

    Args:
        revision: the model's commit, tag or branch; for an adapter its base's.
        move: put it there; otherwise it stays where it was loaded to, as one must whose weights are sharded later.

    Raises:
        InputError: it cannot be loaded or is not a decoder-only language model, or an adapter does not fit its base.
    """
    check_model(name, revision, trust_remote_code)
    adapter = find_adapter(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_name(adapter.base if adapter else name),
            revision=revision or (adapter.revision if adapter else None),
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
    if adapter is not None:
        _put_on(model, adapter)
    return model.eval()


def _put_on(model: PreTrainedModel, adapter: Adapter) -> None:
    """Load the adapter's weights into the model, and have the model's records name the adapter's folder.

    Raises:
        InputError: they are not those that the adapter's settings make in this model.
    """
    try:
        loaded = model.load_adapter(str(adapter.folder), ignore_mismatched_sizes=True)  # told by name below
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(
            f"the adapter `{adapter.folder}` does not fit `{adapter.base}`: {' '.join(str(error).split())} Give the base "
            "that it was trained on."
        ) from error
    wrong = sorted({*loaded.missing_keys, *loaded.unexpected_keys, *(item[0] for item in loaded.mismatched_keys)})
    if wrong:
        raise InputError(
            f"the adapter `{adapter.folder}` does not fit `{adapter.base}`: {len(wrong)} weights are missing, unknown or "
            f"of another shape, such as `{wrong[0]}`. Give the base that it was trained on."
        )
    model.config.name_or_path = str(adapter.folder)
