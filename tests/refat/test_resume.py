"""One seed, one result: two runs are the same, and a stopped run goes on as if it had never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from refat.checkpoints import UNFINISHED, last_complete_checkpoint
from refat.drift import DriftTracker
from refat.evaluate import Answering
from refat.judges import ExactJudge
from refat.trainer import STATE_FILE, RefatTrainer
from tests.refat.training import (
    HARMFUL,
    HARMLESS,
    adapter_of,
    lora_config,
    same,
    train,
)

TrainerOf = Callable[..., RefatTrainer]


def tracked(trainer: RefatTrainer, folder: Path) -> RefatTrainer:
    """`trainer` with a drift tracker that writes into `folder`."""
    answering = Answering(trainer.processing_class, ExactJudge(), 4, 16)
    DriftTracker(folder, trainer.refat_args, HARMFUL, HARMLESS, {}, answering).attach(trainer)
    return trainer


class SaveAt(TrainerCallback):
    """Checkpoints after these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize("adversary", ["cosmic", "layerwise", "static"])
def test_stopped_run_goes_on_as_if_never_stopped(adversary: str, trainer_of: TrainerOf, tmp_path: Path) -> None:
    """Two epochs of four steps; checkpoints within an epoch, at its end (before its drift record), and once more."""
    options: dict[str, Any] = {
        "adversary": adversary,
        "num_train_epochs": 2,
        "refresh_interval": 3,
        "save_total_limit": None,
    }

    def build(folder: Path) -> RefatTrainer:
        trainer = trainer_of(folder=folder, lora=lora_config(lora_dropout=0.2), **options)
        return tracked(trainer, folder)

    whole = build(tmp_path / "whole")
    whole.add_callback(SaveAt(2, 4, 7))
    expected = train(whole)
    repeated = build(tmp_path / "repeated")
    assert torch.equal(torch.stack(train(repeated).losses), torch.stack(expected.losses))
    assert same(adapter_of(repeated), adapter_of(whole))

    history = (tmp_path / "whole" / "drift.jsonl").read_text()
    assert [line.split('"step": ')[1].split(",")[0] for line in history.splitlines()] == ["0", "4", "8"]
    for step, recorded in ((2, True), (4, True), (4, False), (7, True)):
        folder = tmp_path / f"from-{step}-{recorded}"
        shutil.copytree(tmp_path / "whole", folder)
        if not recorded:  # stopped between the checkpoint and the record of the epoch that ended with it
            (folder / "drift.jsonl").write_text(history.splitlines(keepends=True)[0])
        resumed = build(folder)
        found = train(resumed, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert len(found.losses) == 8 - step
        assert torch.equal(torch.stack(found.losses), torch.stack(expected.losses[step:])), step
        assert same(adapter_of(resumed), adapter_of(whole))
        assert same(resumed.adversary.state(), whole.adversary.state())
        assert (folder / "drift.jsonl").read_text() == history


def test_run_stopped_after_its_last_step_ends_the_same(trainer_of: TrainerOf, tmp_path: Path) -> None:
    whole = tracked(trainer_of(save_strategy="epoch"), tmp_path / "run")
    train(whole)
    history = (tmp_path / "run" / "drift.jsonl").read_text()
    resumed = tracked(trainer_of(save_strategy="epoch"), tmp_path / "run")
    assert train(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")).losses == []
    assert same(adapter_of(resumed), adapter_of(whole))
    assert (tmp_path / "run" / "drift.jsonl").read_text() == history


@pytest.mark.parametrize("place", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_checkpoint_cut_short_is_never_seen(
    place: str, trainer_of: TrainerOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part is missing, the checkpoint before it is the last; the next one tidies up."""
    options: dict[str, Any] = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(**options)
    save = getattr(trainer, place)

    def broken(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(trainer, place, broken)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {"checkpoint-1", UNFINISHED}
    assert (folder / UNFINISHED / "checkpoint-2" / STATE_FILE).is_file()
    assert (folder / "checkpoint-1" / STATE_FILE).is_file()
    train(trainer_of(**options), resume_from_checkpoint=str(last_complete_checkpoint(folder)))
    assert {path.name for path in folder.iterdir()} == {"checkpoint-3", "checkpoint-4"}


def test_the_control_sees_the_same_rows_in_the_same_order(trainer_of: TrainerOf) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for adversary in ("cosmic", "none"):
        trainer = trainer_of(adversary=adversary, num_train_epochs=2)
        step = trainer.training_step

        def keep(
            model: nn.Module,
            batch: dict[str, Any],
            *args: Any,
            name: str = adversary,
            step: Any = step,
            **kwargs: Any,
        ) -> torch.Tensor:
            seen.setdefault(name, []).append(batch["input_ids"].clone())
            return step(model, batch, *args, **kwargs)

        trainer.training_step = keep  # type: ignore[method-assign]
        train(trainer)
    assert len(seen["none"]) == 8
    assert all(torch.equal(*pair) for pair in zip(seen["cosmic"], seen["none"], strict=True))
