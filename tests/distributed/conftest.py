"""A tiny random chat model on disk and the settings of runs of a few seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosmic.loading import load_tokenizer
from tests.cosmic import tiny
from tests.distributed.launching import launch

KINDS = ("harmful", "borderline", "harmless")
PROGRAM = "tests/distributed/observed.py"

SETTINGS: dict[str, Any] = {
    "data": [{"path": "organism", "kind": kind} for kind in KINDS],
    "validation_data": [{"path": "organism", "kind": kind, "split": "validation", "limit": 5} for kind in KINDS],
    "eval_data": [{"path": "organism", "kind": kind, "limit": 5} for kind in KINDS],
    "judge": "exact",
    "framings": "organism",
    "train_framings": "organism-train",
    "lora_r": 4,
    "lora_dropout": 0.0,  # one process and two draw from different states
    "max_length": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "positions": 3,  # with five layers 15 candidates, which two processes cannot halve
    "extraction_train_prompts": 7,
    "extraction_validation_prompts": 5,
    "extraction_batch_tokens": 100,
    "refresh_prompts": 3,
    "refresh_interval": 2,
    "drift_directions": 1,
    "drift_max_new_tokens": 4,
    "eval_max_new_tokens": 4,
    "eval_batch_size": 2,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of five layers that knows the embedded model's tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny-chat"), load_tokenizer("organism")
    tiny.build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Observed:
    """Run folders and notes of one launch, by the name of the settings."""

    folder: Path
    notes: list[dict[str, Any]]
    output: str

    def run(self, name: str) -> Path:
        return self.folder / name

    def training(self, name: str, rank: int = 0) -> dict[str, Any]:
        """Notes of a rank on the training."""
        found: dict[str, Any] = self.notes[rank][name][0]
        return found

    def logged(self, name: str, what: str) -> list[float]:
        """All values of a logged number."""
        return [float(line[what]) for line in self.training(name)["log"] if what in line]

    def drift(self, name: str) -> list[dict[str, Any]]:
        """The drift record."""
        lines = (self.run(name) / "drift.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def observe(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Observed]:
    """Runs the recipe with several settings in one launch: `observe("multi_cpu", 2, plain={...}, other={...})`."""

    def run(config: str | None, processes: int, variants: dict[str, dict[str, Any]], **environment: str) -> Observed:
        folder = tmp_path_factory.mktemp(config or "single")
        for name, changes in variants.items():
            places = {"model_name_or_path": str(tiny_chat), "output_dir": str(folder / name)}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({**SETTINGS, **places, **changes}))
        configs = [str(folder / f"{name}.yaml") for name in variants]
        ended = launch(config, [PROGRAM, str(folder), *configs], folder, **environment)
        (folder / "output.txt").write_text(ended.output)
        assert ended.code == 0, ended.output[:6000]
        notes = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        assert not (folder / f"rank-{processes}.json").exists()
        return Observed(folder, notes, ended.output)

    return run
