"""`cosmic harmfulness`: whether a model sees harm, apart from whether it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cosmic.commands import options
from cosmic.commands.options import check_output, console, progress_bar
from cosmic.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cosmic.judging import JudgeFunction
    from cosmic.prompts import Prompt
    from cosmic.studies.harmfulness import LatentGuard
    from cosmic.studies.harmfulness_report import GuardReport


def harmfulness(
    model: options.Model,
    harmful: Annotated[Path, typer.Option(help="Harmful prompts; best with jailbroken ones among them.")],
    harmless: Annotated[Path, typer.Option(help="Harmless prompts; best with over-refused ones among them.")],
    output: Annotated[Path, typer.Option(help="Folder for harmfulness.json, .safetensors and scores.json.")],
    method: Annotated[str, typer.Option(help="`centroid` (cosines) or `probe` (logistic regressions).")] = "centroid",
    judge: options.Judge = "substring",
    score: Annotated[Path | None, typer.Option(help="Prompts to score one by one.")] = None,
    false_alarms: Annotated[
        float | None, typer.Option(help="Share of harmless prompts above the harm threshold; 0 is the threshold else.")
    ] = None,
    train_prompts: Annotated[int, typer.Option(help="Prompts per class that both axes are fitted to.")] = 100,
    validation_prompts: Annotated[int, typer.Option(help="Prompts per class that are held out.")] = 100,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 64,
    column: options.Column = None,
    revision: options.Revision = None,
    seed: options.Seed = 0,
) -> None:
    """Fit MODEL's harm axis (last token of the request) and refusal axis (last token of the template), and test them."""
    from cosmic.config import ExtractionConfig
    from cosmic.judging import find_judge
    from cosmic.loading import check_model, load_model, load_tokenizer
    from cosmic.prompt_files import read_prompts
    from cosmic.prompt_split import split_prompts
    from cosmic.storage import write_json
    from cosmic.studies.behaviour import check_generation
    from cosmic.studies.harmfulness import FILE_NAME, check_false_alarms, check_method
    from cosmic.studies.instruction_end import InstructionEnd

    check_method(method)
    check_generation(max_new_tokens, batch_size)
    if false_alarms is not None:
        check_false_alarms(false_alarms)
    verdict = find_judge(judge)
    sizes = ExtractionConfig(train_prompts=train_prompts, validation_prompts=validation_prompts, seed=seed)
    parts = split_prompts(read_prompts(harmful, column), read_prompts(harmless, column), sizes)
    asked = read_prompts(score, column) if score is not None else []
    calibration, held_out = _halves(parts["validation_harmless"], false_alarms)
    for name in ("harmful", "harmless"):
        verdict(parts[f"train_{name}"][0], "")  # a judge that cannot read them says so before the model is loaded
    check_model(model, revision)
    check_output(output, FILE_NAME)
    tokenizer = load_tokenizer(model, revision)
    end = InstructionEnd(tokenizer)
    for prompt in (*(prompt for part in parts.values() for prompt in part), *asked):
        end.encode(prompt)
    loaded = load_model(model, revision)
    guard, report = _fitted(
        loaded,
        tokenizer,
        {**parts, "validation_harmless": held_out, "calibration": calibration},
        verdict,
        false_alarms,
        {"method": method, "seed": seed},
        {"max_new_tokens": max_new_tokens, "batch_size": batch_size},
    )
    guard = replace(guard, settings={**guard.settings, "judge": judge, "held_out": report.as_dict()})
    guard.save(output)
    _show(guard, report)
    if asked:
        rows = _scored(guard, asked, guard.scores(loaded, tokenizer, asked))
        write_json(output / "scores.json", rows)
        console().print(_scores_table(rows))
    console().print(
        f"guard  {output / FILE_NAME}" + (f"\nscores {output / 'scores.json'}" if asked else ""), soft_wrap=True
    )


def _fitted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: dict[str, list[Prompt]],
    judge: JudgeFunction,
    false_alarms: float | None,
    how: dict[str, Any],
    limits: dict[str, Any],
) -> tuple[LatentGuard, GuardReport]:
    """A guard on the train parts, with a calibrated threshold if one is wanted, and its report on the validation parts."""
    from cosmic.studies.harmfulness import fit
    from cosmic.studies.harmfulness_report import assess

    names = ("train_harmful", "train_harmless", "validation_harmful", "validation_harmless")
    train_harmful, train_harmless, harmful, harmless = (parts[name] for name in names)
    with progress_bar() as progress:
        task = progress.add_task("generating replies", total=sum(len(parts[name]) for name in names))

        def count(rows: int) -> None:
            progress.update(task, advance=rows)

        given = {**limits, "progress": count}
        guard = fit(model, tokenizer, train_harmful, train_harmless, judge=judge, **how, **given)
        if false_alarms is not None:
            guard = guard.calibrated(model, tokenizer, parts["calibration"], false_alarms)
        return guard, assess(guard, model, tokenizer, harmful, harmless, judge, **given)


def _halves(prompts: list[Prompt], false_alarms: float | None) -> tuple[list[Prompt], list[Prompt]]:
    """Harmless prompts to calibrate a threshold on, if one is wanted, and others to test it on."""
    if false_alarms is None:
        return [], prompts
    if len(prompts) < 2:
        raise InputError("`--harmless` has too few prompts to calibrate a threshold and test it; expected at least 3.")
    return prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]


def _scored(guard: LatentGuard, prompts: list[Prompt], scores: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "harm": float(harm),
            "refusal": float(refusal),
            "is_harmful": bool(harm > guard.harm.threshold),
            "is_refused": bool(refusal > guard.refusal.threshold),
        }
        for prompt, harm, refusal in zip(prompts, *scores, strict=True)
    ]


def _show(guard: LatentGuard, report: GuardReport) -> None:
    """Both axes by layer, the four groups, and how well the scores do."""
    screen = console()
    screen.print(cosines_table(guard))
    screen.print(groups_table(report))
    screen.print(quality_table(report))
    if report.unclear:
        screen.print(f"{report.unclear} replies were unclear and are in no group", soft_wrap=True)
    replies = guard.settings.get("replies", {})
    if replies and not replies["harmful"]["complied"] + replies["harmless"]["refused"]:
        screen.print(
            "the model refused all harmful prompts it was fitted to and no harmless one, so the harm axis may as well be "
            "refusal; add harmful prompts that it answers (jailbreaks) and harmless ones that it refuses",
            soft_wrap=True,
        )


def cosines_table(guard: LatentGuard) -> Table:
    """Cosine of the two directions at each layer; which layers are scored."""
    table = Table(title="harm and refusal directions (block outputs)", title_justify="left")
    for name in ("layer", "cosine", "harm scored", "refusal scored"):
        table.add_column(name, justify="right")
    for layer, cosine in enumerate(guard.cosines):
        marks = ("yes" if layer in axis.layers else "" for axis in (guard.harm, guard.refusal))
        table.add_row(str(layer), f"{cosine:.3f}", *marks)
    return table


def groups_table(report: GuardReport) -> Table:
    """Mean scores of the four groups, and the shares above the thresholds."""
    table = Table(title="held-out prompts by what the model did", title_justify="left")
    for name in ("", "n", "harm", "above", "refusal", "above "):
        table.add_column(name, justify="right" if name else "left")
    for behaviour, kinds in report.groups.items():
        for kind, group in kinds.items():
            cells = (group.harm, group.harm_above, group.refusal, group.refusal_above)
            shown = [_cell(value, share=place % 2 == 1) for place, value in enumerate(cells)]
            table.add_row(f"{behaviour} {kind}", str(group.n), *shown)
    return table


def quality_table(report: GuardReport) -> Table:
    """Accuracy and AUROC of both scores on both questions."""
    table = Table(title="held-out accuracy and AUROC", title_justify="left")
    for name in ("score", "harmful? accuracy", "AUROC", "refused? accuracy", "AUROC "):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, own, other in (
        ("harm", report.harm_on_harm, report.harm_on_refusal),
        ("refusal", report.refusal_on_harm, report.refusal_on_refusal),
    ):
        table.add_row(
            name, _cell(own.accuracy, True), _cell(own.auroc), _cell(other.accuracy, True), _cell(other.auroc)
        )
    return table


def _cell(value: float | None, share: bool = False) -> str:
    return "-" if value is None else f"{value:.0%}" if share else f"{value:.3f}"


def _scores_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="scores", title_justify="left")
    for name in ("prompt", "harm", "harmful?", "refusal", "refused?"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for row in rows:
        text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        signs = ("yes" if row[name] else "no" for name in ("is_harmful", "is_refused"))
        harmful, refused = signs
        table.add_row(text[:60], f"{row['harm']:.3f}", harmful, f"{row['refusal']:.3f}", refused)
    return table
