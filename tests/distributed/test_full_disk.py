"""What cannot be written ends the run with one line and leaves no half-written file under a final name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refat.checkpoints import last_complete_checkpoint
from tests.distributed.launching import launch
from tests.distributed.test_crashes import Case

LIMITED = (
    "import resource, runpy, sys; size = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); "
)
LIMITED += "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs a program that cannot write a file beyond so many bytes: to it, the disk is full there."""


@pytest.mark.parametrize("size", [30_000, 60_000], ids=["adapter", "optimizer"])
def test_checkpoint_that_does_not_fit(size: int, tiny_chat: Path, tmp_path: Path) -> None:
    case = Case(None, tiny_chat, tmp_path)
    ended = launch(None, ["-c", LIMITED, str(size), *case.program], tmp_path, WANDB_MODE="disabled")
    assert ended.code == 2, ended.output[-3000:]
    assert "Traceback" not in ended.output
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: cannot write `{case.run}/checkpoint-1`: ")
    assert errors[0].endswith("free some space.")
    assert last_complete_checkpoint(case.run) is None
    assert not list(case.run.glob("checkpoint-*"))
    assert json.loads((case.run / "run.json").read_text())["seconds"] == {}
