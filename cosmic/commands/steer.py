"""`cosmic steer`: refusal of a model against the strength of an edit along a direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cosmic.commands import options
from cosmic.commands.options import check_output, console, progress_bar
from cosmic.errors import InputError

if TYPE_CHECKING:
    from cosmic.prompts import Prompt
    from cosmic.studies.steering import SteeringPoint, Sweep


def steer(
    model: options.Model,
    direction: Annotated[Path, typer.Option(help="Folder that `cosmic extract` wrote.", show_default=False)],
    harmful: options.Harmful,
    harmless: options.Harmless,
    output: Annotated[Path, typer.Option(help="Folder for steering.json and steering.png.", show_default=False)],
    alpha: Annotated[str, typer.Option(help="Strengths: start:stop:step or a list such as 1,2,3.")] = "0:4:0.5",
    edit: Annotated[str, typer.Option(help="`affine` (ACE; 0 ablates, 1 adds) or `linear` (x + αr).")] = "affine",
    judge: options.Judge = "substring",
    ablated: options.Ablated = None,
    prompts: Annotated[int, typer.Option(help="Most prompts per class.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 64,
    column: options.Column = None,
    revision: options.Revision = None,
    seed: options.Seed = 0,
) -> None:
    """Steer MODEL along a direction at several strengths and count refusals."""
    from cosmic.direction import Direction
    from cosmic.judging import find_judge
    from cosmic.loading import check_model, load_model, load_tokenizer
    from cosmic.prompt_files import read_prompts
    from cosmic.studies.curves import write_steering_curves
    from cosmic.studies.steering import FILE_NAME, check_settings, describe, parse_alphas, sweep

    alphas, verdict = parse_alphas(alpha), find_judge(judge)
    kind = check_settings(edit, max_new_tokens, batch_size)
    if prompts < 1:
        raise InputError(f"`prompts` is {prompts}; expected at least 1.")
    refused, answered = _last(read_prompts(harmful, column), read_prompts(harmless, column), prompts, seed)
    for prompt in (refused[0], answered[0]):
        verdict(prompt, "")  # a judge that cannot read these prompts says so before the model is loaded
    along = Direction.load(direction)
    deleted = Direction.load(ablated) if ablated is not None else None
    check_model(model, revision)
    check_output(output, FILE_NAME)
    tokenizer = load_tokenizer(model, revision)
    loaded = load_model(model, revision)
    with progress_bar() as progress:
        task = progress.add_task("generating replies", total=None)
        found = sweep(
            loaded,
            tokenizer,
            along,
            refused,
            answered,
            alphas=alphas,
            edit=kind,
            judge=verdict,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            under=deleted.affine_edits(loaded) if deleted is not None else None,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    found = replace(found, settings={**found.settings, "judge": judge, "ablated": deleted and describe(deleted)})
    _show(found, found.save(output), write_steering_curves(found, output / "steering.png"))


def _last(harmful: list[Prompt], harmless: list[Prompt], most: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The last prompts of the seeded order that extraction takes the first of, so that new ones come before seen ones."""
    from cosmic.config import ExtractionConfig
    from cosmic.prompt_split import split_prompts

    all_of_them = ExtractionConfig(train_prompts=max(len(harmful), len(harmless)), validation_prompts=1, seed=seed)
    parts = split_prompts(harmful, harmless, all_of_them)
    first, second = ([*parts[f"train_{name}"], *parts[f"validation_{name}"]] for name in ("harmful", "harmless"))
    return first[-most:], second[-most:]


def _show(found: Sweep, record: Path, picture: Path) -> None:
    """Shares by strength, whether refusal grows, and where everything lies."""
    from cosmic.studies.curves import sentence

    console().print(sweep_table(found))
    if len(found.points) > 1:
        console().print(sentence(found), soft_wrap=True)
    console().print(f"counts  {record}\ncurves  {picture}", soft_wrap=True)


def sweep_table(found: Sweep) -> Table:
    """Shares of replies in per cent, one row for each strength."""
    from cosmic.judging import VERDICTS
    from cosmic.studies.curves import number, percent

    def cells(point: SteeringPoint) -> list[str]:
        harmful = [point.harmful.share(verdict) for verdict in VERDICTS]
        harmless = [point.harmless.share(verdict) for verdict in ("refused", "unclear")]
        return [percent(share) for share in (*harmful, *harmless)]

    size = found.unedited
    table = Table(
        title=f"replies in %, {size.harmful.n} harmful and {size.harmless.n} harmless prompts", title_justify="left"
    )
    columns = ("α", "harmful refused", "complied", "unclear", "harmless refused", "unclear")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row("no edit", *cells(found.unedited), end_section=True)
    for point in found.points:
        table.add_row(number(point.alpha or 0.0), *cells(point))
    return table
