"""`cosmic explain`: why a saved extraction chose what it chose."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cosmic.commands.options import console
from cosmic.errors import InputError

if TYPE_CHECKING:
    from cosmic.studies.explanation import Candidate, Explanation


def explain(
    folder: Annotated[
        Path, typer.Argument(help="Folder that `cosmic extract` wrote, or `directions/epoch-N` of a run.")
    ],
    most: Annotated[int, typer.Option(help="How many of the best candidates to show.")] = 10,
) -> None:
    """Say why the direction in FOLDER was chosen and what dropped the others."""
    if most < 1:
        raise InputError(f"`most` is {most}; expected at least 1.")
    if not (folder / "extraction.json").is_file():
        raise InputError(
            f"`{folder}` holds no `extraction.json`; expected a folder that `cosmic extract --output` wrote, or one of "
            "`directions/epoch-N` in a run. Give that."
        )
    from cosmic.extraction import Extraction
    from cosmic.studies.explanation import decision, summary
    from cosmic.studies.explanation import explain as explained

    found, screen = explained(Extraction.load(folder)), console()
    screen.print(summary(found), markup=False)
    screen.print(decision(found), markup=False)
    screen.print(losses_table(found))
    screen.print(candidates_table(found, most))


def losses_table(found: Explanation) -> Table:
    """How many candidates each filter dropped, passed, or were not looked at further."""
    table = Table(title=f"{found.total} candidates, each at the first filter it fails", title_justify="left")
    for name in ("", "candidates", "above winner", "filter"):
        table.add_column(name, justify="right" if name in ("candidates", "above winner") else "left")
    for loss in found.losses:
        unscored = f"; {loss.unscored} without a score" if loss.unscored else ""
        if unscored and loss.filter == "last layers":
            unscored += ", which was not needed"
        table.add_row(f"dropped: {loss.filter}", str(loss.count), str(loss.above), escape(loss.note + unscored))
    table.add_section()
    table.add_row("passed", str(found.passed), "0", "all filters")
    table.add_row("below", str(found.below), "0", "scored below those that passed; KL not measured")
    return table


def candidates_table(found: Explanation, most: int = 10) -> Table:
    """The best candidates by score with their verdicts; winner and runner-up always."""
    names = {"bypass": "bypass", "induce": "induce"}
    if found.config.method == "cosmic":
        names = {"comply": "S_comply", "refuse": "S_refuse", "final": "score"}
    table = Table(title=f"best of {len(found.candidates)} candidates with a score", title_justify="left")
    for name in ("rank", "layer", "position"):
        table.add_column(name, justify="right")
    table.add_column("token")
    for name in (*names.values(), "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    shown = found.candidates[:most]
    for later in sorted(_essential(found), key=lambda one: one.rank):
        if later not in shown:
            shown.append(later)
    for one, following in zip(shown, [*shown[1:], None], strict=True):
        table.add_row(
            *(str(value) for value in (one.rank, one.layer, one.position)),
            escape(repr(one.token)),
            *(f"{one.scores[name]:.3f}" for name in names),
            "not needed" if math.isnan(one.scores["kl"]) else f"{one.scores['kl']:.3f}",
            escape(one.verdict),
            end_section=following is not None and following.rank != one.rank + 1,
            style="bold" if one.status == "chosen" else None,
        )
    return table


def _essential(found: Explanation) -> list[Candidate]:
    return [found.winner] + ([found.runner_up] if found.runner_up else [])
