"""What a hardening run is made of beside training: model, data, evaluation. Parsed from YAML and the command line together.

A field set on the command line beats the same field in the YAML file; a key that no field has is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import ModelConfig, TrlParser

from cosmic.errors import InputError
from refat.attacks import check_attacks
from refat.config import RefatConfig, option
from refat.data.sources import DataSource
from refat.judges import JUDGES


@dataclass
class RunConfig:
    """Data and evaluation of a hardening run.

    Raises:
        InputError: a value is outside its range or a data source is malformed.
    """

    data: list[dict[str, Any]] = option(
        [],
        "Training rows: a list of sources with `path` (Hub id, file or `organism`), `kind` (harmful, borderline, harmless), "
        "`weight` and more; see docs/data.md. YAML only.",
    )
    train_rows: int | None = option(
        None, "Rows in the mixture; by default as many as the weights allow without repeats."
    )
    direction_data: list[dict[str, Any]] = option(
        [],
        "Prompts to find directions on, harmful and harmless; by default those of `data`, borderline ones as harmless.",
    )
    eval_data: list[dict[str, Any]] = option(
        [], "Held-out prompts that attacks are scored on: sources like those of `data`."
    )
    validation_data: list[dict[str, Any]] = option(
        [], "Prompts for the drift record; by default those of `eval_data` that are not scored."
    )
    eval_prompts: int = option(200, "Prompts per kind in the final evaluation.")
    eval_max_new_tokens: int = option(
        100, "Longest reply in the evaluation, in tokens; shorter ones hide late refusals."
    )
    eval_batch_size: int = option(64, "Replies generated at a time.")
    attacks: list[str] = option(["all"], "Attacks to evaluate, by name, or `all`; `refat attacks` lists them.")
    benign_under_attack: bool = option(
        False, "Put borderline and harmless prompts under every attack too, not only direct."
    )
    framings: str = option(
        "generic",
        "Jailbreak framings of the attack: a name, or a file with one a line and a place for `{prompt}` in each.",
    )
    train_framings: str = option(
        "generic-train", "Framings that training rows are put into; keep them apart from `framings`."
    )
    framing_share: float = option(0.15, "Share of the training rows, of every kind, that are put into a framing.")
    judge: str = option("substring", f"Who judges replies: {', '.join(sorted(JUDGES))}.")
    sft_control: bool = option(True, "Train a control too: same rows, steps and LoRA, nothing ablated.")

    def __post_init__(self) -> None:
        check_attacks(self.attacks)
        if self.judge not in JUDGES:
            raise InputError(f"`judge` is {self.judge!r}; expected one of {sorted(JUDGES)}.")
        if self.framings == "none":
            raise InputError(
                "`framings` is 'none'; expected framings to attack with. Leave `jailbreak` out of `attacks` instead."
            )
        if not 0 <= self.framing_share <= 1:
            raise InputError(f"`framing_share` is {self.framing_share!r}; expected a share in [0, 1].")
        for name in ("eval_prompts", "eval_max_new_tokens", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` is {getattr(self, name)!r}; expected at least 1.")
        if self.train_rows is not None and self.train_rows < 1:
            raise InputError(f"`train_rows` is {self.train_rows}; expected at least 1, or nothing for all.")
        for name in ("data", "eval_data"):
            sources = self.sources(name)
            if not sources:
                raise InputError(
                    f"`{name}` is empty; expected a list of sources with `path` and `kind`. See recipes/ for examples."
                )
            if not any(source.kind == "harmful" for source in sources):
                raise InputError(f"`{name}` has no source of kind `harmful`; expected at least one.")
        for name in ("data", "direction_data"):
            sources = self.sources(name)
            if sources and len({source.kind == "harmful" for source in sources}) < 2:
                raise InputError(f"`{name}` needs a harmful source and a harmless or borderline one.")
        self.sources("validation_data")

    def sources(self, name: str) -> list[DataSource]:
        """The sources in the field `name`."""
        return [
            DataSource.from_mapping(values, f"{name}[{index}]") for index, values in enumerate(getattr(self, name))
        ]


@dataclass
class HardenedModelConfig(ModelConfig):
    """TRL's model and LoRA settings, with the embedded model and a LoRA on all linear layers by default."""

    model_name_or_path: str | None = option(
        "organism", "Model to harden: a Hub id, a folder, `organism` or `organism-base`."
    )
    use_peft: bool = option(True, "Train a LoRA adapter; there is no other way here.")
    lora_target_modules: list[str] | None = option(["all-linear"], "Modules that get a LoRA.")

    def __post_init__(self) -> None:
        if not self.use_peft:
            raise InputError("`use_peft` is False; expected true: the product of a run is an adapter.")
        super().__post_init__()
        if isinstance(self.lora_target_modules, str) and re.fullmatch(r"(?!all-linear)\w+", self.lora_target_modules):
            self.lora_target_modules = [self.lora_target_modules]  # TRL makes a regular expression of a single name


class _Parser(TrlParser):
    """TRL's parser, whose complaints are one line and not a page of usage."""

    def error(self, message: str) -> NoReturn:
        told = re.sub(r"^argument (--[^/:]+)[^:]*", r"`\1`", message)
        raise InputError(f"{told}. See `--help`.")


def parse(arguments: Sequence[str], default: Path) -> tuple[RunConfig, RefatConfig, HardenedModelConfig]:
    """Settings from `--config FILE` (or the file `default`) and the rest of the command line.

    Raises:
        InputError: the file is missing or malformed, a key is unknown, or a value cannot be used.
    """
    arguments = [
        part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if "--config" not in arguments:
        arguments += ["--config", str(default)]
    place = arguments.index("--config") + 1
    if place >= len(arguments):
        raise InputError("`--config` names no file; expected a YAML file such as recipes/demo/refat_cosmic.yaml.")
    path = Path(arguments[place])
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"`--config` names `{path}`, which cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"`{path}` is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"`{path}` holds {type(settings).__name__}; expected settings as `name: value` lines.")
    kinds = [RunConfig, RefatConfig, HardenedModelConfig]
    _check_values(settings, kinds, path)
    try:
        run, training, model, rest = _Parser(kinds).parse_args_and_config(arguments, return_remaining_strings=True)
    except InputError:
        raise
    except (ImportError, ValueError) as error:
        raise InputError(f"the settings cannot be used: {' '.join(str(error).split())}") from error
    if rest:
        raise InputError(f"the command line has unknown options {rest}. Remove them or correct their names.")
    return run, training, model


def _check_values(settings: Mapping[str, Any], kinds: Sequence[type], path: Path) -> None:
    """Refuse names that no configuration has and values of another type; argparse looks at neither in a file."""
    known = {
        item.name: (item, get_type_hints(kind)[item.name]) for kind in kinds for item in fields(kind) if item.init
    }
    unknown = [name for name in settings if name not in known and name != "env"]
    if unknown:
        raise InputError(f"`{path}` has unknown settings {unknown}. Remove them or correct their names.")
    for name, value in settings.items():
        if name == "env":
            continue
        item, hint = known[name]
        choices = item.metadata.get("choices")
        if not _fits(value, hint):
            expected = (
                hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
            )
            raise InputError(f"`{path}`: `{name}` is {value!r}; expected {expected}.")
        if choices and value is not None and value not in choices:
            raise InputError(f"`{path}`: `{name}` is {value!r}; expected one of {list(choices)}.")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value from YAML can be that of a field with this type; types that YAML cannot say are let through."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if hint is list or origin is list:
        return isinstance(value, list) and (not inner or all(_fits(item, inner[0]) for item in value))
    if hint is dict or origin is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return _is_number(value, hint)
    if hint is bool:
        return isinstance(value, bool)
    if hint is type(None):
        return value is None
    return isinstance(value, str) or hint is not str


def _is_number(value: object, kind: type) -> bool:
    """Whether YAML's value is a number; `1e-4` without a point is text to YAML."""
    if isinstance(value, str):
        return kind is float and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) is not None
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def resolved(run: RunConfig, training: RefatConfig, model: HardenedModelConfig) -> dict[str, Any]:
    """All settings as plain values, secrets left out."""
    values = {**asdict(run), **training.to_dict(), **asdict(model)}
    return {
        name: value if isinstance(value, str | int | float | bool | list | dict) or value is None else str(value)
        for name, value in sorted(values.items())
        if "token" not in name or name.endswith(("_new_tokens", "num_input_tokens_seen", "eos_token", "pad_token"))
    }


WHERE_NOT_WHAT = {"output_dir", "logging_steps", "disable_tqdm", "report_to", "run_name", "save_total_limit"}
"""Settings that do not change what a run trains, so that a run may go on under others."""


def settings_digest(settings: dict[str, Any]) -> str:
    """A digest of the settings that decide what a run trains."""
    divided = (
        {"per_device_train_batch_size", "gradient_accumulation_steps"} if settings.get("rows_per_step") else set()
    )
    deciding = {name: value for name, value in settings.items() if name not in WHERE_NOT_WHAT | divided}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()
