"""What a run tells the person who started it: lines and bars on the main process, nothing on the others."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cosmic.errors import InputError

TIME_TO_SAY_IT = 5.0


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def console() -> Console:
    """The console for people; silent on all processes but the main one."""
    return Console(quiet=not is_main_process(), highlight=False)


def quiet_other_processes() -> None:
    """No progress bars of libraries but on the main process."""
    if not is_main_process():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def progress_bar(total: int, what: str) -> Iterator[Progress]:
    """A bar of `total` steps; its first task is the whole."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        progress.add_task(what, total=total)
        yield progress


@contextlib.contextmanager
def input_errors_as_one_line() -> Iterator[None]:
    """A user's mistake ends the program with one line and exit code 2; anything else keeps its traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels for CPUs whenever PEFT imports it
    try:
        yield
    except InputError as error:
        if is_main_process():
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
        else:
            time.sleep(TIME_TO_SAY_IT)  # the launcher ends all processes when the first has ended
        raise SystemExit(2) from None
