"""Checkpoints that are whole or absent: written in a folder of their own and renamed when every process is done."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cosmic.errors import InputError
from cosmic.storage import cannot_write, read_json, write_json
from refat.launch import Launch

UNFINISHED = ".unfinished"
LAUNCH_FILE = "launch.json"


@contextlib.contextmanager
def writing_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk or an unwritable folder raises, which differs from writer to writer, into `InputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    except RuntimeError as error:  # torch.save's
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise cannot_write(folder, OSError(0, "file write failed")) from error
        raise


def clear_unfinished(folder: Path) -> None:
    """Delete what a stopped run had begun to write."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def finish(folder: Path, name: str, launch: Launch) -> Path:
    """Move the checkpoint `name`, now whole, from `folder/.unfinished` to `folder`, and note the launch that wrote it."""
    written, final = folder / UNFINISHED / name, folder / name
    write_json(written / LAUNCH_FILE, asdict(launch))
    if final.exists():
        final.replace(folder / UNFINISHED / f"old-{name}")
    written.replace(final)
    clear_unfinished(folder)
    return final


def is_trained(folder: Path) -> bool:
    """Whether the training in `folder` has ended: its adapter is renamed into place when it is whole."""
    return (folder / "adapter" / "adapter_config.json").is_file()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are passed over."""
    numbered = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    newest_first = sorted((int(match[1]), path) for path, match in numbered.items() if match)[::-1]
    return next((path for _, path in newest_first if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether the last file written is there and can be read, and the adapter with it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", "pt"):
            return True
    except (OSError, SafetensorError, ValueError):
        return False


def require_resumable(checkpoint: Path, launch: Launch) -> None:
    """Refuse to go on with other processes than those that wrote the checkpoint.

    With other processes the batches, and with ZeRO and FSDP the files of the optimizer, would not be those of the run.

    Raises:
        InputError: number of processes or strategy differ.
    """
    path = checkpoint / LAUNCH_FILE
    before = Launch(**read_json(path)) if path.is_file() else launch
    if before != launch:
        raise InputError(
            f"`{checkpoint}` was written by {before}; this launch is {launch}. Launch as before, or choose another "
            "`--output_dir`."
        )
