"""Launch files with which Accelerate would train otherwise than asked, as a user meets them."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.launching import ROOT, launch


def test_launch_that_would_start_one_process_instead_of_two(tmp_path: Path) -> None:
    text = (ROOT / "accelerate_configs" / "multi_cpu.yaml").read_text()
    (tmp_path / "launch.yaml").write_text(text.replace("type: MULTI_GPU", "type: MULTI_CPU"))
    program = ["recipes/refat_llama.py", "--output_dir", str(tmp_path / "run")]
    ended = launch(str(tmp_path / "launch.yaml"), program, tmp_path)
    assert ended.code != 0
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the launch asked for several processes, but Accelerate started one" in errors[0]
    assert not (tmp_path / "run").exists()
