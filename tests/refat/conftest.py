"""Fixtures for tests of training and evaluation: no network, no telemetry, small models, runs of a few steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cosmic.loading import load_model, load_tokenizer
from refat.data import KINDS, Row, organism_rows
from refat.trainer import RefatTrainer
from tests.cosmic import tiny
from tests.refat.places import fill
from tests.refat.training import build_trainer

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CI="1", TRANSFORMERS_VERBOSITY="error")


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer."""
    return load_tokenizer("organism")


@pytest.fixture(scope="session")
def chat_model() -> Callable[[], PreTrainedModel]:
    """A new copy of the embedded chat model at every call."""
    return lambda: load_model("organism")


@pytest.fixture(scope="session")
def random_model(chat_tokenizer: PreTrainedTokenizerBase) -> Callable[[], PreTrainedModel]:
    """A new copy of a random model of four layers that knows the embedded model's tokens."""
    return lambda: tiny.build_model("llama", vocab_size=len(chat_tokenizer))


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """16 training rows: 8 harmful, 4 borderline, 4 harmless."""
    return organism_rows(0, 16)


@pytest.fixture
def trainer_of(
    tmp_path: Path,
    rows: list[Row],
    random_model: Callable[[], PreTrainedModel],
    chat_tokenizer: PreTrainedTokenizerBase,
) -> Callable[..., RefatTrainer]:
    """Builds a trainer of the random model on `rows`; see `build_trainer` for what can be set."""

    def build(**options: object) -> RefatTrainer:
        settings = {"model": random_model(), "rows": rows, "tokenizer": chat_tokenizer, "folder": tmp_path / "run"}
        return build_trainer(**{**settings, **options})  # type: ignore[arg-type]

    return build


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the user is in, with all that `places.fill` puts there."""
    monkeypatch.chdir(tmp_path)
    fill()
    return tmp_path


@pytest.fixture
def config(
    tmp_path: Path, random_model: Callable[[], PreTrainedModel], chat_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Settings of a run of a few seconds in `tmp_path / "run"`."""
    random_model().save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "output_dir": str(tmp_path / "run"),
        "data": [{"path": "organism", "kind": kind} for kind in KINDS],
        "validation_data": [{"path": "organism", "kind": kind, "split": "validation", "limit": 4} for kind in KINDS],
        "eval_data": [{"path": "organism", "kind": kind, "limit": 6} for kind in KINDS],
        "train_rows": 24,
        "judge": "exact",
        "framings": "organism",
        "train_framings": "organism-train",
        "lora_r": 2,
        "num_train_epochs": 1,
        "max_length": 64,
        "extraction_train_prompts": 6,
        "extraction_validation_prompts": 2,
        "drift_directions": 1,
        "drift_max_new_tokens": 4,
        "eval_max_new_tokens": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
