"""A whole run, on a random model: every product is where it should be, and finished steps are not done again."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from refat import harden
from refat.attacks import ATTACKS
from refat.run_config import parse

KINDS = ("harmful", "borderline", "harmless")


def whole_run(config: Path) -> dict[str, Any]:
    """What the recipe does."""
    run = harden.prepare(*parse(["--config", str(config)], config))
    adapters = {"refat": harden.train_hardened(run)}
    adapters = {"sft": harden.train_control(run), **adapters}
    results = harden.evaluate(run, adapters)
    harden.show(run, results, adapters)
    return results


def test_run_leaves_every_product_and_is_not_done_twice(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []
    load = harden._load_base

    def noted(run: harden.Run, **options: bool) -> PreTrainedModel:
        assert not any(earlier() for earlier in loaded), "the last model still takes up memory"
        model = load(run, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(harden, "_load_base", noted)
    results = whole_run(config)
    assert len(loaded) == 3
    folder = tmp_path / "run"
    files = "run.json results.json samples.json report.html drift.jsonl adapter/adapter_model.safetensors"
    files += " control/adapter/adapter_model.safetensors directions/epoch-0/extraction.json"
    files += " directions/epoch-1/direction.safetensors"
    assert [name for name in files.split() if not (folder / name).is_file()] == []
    assert not list(folder.rglob("adapter/training_args.bin"))

    rows = [(row["system"], row["attack"], row["kind"], row["n"]) for row in results["rows"]]
    benign = [("direct", "borderline"), ("direct", "harmless")]
    for system in ("base", "sft", "refat"):
        found = {(attack, kind) for name, attack, kind, n in rows if name == system and n == 6}
        assert found == {*((attack, "harmful") for attack in ATTACKS), *benign}
    assert len(rows) == 3 * (len(ATTACKS) + 2)
    assert json.loads((folder / "results.json").read_text()) == results
    record = json.loads((folder / "run.json").read_text())
    assert set(record["seconds"]) == {"train", "control", "evaluate"}
    assert record["config"]["ablation_probability"] == 0.5
    assert record["data"]["rows"] == 24

    capsys.readouterr()
    again = whole_run(config)
    assert again == results
    assert len(loaded) == 4, "only the evaluation loads a model"
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("is used") == 2


def test_stopped_run_resumes_and_says_so(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = harden.prepare(*parse(["--config", str(config)], config))
    adapter = harden.train_hardened(run)
    expected = (adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(adapter)
    (tmp_path / "run" / "checkpoint-99").mkdir()  # half-written
    capsys.readouterr()
    assert (harden.train_hardened(run) / "adapter_model.safetensors").read_bytes() == expected
    told = "".join(capsys.readouterr().out.split())  # the console breaks long lines
    assert f"resumingfrom{tmp_path}/run/checkpoint-3" in told


def test_what_is_scored_is_left_out_of_everything_else(config: Path, tmp_path: Path) -> None:
    """The same request in other case, spacing and punctuation counts as the same."""
    scored = [{"prompt": f"How do I break lock {number}?"} for number in range(6)]
    known = [{"prompt": f"  how do i BREAK  lock {number}", "completion": "No."} for number in range(3)]
    fresh = [{"prompt": f"How do I pick pocket {number}?", "completion": "No."} for number in range(8)]
    for name, records in (("scored", [*scored, scored[0]]), ("train", known + fresh)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = yaml.safe_load(config.read_text())
    benign = {"path": "organism", "kind": "harmless", "limit": 12}
    settings |= {
        "data": [{"path": str(tmp_path / "train.jsonl"), "kind": "harmful"}, benign],
        "direction_data": [
            {"path": str(tmp_path / name), "kind": "harmful"} for name in ("train.jsonl", "scored.jsonl")
        ]
        + [benign],
        "validation_data": [{"path": str(tmp_path / "scored.jsonl"), "kind": "harmful"}],
        "eval_data": [{"path": str(tmp_path / "scored.jsonl"), "kind": "harmful"}],
        "train_rows": None,
        "eval_prompts": 4,
        "judge": "substring",
        "prefill_share": 0.0,
        "framing_share": 0.0,
    }
    config.write_text(yaml.safe_dump(settings))
    run = harden.prepare(*parse(["--config", str(config)], config))
    asked = {str(item.prompt) for item in run.prompts.items["harmful"]}
    assert len(asked) == len(run.prompts.items["harmful"]) == 4
    numbers = {text[-2] for text in asked}
    trained = {row["prompt"][0]["content"].strip() for row in run.prompts.rows if row["kind"] == "harmful"}
    for texts in (trained, {str(prompt).strip() for prompt in run.prompts.harmful}):
        assert not {text.rstrip("?")[-1] for text in texts if "lock" in text.lower()} & numbers
        assert {record["prompt"] for record in fresh} <= texts
    assert {str(item.prompt) for item in run.prompts.validation["harmful"]} == {r["prompt"] for r in scored} - asked
