"""`run.json`: what a run folder holds, who may go on in it, and how long each step took."""

from __future__ import annotations

import datetime
import itertools
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from cosmic.errors import InputError
from cosmic.storage import read_json, write_json
from refat.console import is_main_process
from refat.launch import Launch
from refat.run_config import WHERE_NOT_WHAT, settings_digest

FILE = "run.json"


def claim(
    folder: Path, settings: Mapping[str, Any], rows_fingerprint: str, counts: Mapping[str, Any], launch: Launch
) -> dict[str, Any]:
    """Write `run.json`, unless the folder belongs to a run with other settings; the record, the same on all processes.

    Args:
        settings: the resolved settings.
        rows_fingerprint: of the training rows.
        counts: numbers of rows and prompts, for the record.

    Raises:
        InputError: the folder holds something else, or is not the same folder on all machines.
    """
    answer: list[Any] = [None]
    if is_main_process():
        try:
            answer = [_claim(folder, dict(settings), rows_fingerprint, counts, launch)]
        except InputError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], InputError):
        raise answer[0]
    record: dict[str, Any] = answer[0]
    if not (folder / FILE).is_file() or read_json(folder / FILE).get("id") != record.get("id"):
        raise InputError(f"`output_dir` `{folder}` is not shared by all machines. Choose a folder on a shared disk.")
    return record


def _claim(
    folder: Path, settings: dict[str, Any], rows_fingerprint: str, counts: Mapping[str, Any], launch: Launch
) -> dict[str, Any]:
    path = folder / FILE
    digest = settings_digest({**settings, "rows": rows_fingerprint})
    if path.is_file():
        known = read_json(path)
        if not isinstance(known, dict) or not isinstance(known.get("config"), dict):
            raise InputError(f"`{path}` is no record of a run of ours. Choose another `--output_dir`.")
        if known.get("fingerprint") != digest:
            before = known["config"]
            deciding = [name for name in settings if name not in WHERE_NOT_WHAT]
            differing = sorted(name for name in deciding if settings[name] != before.get(name))
            raise InputError(
                f"`output_dir` `{folder}` holds another run; its settings differ in {differing or ['the data']}. "
                "Choose another `--output_dir`, or delete the folder."
            )
        return known
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"`output_dir` `{folder}` is not empty and holds no run of ours. Choose another `--output_dir`."
        )
    packages = ("refat", "torch", "transformers", "trl", "peft", "accelerate")
    record = {
        "schema": 1,
        "id": uuid.uuid4().hex[:12],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(sys.argv),
        "launch": str(launch),
        "fingerprint": digest,
        "config": settings,
        "data": {"rows": counts["rows"], "sha256": rows_fingerprint},
        "evaluation": counts["evaluation"],
        "versions": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
        "seconds": {},
    }
    write_json(path, record)
    return record


def note_seconds(folder: Path, step: str, seconds: float) -> None:
    """Add the time that a step took, over all resumes."""
    if is_main_process():
        record = read_json(folder / FILE)
        known = record["seconds"]
        write_json(folder / FILE, {**record, "seconds": {**known, step: round(known.get(step, 0.0) + seconds, 1)}})


def _command(arguments: Sequence[str]) -> str:
    """The command line without secrets."""
    words = ["accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"]
    for before, word in itertools.pairwise(["", *arguments]):
        if re.fullmatch(r"--\w+[-_]token", before):
            word = "..."
        words.append(re.sub(r"^(--\w+[-_]token=).*", r"\1...", word, flags=re.DOTALL))
    return " ".join(words)


def _git_commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None
