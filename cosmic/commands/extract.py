"""`cosmic extract`: find the direction along which a model refuses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cosmic.commands import options
from cosmic.commands.options import check_output, console, progress_bar

if TYPE_CHECKING:
    from cosmic.extraction import Extraction


def extract(
    model: options.Model,
    harmful: options.Harmful,
    harmless: options.Harmless,
    output: Annotated[Path, typer.Option(help="Folder for direction, candidates, scores and heat maps.")],
    method: Annotated[str, typer.Option(help="`cosmic`, or `substring` for Arditi et al.'s selection.")] = "cosmic",
    intervention: Annotated[str, typer.Option(help="Judge candidates by `linear` or `affine` edits.")] = "linear",
    candidates: Annotated[str, typer.Option(help="`mean` difference, `pca` or `probe`.")] = "mean",
    aggregate: Annotated[str, typer.Option(help="`concat` (paper) or `mean` (authors' code).")] = "concat",
    train_prompts: options.TrainPrompts = 180,
    validation_prompts: options.ValidationPrompts = 100,
    batch_tokens: options.BatchTokens = None,
    memory_gib: Annotated[float | None, typer.Option(help="Working memory of a forward pass.")] = None,
    positions: Annotated[int | None, typer.Option(help="How many of the last template tokens to try; all.")] = None,
    evaluation_share: Annotated[float, typer.Option(help="Share of layers in L_low.")] = 0.1,
    evaluation_from: Annotated[float, typer.Option(help="Depth where L_low may begin; 0.5 if weakly aligned.")] = 0.0,
    last_layers_dropped: Annotated[float, typer.Option(help="Share of layers at the end to leave out.")] = 0.2,
    max_kl: Annotated[float, typer.Option(help="Largest KL on harmless prompts, in nats; `inf` for any.")] = 0.1,
    median_peak: Annotated[bool, typer.Option(help="Filter the last token by the peaks of the others.")] = True,
    min_induce: Annotated[float, typer.Option(help="`substring`: least refusal metric under addition.")] = 0.0,
    alpha: Annotated[float, typer.Option(help="Strength of the addition.")] = 1.0,
    ranked: Annotated[int, typer.Option(help="How many candidates that pass the filters must be known.")] = 5,
    full_map: Annotated[bool, typer.Option(help="Measure also what the choice does not need.")] = False,
    refusal_token: Annotated[list[int] | None, typer.Option(help="`substring`: ids that start a refusal.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Text before validation prompts (COSMIC §5).")] = None,
    system_prompt_on: Annotated[str, typer.Option(help="`validation` or `both` sets of prompts.")] = "validation",
    ablated: options.Ablated = None,
    column: options.Column = None,
    revision: options.Revision = None,
    seed: options.Seed = 0,
) -> None:
    """Find the direction along which MODEL refuses."""
    from cosmic.config import ExtractionConfig
    from cosmic.direction import Direction
    from cosmic.extraction import extract as find
    from cosmic.loading import check_model, load_model, load_tokenizer
    from cosmic.plots import write_heat_maps
    from cosmic.prompt_files import read_prompts
    from cosmic.prompt_split import split_prompts

    config = ExtractionConfig(
        method=method,  # type: ignore[arg-type]
        intervention=intervention,  # type: ignore[arg-type]
        candidates=candidates,  # type: ignore[arg-type]
        aggregate=aggregate,  # type: ignore[arg-type]
        train_prompts=train_prompts,
        validation_prompts=validation_prompts,
        batch_tokens=batch_tokens,
        memory_gib=memory_gib,
        positions=positions,
        evaluation_share=evaluation_share,
        evaluation_from=evaluation_from,
        last_layers_dropped=last_layers_dropped,
        max_kl=None if max_kl == float("inf") else max_kl,
        median_peak=median_peak,
        min_induce=min_induce,
        alpha=alpha,
        ranked=ranked,
        full_map=full_map,
        refusal_tokens=tuple(refusal_token) if refusal_token else None,
        system_prompt=system_prompt,
        system_prompt_on=system_prompt_on,  # type: ignore[arg-type]
        seed=seed,
    )
    refused, answered = read_prompts(harmful, column), read_prompts(harmless, column)
    split_prompts(refused, answered, config)
    check_model(model, revision)
    check_output(output, "extraction.json")
    deleted = Direction.load(ablated) if ablated is not None else None
    tokenizer = load_tokenizer(model, revision)
    loaded = load_model(model, revision)
    with progress_bar() as progress:
        task = progress.add_task("scoring candidates", total=None)
        extraction = find(
            loaded,
            tokenizer,
            refused,
            answered,
            config,
            under=deleted.affine_edits(loaded) if deleted is not None else None,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    extraction.save(output)
    _show(extraction, output, write_heat_maps(extraction, output / "scores.png"))


def _show(extraction: Extraction, output: Path, picture: Path) -> None:
    """The best candidates, the choice, and where everything lies."""
    console().print(candidates_table(extraction))
    best = extraction.direction
    console().print(
        f"chosen: layer {best.layer}, position {best.position} ({best.token!r}); evaluated on layers "
        f"{extraction.evaluation_layers}"
        + (" (no candidate passed the filters)" if extraction.selection.relaxed else ""),
        markup=False,
    )
    console().print(
        f"direction  {output / 'direction.safetensors'}\nscores     {output / 'extraction.json'}\nheat maps  {picture}"
    )


def candidates_table(extraction: Extraction, most: int = 5) -> Table:
    """The best candidates with their scores, as a table."""
    table = Table(title="best candidates", title_justify="left")
    names = list(extraction.scores)
    for name in ("layer", "position", "token", *names):
        table.add_column(name, justify="left" if name == "token" else "right")
    for cell in extraction.selection.ranking[:most]:
        scores = [f"{float(extraction.scores[name][cell]):.3f}" for name in names]
        row, layer = cell
        table.add_row(str(layer), str(extraction.positions[row]), escape(repr(extraction.tokens[row])), *scores)
    return table
