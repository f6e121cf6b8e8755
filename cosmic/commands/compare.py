"""`cosmic compare`: the refusal directions of two models, and what the one of each does to the other."""

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
    from cosmic.config import ExtractionConfig
    from cosmic.extraction import Extraction
    from cosmic.judging import JudgeFunction
    from cosmic.prompts import Prompt
    from cosmic.studies.compare import Comparison, Side

SideArgument = Annotated[
    str, typer.Argument(help="A model (Hub id, folder, name), an adapter folder, or a folder of `cosmic extract`.")
]


def compare(
    a: SideArgument,
    b: SideArgument,
    output: Annotated[Path, typer.Option(help="Folder for comparison.json, comparison.png and the directions.")],
    harmful: Annotated[Path | None, typer.Option(help="Prompts to be refused; needed for a model.")] = None,
    harmless: Annotated[Path | None, typer.Option(help="Prompts to be answered, likewise.")] = None,
    judge: options.Judge = "substring",
    prompts: Annotated[int, typer.Option(help="Prompts per class that behaviour is measured on.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 64,
    intervention: Annotated[str, typer.Option(help="Judge candidates by `linear` or `affine` edits.")] = "linear",
    train_prompts: options.TrainPrompts = 180,
    validation_prompts: options.ValidationPrompts = 100,
    column: options.Column = None,
    seed: options.Seed = 0,
) -> None:
    """Compare the refusal directions of A and B, and use each on both models.

    Directions of a model are found first. Of a folder that `cosmic extract` wrote, or `directions/epoch-N` of a run, they
    are read; what they do to the model they came from is measured only if that model is given instead.
    """
    from cosmic.config import ExtractionConfig
    from cosmic.judging import find_judge
    from cosmic.studies.behaviour import check_generation
    from cosmic.studies.compare import FILE_NAME
    from cosmic.studies.compare import compare as compared
    from cosmic.studies.comparison_plots import write_comparison

    config = ExtractionConfig(
        intervention=intervention,  # type: ignore[arg-type]
        train_prompts=train_prompts,
        validation_prompts=validation_prompts,
        seed=seed,
    )
    check_generation(max_new_tokens, batch_size)
    if prompts < 1:
        raise InputError(f"`prompts` is {prompts}; expected at least 1.")
    verdict = find_judge(judge)
    saved = {name: _saved(name) for name in dict.fromkeys((a, b))}
    parts: dict[str, list[Prompt]] = {}
    if None in saved.values():
        parts = _parts(harmful, harmless, column, config, prompts, verdict)
    _check_shapes(saved)
    check_output(output, FILE_NAME)
    first, second = (_side(name, saved[name], parts, config) for name in (a, b))
    with progress_bar() as progress:
        task = progress.add_task("generating replies", total=None)
        found = compared(
            first,
            second,
            parts.get("validation_harmful", ()),
            parts.get("validation_harmless", ()),
            judge=verdict,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if found.measured:
        found = replace(found, settings={**found.settings, "judge": judge})
    first.extraction.save(output / "a")
    second.extraction.save(output / "b")
    width = first.extraction.vectors.shape[-1]
    _show(found, found.save(output), write_comparison(found, output / "comparison.png", width))


def _saved(name: str) -> Extraction | None:
    """The extraction in a folder, or `None` if `name` is a model or an adapter."""
    from cosmic.extraction import Extraction

    folder = Path(name)
    is_model = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    return Extraction.load(folder) if (folder / "extraction.json").is_file() and not is_model else None


def _parts(
    harmful: Path | None,
    harmless: Path | None,
    column: str | None,
    config: ExtractionConfig,
    prompts: int,
    judge: JudgeFunction,
) -> dict[str, list[Prompt]]:
    """Prompts to find directions on (`train_...`) and others to measure behaviour on (`validation_...`)."""
    from cosmic.prompt_files import read_prompts
    from cosmic.prompt_split import split_prompts

    for name, path in (("--harmful", harmful), ("--harmless", harmless)):
        if path is None:
            raise InputError(f"`{name}` is missing; expected a file of prompts to find the directions of a model on.")
    assert harmful is not None
    assert harmless is not None
    wanted = config.train_prompts + config.validation_prompts
    parts = split_prompts(
        read_prompts(harmful, column),
        read_prompts(harmless, column),
        replace(config, train_prompts=wanted, validation_prompts=prompts),
    )
    for name in ("harmful", "harmless"):
        if len(parts[f"train_{name}"]) < 2:
            raise InputError(f"`--{name}` has too few distinct prompts; expected at least 3, better hundreds.")
        judge(parts[f"validation_{name}"][0], "")  # a judge that cannot read them says so before a model is loaded
    return parts


def _check_shapes(saved: dict[str, Extraction | None]) -> None:
    """Refuse sides of different depth or width before weights are loaded."""
    from cosmic.loading import check_model, load_tokenizer
    from cosmic.studies.compare import check_shape

    shapes: dict[str, tuple[int, ...]] = {}
    for name, extraction in saved.items():
        if extraction is not None:
            shapes[name] = tuple(extraction.vectors.shape[1:])
            continue
        settings = check_model(name).get_text_config()
        shapes[name] = (settings.num_hidden_layers, settings.hidden_size)
        load_tokenizer(name)
    first, *others = shapes
    for other in others:
        check_shape(first, shapes[first], other, shapes[other])


def _side(name: str, extraction: Extraction | None, parts: dict[str, list[Prompt]], config: ExtractionConfig) -> Side:
    """A side as it was saved, or a model with the directions that are found in it now."""
    from cosmic.extraction import extract
    from cosmic.loading import load_model, load_tokenizer
    from cosmic.studies.compare import Side

    if extraction is not None:
        return Side(name, extraction)
    model, tokenizer = load_model(name), load_tokenizer(name)
    with progress_bar() as progress:
        task = progress.add_task(f"finding the direction of {name}", total=None)
        found = extract(
            model,
            tokenizer,
            parts["train_harmful"],
            parts["train_harmless"],
            config,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return Side(name, found, model, tokenizer)


def _show(found: Comparison, record: Path, picture: Path) -> None:
    """Both tables, what was not measured, and where everything lies."""
    screen = console()
    screen.print(f"A = {found.names[0]}\nB = {found.names[1]}", soft_wrap=True)
    screen.print(layers_table(found))
    a, b = found.places
    screen.print(
        f"chosen: A at layer {a.layer}, position {a.position} ({a.token!r}), B at layer {b.layer}, position "
        f"{b.position} ({b.token!r}); cosine {found.chosen_cosine:.3f}, angle {found.angle:.0f}°",
        soft_wrap=True,
    )
    if not found.same_template:
        screen.print("the template tokens differ, so a part of the difference is the template's", soft_wrap=True)
    if found.measured:
        screen.print(transfer_table(found))
    silent = [name for which, name in zip(("a", "b"), found.names, strict=True) if which not in found.measured]
    for name in dict.fromkeys(silent):
        screen.print(
            f"behaviour was not measured on {name}, which holds directions and no model; give the model or adapter itself "
            "to measure it",
            soft_wrap=True,
        )
    screen.print(
        f"record   {record}\npicture  {picture}\ndirections  {record.parent / 'a'} and {record.parent / 'b'}",
        soft_wrap=True,
    )


def layers_table(found: Comparison) -> Table:
    """Cosine and ratio of lengths at each layer."""
    table = Table(title="directions at the last token", title_justify="left")
    for name in ("layer", "cosine", "length B / A"):
        table.add_column(name, justify="right")
    for layer, pair in enumerate(zip(found.cosines, found.norm_ratios, strict=True)):
        table.add_row(str(layer), *("-" if value is None else f"{value:.3f}" for value in pair))
    return table


def transfer_table(found: Comparison) -> Table:
    """The transfer matrix: replies of each verdict in per cent, with the Wilson 95 % interval of what was refused."""
    from cosmic.judging import VERDICTS

    sizes = {row.prompts: row.counts.n for row in found.transfer}
    table = Table(
        title=f"replies in %, {sizes['harmful']} harmful and {sizes['harmless']} harmless prompts",
        title_justify="left",
    )
    for name in ("model", "prompts", "edit", "refused", "95 %", "complied", "unclear"):
        table.add_column(name, justify="left" if name in ("model", "prompts", "edit") else "right")
    names = {"none": "none", "a": "A", "b": "B", "random": "random"}
    verbs = {"none": "", "ablate": " ablated", "add": " added"}
    for place, row in enumerate(found.transfer):
        low, high = row.counts.interval("refused")
        later = found.transfer[place + 1 : place + 2]
        refused, complied, unclear = (f"{100 * row.counts.share(verdict):.0f}" for verdict in VERDICTS)
        table.add_row(
            row.model.upper(),
            row.prompts,
            names[row.direction] + verbs[row.edit],
            refused,
            f"{100 * low:.0f}-{100 * high:.0f}",
            complied,
            unclear,
            end_section=not later or (later[0].model, later[0].edit) != (row.model, row.edit),
        )
    return table
