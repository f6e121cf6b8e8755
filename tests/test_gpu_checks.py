"""The program with the checks that need a GPU works, at tiny sizes and wherever the tests run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

PROGRAM = Path(__file__).parents[1] / "scripts" / "gpu_checks.py"
SAID = "no GPU here: tiny sizes on the CPU; nothing below is a GPU result"
GRADIENTS = {f"{attention}, {dtype}" for attention in ("sdpa", "eager") for dtype in ("float32", "bfloat16")}


def test_tiny_checks_pass_and_say_where_they_ran(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), "--tiny", "--json", str(tmp_path / "found.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CI": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    gpu = torch.cuda.is_available()
    assert (SAID in ended.stdout.splitlines()) == (not gpu)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["tiny"]
    assert found["gpu"] == gpu
    outcomes: dict[str, set[bool | None]] = {}
    for check in found["checks"]:
        outcomes.setdefault(check["check"], set()).add(check["passed"])
    made = {name for name, passed in outcomes.items() if True in passed}
    assert {name for name, passed in outcomes.items() if False in passed} == set()
    assert made >= {*GRADIENTS, "4 bits", "cost, none", "cost, cosmic"}
    skipped = {check["check"] for check in found["checks"] if str(check["result"]).startswith("skipped")}
    if not gpu:
        assert skipped == {"flash_attention_2, float32", "flash_attention_2, bfloat16", "cost, none", "cost, cosmic"}
