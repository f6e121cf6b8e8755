"""However a run is stopped, it says once what is left and ends with the code that shells expect."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosmic.storage import write_tensors
from refat.stopping import one_line_when_stopped


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def checkpoint(folder: Path) -> None:
    write_tensors(folder / "checkpoint-7" / "adapter_model.safetensors", {"a": torch.ones(1)})
    (folder / "checkpoint-7" / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize(
    ("stop", "code", "said"), [(interrupt, 130, "stopped; "), (terminate, 143, "error: told to end, ")]
)
def test_a_stopped_run_says_where_it_goes_on_from(
    stop: Callable[[], None], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stopped() -> str:
        with pytest.raises(SystemExit) as ended, one_line_when_stopped(tmp_path):
            stop()
        assert ended.value.code == code
        assert signal.getsignal(signal.SIGTERM) is before
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(said)
        return lines[0]

    assert f"no checkpoint had been written yet to `{tmp_path}`" in stopped()
    checkpoint(tmp_path)
    assert (
        f"the last complete checkpoint is `{tmp_path}/checkpoint-7`. The same command goes on from there." in stopped()
    )
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert f"the finished adapter is `{tmp_path}/adapter`" in stopped()
    checkpoint(tmp_path / "control")
    assert f"the control's last complete checkpoint is `{tmp_path}/control/checkpoint-7`" in stopped()


def test_only_one_process_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit), one_line_when_stopped(tmp_path):
        interrupt()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), one_line_when_stopped(tmp_path):
        interrupt()
    assert capsys.readouterr().err.count("stopped; ") == 1


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), one_line_when_stopped(tmp_path):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="Connection closed"), one_line_when_stopped(tmp_path):
        raise RuntimeError("Connection closed by peer")  # there is no other process here
