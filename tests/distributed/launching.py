"""Start programs as users do, with a time limit that fails the test and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 240.0


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    output: str
    seconds: float


def command(config: str | None, program: Sequence[str]) -> list[str]:
    """`program` under `accelerate launch` with a file, by its name in `accelerate_configs/` or its path, or alone."""
    if config is None:
        return [sys.executable, *program]
    path = config if config.endswith(".yaml") else f"accelerate_configs/{config}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*launcher, "--config_file", path, *program]


def start(config: str | None, program: Sequence[str], scratch: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `program` in the project's folder and in a process group of its own."""
    quiet = {"HF_HUB_OFFLINE": "1", "CI": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    places = {"TORCH_EXTENSIONS_DIR": str(scratch / "extensions"), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "ACCELERATE_", "FSDP_", "WANDB_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return subprocess.Popen(
        command(config, program),
        cwd=ROOT,
        env={**inherited, **quiet, **places, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], limit: float = LIMIT) -> Ended:
    """Wait, and kill the whole group when the time is up."""
    started = time.monotonic()
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {limit} s:\n{output[-4000:]}") from None
    return Ended(process.returncode, output, time.monotonic() - started)


def launch(config: str | None, program: Sequence[str], scratch: Path, **environment: str) -> Ended:
    """Start and wait."""
    return finish(start(config, program, scratch, **environment))
