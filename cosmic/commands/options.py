"""Arguments and options that several commands have in common, and checks of them that load nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cosmic.errors import InputError

Model = Annotated[str, typer.Argument(help="Hub id, folder, adapter folder, or a name such as `organism`.")]
Harmful = Annotated[
    Path, typer.Option(help="Prompts to be refused: .txt, .csv, .tsv, .jsonl, .json or .parquet.", show_default=False)
]
Harmless = Annotated[Path, typer.Option(help="Prompts to be answered, likewise.", show_default=False)]
Column = Annotated[str | None, typer.Option(help="Column of the prompts, if it is not recognised.")]
Revision = Annotated[str | None, typer.Option(help="The model's commit, tag or branch.")]
Seed = Annotated[int, typer.Option(help="Draws the split of the prompts.")]
Judge = Annotated[str, typer.Option(help="Who reads replies: `substring`, or `exact` for the embedded model.")]
TrainPrompts = Annotated[int, typer.Option(help="Prompts per class that make the candidates.")]
ValidationPrompts = Annotated[int, typer.Option(help="Prompts per class that score them.")]
BatchTokens = Annotated[int | None, typer.Option(help="Most tokens per forward pass; what memory allows.")]
Ablated = Annotated[
    Path | None,
    typer.Option(help="Folder of a direction that is deleted (ACE) throughout: a weakly aligned model to study."),
]


def console() -> Console:
    """Where results are printed."""
    return Console(highlight=False)


def progress_bar() -> Progress:
    """A bar on standard error with the share of the work that is done and an estimate of what remains."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def check_output(output: Path, own: str) -> None:
    """Refuse a folder that holds something else than an earlier result, which has a file `own`."""
    if output.exists() and not output.is_dir():
        raise InputError(f"`--output` `{output}` is a file; expected a folder. Choose another name.")
    if output.exists() and any(output.iterdir()) and not (output / own).is_file():
        raise InputError(f"`--output` `{output}` is not empty and holds no `{own}`. Choose another folder.")
