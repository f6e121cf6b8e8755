"""How a run ends before its end: one line from one process, with where the same command goes on from."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch import distributed

from refat.checkpoints import is_trained, last_complete_checkpoint
from refat.console import is_main_process

SAID = ".stopped"
BY_SIGNAL = 128


class Terminated(BaseException):
    """The process was told to end, by a launcher that lost another process or by a scheduler."""


@contextlib.contextmanager
def one_line_when_stopped(folder: Path) -> Iterator[None]:
    """Say what is left in the run's folder if the block is stopped: by Ctrl-C, by a signal, or by another process's death.

    Raises:
        SystemExit: it was; with 130 after Ctrl-C, 143 after a signal, 1 if another process was lost.
    """
    if is_main_process():
        (folder / SAID).unlink(missing_ok=True)
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        _say(folder, "stopped")
        raise SystemExit(BY_SIGNAL + signal.SIGINT) from None
    except Terminated:
        _say(folder, "error: told to end, perhaps because another process of this launch died")
        raise SystemExit(BY_SIGNAL + signal.SIGTERM) from None
    except Exception as error:
        if not _is_loss_of_another(error):
            raise
        _say(folder, "error: another process of this launch died or stopped answering")
        raise SystemExit(1) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
    raise Terminated


def _is_loss_of_another(error: Exception) -> bool:
    """Whether a collective failed because of its other end."""
    text = str(error)
    broken = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "gloo/transport",
        "Timed out waiting",
    )
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and distributed.is_initialized() and any(part in text for part in broken)
    )


def _say(folder: Path, what: str) -> None:
    """Print the line, unless another process of this launch already has."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder / SAID, os.O_CREAT | os.O_EXCL))
        print(f"\n{what}; {_left_in(folder)}. The same command goes on from there.", file=sys.stderr, flush=True)


def _left_in(folder: Path) -> str:
    for part, name in ((folder / "control", "the control's "), (folder, "the ")):
        if is_trained(part):
            return f"{name}finished adapter is `{part / 'adapter'}`"
        checkpoint = last_complete_checkpoint(part)
        if checkpoint:
            return f"{name}last complete checkpoint is `{checkpoint}`"
    return f"no checkpoint had been written yet to `{folder}`"
