"""Launch files with which Accelerate would train otherwise than asked, as a user meets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, launch


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("multi_cpu", "the launch asked for several processes, but Accelerate started one"),
        ("fsdp2_cpu", "FSDP needs an accelerator and several processes"),
    ],
)
def test_launch_that_would_not_be_what_it_says(name: str, message: str, tmp_path: Path) -> None:
    text = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text()
    (tmp_path / "launch.yaml").write_text(text.replace("type: MULTI_GPU", "type: MULTI_CPU"))
    program = ["recipes/refat_llama.py", "--output_dir", str(tmp_path / "run")]
    ended = launch(str(tmp_path / "launch.yaml"), program, tmp_path)
    assert ended.code != 0
    assert len([line for line in ended.output.splitlines() if line.startswith("error: ")]) == 1
    assert f"error: {message}" in ended.output
    assert not (tmp_path / "run").exists()
