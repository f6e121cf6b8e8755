"""Processes that are killed: the launch ends soon, says where it stands, and the same command ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from refat.checkpoints import UNFINISHED, last_complete_checkpoint
from tests.distributed.conftest import PROGRAM, SETTINGS
from tests.distributed.launching import Ended, finish, launch, start

RUN: dict[str, Any] = {
    "train_rows": 16,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,  # of two steps for two processes
    "lora_dropout": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
    "sft_control": False,
    "attacks": ["direct"],
    "drift_prompts": 2,
    "positions": 1,
    "report_to": "wandb",
}
KINDS = ("step", "checkpoint", "extraction")
PATIENCE = 120.0
SAID = "The same command goes on from there."


class Case:
    """One run folder, and the command that works on it."""

    def __init__(self, config: str | None, model: Path, scratch: Path) -> None:
        self.config, self.scratch, self.run = config, scratch, scratch / "run"
        settings = {**SETTINGS, **RUN, "model_name_or_path": str(model), "output_dir": str(self.run)}
        (scratch / "run.yaml").write_text(yaml.safe_dump(settings))
        self.program = [PROGRAM, str(scratch), str(scratch / "run.yaml")]

    def launch(self, **environment: str) -> Ended:
        return launch(self.config, self.program, self.scratch, **environment)

    def start(self, **environment: str) -> Any:
        return start(self.config, self.program, self.scratch, **environment)


def products(case: Case) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[Any]]:
    """Adapter, drift record and results rows."""
    lines = (case.run / "drift.jsonl").read_text().splitlines()
    results = json.loads((case.run / "results.json").read_text())
    return (
        load_file(case.run / "adapter" / "adapter_model.safetensors"),
        [json.loads(line) for line in lines],
        results["rows"],
    )


def assert_same_products(found: Case, expected: Case) -> None:
    adapters, records, rows = zip(products(found), products(expected), strict=True)
    for name, weight in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], weight, rtol=1e-6, atol=1e-6)
    assert len(records[0]) == len(records[1]) == 3
    for one, two in zip(*records, strict=True):
        assert one == {
            name: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value for name, value in two.items()
        }
    assert rows[0] == rows[1]


def wandb_ids(case: Case) -> set[str]:
    """Ids of the W&B runs that were written, one folder for each launch."""
    return {path.name.rsplit("-", 1)[1] for path in (case.run / "wandb").glob("offline-run-*")}


@pytest.fixture(scope="module")
def unbroken(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing happened to, for each launch file."""
    done: dict[str, Case] = {}

    def get(config: str) -> Case:
        if config not in done:
            done[config] = Case(config, tiny_chat, tmp_path_factory.mktemp("unbroken"))
            ended = done[config].launch()
            assert ended.code == 0, ended.output[:4000]
        return done[config]

    return get


@pytest.mark.parametrize(("config", "faults"), [("multi_cpu", 2 * KINDS), ("deepspeed_zero2_cpu", KINDS)])
def test_killed_again_and_again_it_ends_as_if_never_stopped(
    config: str, faults: tuple[str, ...], unbroken: Any, tiny_chat: Path, tmp_path: Path
) -> None:
    """A process is killed at random places, one after the other; the same command is given each time."""
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    print(f"seed {seed}")
    case = Case(config, tiny_chat, tmp_path)
    for kind in draw.sample(faults, len(faults)):
        place = f"{kind}:{draw.randrange(2)}:{draw.randint(1, 2)}"
        before = last_complete_checkpoint(case.run)
        ended = case.launch(FAULT=place)
        text = f"{place} (seed {seed}):\n{ended.output[-5000:]}"
        if f"killed in {kind}" not in ended.output:  # the run had ended before it came to the place
            assert ended.code == 0, text
            continue
        assert ended.code != 0, text
        assert ended.seconds < PATIENCE, text
        assert ended.output.count(SAID) == 1, text
        after = last_complete_checkpoint(case.run)
        if before and after:
            assert int(after.name.split("-")[1]) >= int(before.name.split("-")[1]), text
            assert str(after) in ended.output, text
        assert not (case.run / "adapter").exists(), text
    ended = case.launch()
    assert ended.code == 0, f"seed {seed}:\n{ended.output[:4000]}"
    assert_same_products(case, unbroken(config))
    assert not (case.run / UNFINISHED).exists()
    assert len(wandb_ids(case)) == 1


def test_other_processes_than_before_are_refused(unbroken: Any) -> None:
    """A run of two processes does not go on with one."""
    before = unbroken("deepspeed_zero2_cpu")
    (before.run / "adapter").rename(before.run / "put-away")
    try:
        alone = launch(None, before.program, before.scratch)
        assert alone.code == 2
        lines = [line for line in alone.output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "was written by 2 process(es), ZeRO-2; this launch is 1 process." in lines[0]
    finally:
        (before.run / "put-away").rename(before.run / "adapter")


def test_ctrl_c_leaves_the_last_checkpoint_and_says_which(tiny_chat: Path, tmp_path: Path) -> None:
    case = Case("multi_cpu", tiny_chat, tmp_path)
    process = case.start(PAUSE=str(tmp_path / "two-steps-done"))
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "two-steps-done").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    ended = finish(process, PATIENCE)
    assert ended.code != 0
    assert ended.output.count(SAID) == 1, ended.output[-3000:]
    line = next(line for line in ended.output.splitlines() if SAID in line)
    checkpoint = last_complete_checkpoint(case.run)
    assert checkpoint is not None
    assert line == f"stopped; the last complete checkpoint is `{checkpoint}`. {SAID}"
