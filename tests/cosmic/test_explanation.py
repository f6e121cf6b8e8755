"""`cosmic explain`: order, verdicts and counts against the score maps themselves, and what the command says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cosmic import Direction, Extraction, ExtractionConfig, InputError, LayerDirections, extract
from cosmic.commands.explain import explain as command
from cosmic.loading import load_model, load_tokenizer
from cosmic.scores import Scores
from cosmic.selection import Cell, Selection, select, still_needed
from cosmic.studies.explanation import Explanation, decision, explain, filter_of, summary
from refat.data.organism import direction_prompts
from tests.cosmic.tiny import HARMFUL, HARMLESS

NAN = math.nan
Rows = list[list[float]]
Run = Callable[..., Result]


def built(
    maps: dict[str, Rows],
    config: ExtractionConfig | None = None,
    selection: Selection | None = None,
    *,
    positions: list[int] | None = None,
    norms: Rows | None = None,
    tokens: list[str] | None = None,
) -> Extraction:
    """An extraction with these score maps; what is not given is 0, of length 2, and chosen by `select`."""
    config = config or ExtractionConfig(median_peak=False, last_layers_dropped=0.0)
    zeros = [[0.0] * len(row) for row in next(iter(maps.values()))]
    maps = {"comply": zeros, "refuse": zeros, "kl": zeros, **maps}
    scores = Scores(**{name: torch.tensor(rows, dtype=torch.float64) for name, rows in maps.items()})
    count, layers = scores.comply.shape
    lengths = torch.tensor(norms) if norms else torch.full((count, layers), 2.0)
    vectors = lengths[..., None] * torch.tensor([0.6, 0.8, 0.0])
    positions = positions or list(range(-count, 0))
    selection = selection or select(scores, positions, lengths, config)
    row, layer = selection.chosen
    tokens = tokens or [f"t{position}" for position in positions]
    return Extraction(
        Direction(vectors[row, layer], torch.zeros(3), layer, positions[row], tokens[row]),
        LayerDirections(vectors[-1], torch.zeros(layers, 3)),
        vectors,
        torch.zeros_like(vectors),
        positions,
        tokens,
        scores.as_dict(),
        selection,
        [layers - 1],
        config,
    )


def counts(found: Explanation) -> dict[str, int]:
    return {loss.filter: loss.count for loss in found.losses if loss.count}


def verdicts(found: Explanation, extraction: Extraction) -> dict[Cell, str]:
    return {(extraction.positions.index(one.position), one.layer): one.verdict for one in found.candidates}


# --- worked by hand ---


def test_winner_runner_up_and_the_part_that_decided() -> None:
    extraction = built({"comply": [[0.5, 0.9, 0.1], [0.2, 0.7, 0.0]], "refuse": [[0.0, 0.5, 0.0], [0.9, 0.6, 0.0]]})
    found = explain(extraction)
    assert (found.winner.layer, found.winner.position, found.winner.token) == (1, -2, "t-2")
    assert found.length == pytest.approx(2)
    assert found.runner_up is found.candidates[1]
    assert (found.runner_up.layer, found.runner_up.position) == (1, -1)
    assert found.margins == pytest.approx({"comply": 0.2, "refuse": -0.1})
    assert found.decided_by == "comply"
    assert "S_comply +0.200, S_refuse -0.100" in decision(found)
    assert "S_refuse alone would have chosen the runner-up" in decision(found)
    assert "The next that passed is layer 1, position -1 ('t-1'), 0.100 lower." in summary(found)
    assert (found.passed, found.below, found.total, found.depth) == (6, 0, 6, 3)
    assert [one.verdict for one in found.candidates[:3]] == [
        "chosen",
        "passed, score lower by 0.100",
        "passed, score lower by 0.300",
    ]
    assert [one.rank for one in found.candidates] == [1, 2, 3, 4, 5, 6]


def test_every_filter_of_the_selection_is_recognised_and_counted() -> None:
    # Row -1 is the last token. Both other rows peak at layer 1 for comply and refuse, so layers above 1 are too deep.
    comply = [[0.9, 1.0, 0.2, 0.1, 0.0], [-math.inf, 0.9, 0.2, 0.1, 0.0], [0.1, 0.3, 0.4, 5.0, NAN]]
    refuse = [[0.9, 1.0, 0.2, 0.1, 0.0], [0.0, 0.9, 0.2, 0.1, 0.0], [0.1, 0.3, 0.4, 5.0, NAN]]
    kl = [[NAN, 0.25, NAN, NAN, NAN], [NAN, 0.05, NAN, NAN, NAN], [NAN, NAN, NAN, NAN, NAN]]
    norms = [[0.0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    extraction = built({"comply": comply, "refuse": refuse, "kl": kl}, ExtractionConfig(), norms=norms)
    found = explain(extraction)
    assert (found.winner.layer, found.winner.position) == (1, -2)
    assert found.peaks == (1, 1)
    assert not found.peaks_partial
    assert counts(found) == {"length zero": 1, "last layers": 3, "not finite": 1, "median peaks": 2, "KL": 1}
    by_name = {loss.filter: loss for loss in found.losses}
    assert {name: loss.above for name, loss in by_name.items() if loss.above} == {"median peaks": 1, "KL": 1}
    assert by_name["last layers"].unscored == 1
    assert "layers 1 and 1" in by_name["median peaks"].note
    assert "not applied" in by_name["induce"].note
    assert (found.passed, found.below) == (1, 6)
    assert [one.verdict for one in found.candidates[:5]] == [
        "dropped: last token, deeper than both median peaks (layers 1 and 1)",
        "dropped: KL 0.250 above 0.1",
        "dropped: the direction has length zero",
        "chosen",
        "dropped: last token, deeper than both median peaks (layers 1 and 1)",
    ]
    assert found.candidates[5].verdict == "below; KL not measured"
    assert math.isnan(found.candidates[5].scores["kl"])
    assert len(found.candidates) == 13
    assert "2 scored higher and were dropped, the best of them layer 3, position -1 ('t-1'), 8.200 higher" in summary(
        found
    )
    assert "whether it passes is not known" in summary(found)
    assert found.runner_up is not None
    assert (found.runner_up.layer, found.runner_up.position) == (1, -1)


def test_the_substring_method_is_decided_by_bypass_and_filtered_by_induce() -> None:
    maps = {"bypass": [[-3.0, -9.0, -5.0, -8.0]], "induce": [[1.0, -0.1, 2.0, 3.0]], "kl": [[NAN, NAN, 0.0, 0.5]]}
    extraction = built(maps, ExtractionConfig(method="substring", last_layers_dropped=0.0))
    found = explain(extraction)
    assert found.winner.layer == 2
    assert [one.layer for one in found.candidates] == [1, 3, 2, 0]
    assert counts(found) == {"induce": 1, "KL": 1}
    assert found.margins == {"bypass": 2.0}
    assert found.decided_by == "bypass"
    assert found.peaks is None
    assert "bypass, -5.000 against -3.000" in decision(found)
    assert "bypass -5.000 (least is best), induce 2.000, KL 0.000 nats" in summary(found)
    assert {loss.filter: loss.note for loss in found.losses}["median peaks"] == "not applied"


def test_ties_go_to_the_earlier_layer_then_the_earlier_position() -> None:
    by_layer = explain(built({"comply": [[0.1, 0.5, 0.5], [0.2, 0.3, 0.5]]}))
    assert (by_layer.winner.layer, by_layer.winner.position) == (1, -2)
    assert [(one.layer, one.position) for one in by_layer.tied] == [(2, -2), (2, -1)]
    assert by_layer.decided_by == "earlier layer"
    assert by_layer.candidates[1].verdict == "passed, equal score, later layer"
    assert "earlier layer, then the earlier position" in decision(by_layer)
    assert "layer 2, position -2 ('t-2'); layer 2, position -1 ('t-1')" in decision(by_layer)

    crossed = explain(built({"comply": [[0.1, 0.2, 0.5], [0.1, 0.5, 0.2]]}))
    assert [(one.layer, one.position) for one in crossed.candidates[:2]] == [(1, -1), (2, -2)]
    assert crossed.winner.rank == 1

    kl = [[NAN, 0.0], [NAN, NAN]]
    by_position = explain(
        built(
            {"comply": [[0.1, 0.5], [0.2, 0.5]], "kl": kl}, ExtractionConfig(last_layers_dropped=0, median_peak=False)
        )
    )
    assert by_position.winner.position == -2
    assert by_position.decided_by == "earlier position"
    assert by_position.candidates[1].verdict == "equal score, later position; KL not measured"

    kl = [[0.5, 0.0]]
    alone = explain(
        built({"comply": [[0.5, 0.5]], "kl": kl}, ExtractionConfig(last_layers_dropped=0, median_peak=False))
    )
    assert not alone.tied, "an equal score that is dropped was no rival"
    assert alone.runner_up is None
    assert alone.decided_by is None
    assert "No other candidate passed." in summary(alone)
    assert "nothing to decide" in decision(alone)


def test_relaxed_says_what_is_wrong_with_the_winner() -> None:
    maps = {"comply": [[0.5, 0.7, 0.6, 0.9, 0.8]], "kl": [[1.0, 3.0, 2.0, 0.0, NAN]]}
    found = explain(built(maps, ExtractionConfig(last_layers_dropped=0.4)))
    assert found.relaxed
    assert found.winner.layer == 1
    assert found.winner.status == "chosen"
    assert found.winner.verdict == "chosen, although dropped: KL 3.000 above 0.1"
    assert found.runner_up is not None
    assert found.runner_up.layer == 2
    assert counts(found) == {"last layers": 2, "KL": 3}
    assert (found.passed, found.below) == (0, 0)
    assert "the best outside the last layers was taken, against the filters: KL 3.000 above 0.1." in summary(found)
    assert "2 scored higher and were dropped, the best of them layer 3" in summary(found)

    maps["comply"] = [[NAN, NAN, NAN, 0.9, 0.8]]
    deep = explain(built(maps, ExtractionConfig(last_layers_dropped=0.4)))
    assert deep.winner.layer == 3
    assert "although it lies in the last layers: no other has a score. Next of these is layer 4" in summary(deep)


def test_infinite_kl_is_shown_as_such_before_and_after_saving(tmp_path: Path) -> None:
    """A saved record has no infinity, and a KL that is missing there would look as if it had not been needed."""
    config = ExtractionConfig(last_layers_dropped=0.0)
    extraction = built({"comply": [[0.5, 0.9, 0.4]], "kl": [[0.0, math.inf, NAN]]}, config)
    extraction.save(tmp_path)
    for found in (explain(extraction), explain(Extraction.load(tmp_path))):
        assert found.candidates[0].scores["kl"] == math.inf
        assert found.candidates[0].verdict == "dropped: KL inf above 0.1"
        assert math.isnan(found.candidates[2].scores["kl"])


def test_a_limit_that_is_off_is_said_to_be_off_and_small_leads_are_seen() -> None:
    found = explain(built({"comply": [[0.5, 0.50001]], "kl": [[NAN, NAN]]}))
    assert {loss.filter: loss.note for loss in found.losses}["KL"] == "above 0.1 nats"
    off = ExtractionConfig(max_kl=None, last_layers_dropped=0.0)
    found = explain(built({"comply": [[0.5, 0.50001]], "kl": [[NAN, NAN]]}, off))
    assert {loss.filter: loss.note for loss in found.losses}["KL"] == "not applied"
    assert found.passed == 2
    assert found.candidates[1].verdict == "passed, score lower by 1.0e-05"
    assert "KL not needed" in summary(found)


def test_a_reason_of_another_version_is_counted_as_other() -> None:
    selection = Selection((0, 0), [(0, 0)], {(0, 1): "bad luck"}, False)
    found = explain(built({"comply": [[0.5, 0.9]]}, selection=selection))
    assert counts(found) == {"other": 1}
    assert found.candidates[0].verdict == "dropped: bad luck"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection((0, 7), [(0, 7)], {}, False), r"names a candidate \(0, 7\); expected indices .* below \(1, 3\)"),
        (Selection((0, 0), [(0, 0)], {(-1, 0): "KL"}, False), r"names a candidate \(-1, 0\)"),
        (Selection((0, 2), [(0, 2)], {}, False), r"ranks \(0, 2\), which has no score"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(selection: Selection, message: str) -> None:
    whole = built({"comply": [[0.5, 0.9, NAN]]})
    with pytest.raises(InputError, match=message):
        explain(Extraction(**{**vars(whole), "selection": selection}))


def test_maps_that_do_not_fit_are_refused() -> None:
    whole = built({"comply": [[0.5, 0.9]]})
    for name in ("comply", "final"):
        maps = {**whole.scores, name: torch.zeros(2, 2)}
        with pytest.raises(InputError, match=rf"`{name}` has shape \(2, 2\); expected \(1, 2\)"):
            explain(Extraction(**{**vars(whole), "scores": maps}))
    with pytest.raises(InputError, match="`bypass` has shape None"):
        explain(Extraction(**{**vars(whole), "config": ExtractionConfig(method="substring")}))
    with pytest.raises(InputError, match="1 `positions` and 2 `tokens`; expected 1"):
        explain(Extraction(**{**vars(whole), "tokens": ["a", "b"]}))


# --- against a naive computation ---


def measured_as_needed(truth: Scores, positions: list[int], norms: torch.Tensor, config: ExtractionConfig) -> Scores:
    """Maps with the gaps that scoring leaves: the last layers, and every KL, until they are asked for."""
    rows, layers = norms.shape
    maps = Scores.unmeasured(rows, layers, substring=truth.bypass is not None)
    names = [name for name in ("comply", "refuse", "bypass", "induce") if getattr(truth, name) is not None]
    cells = [(row, layer) for row in range(rows) for layer in range(layers) if layer < 0.8 * layers]

    def reveal(names: list[str], cells: list[Cell]) -> None:
        for name in names:
            for cell in cells:
                getattr(maps, name)[cell] = getattr(truth, name)[cell]

    reveal(names, cells)
    while needed := still_needed(maps, positions, norms, config):
        reveal(["kl"] if needed.what == "kl" else names, needed.cells)
    return maps


def naive_filter(truth: Scores, cell: Cell, norms: torch.Tensor, config: ExtractionConfig) -> str | None:
    """The first filter that a candidate fails, from scores without gaps; row -1 is the last token."""
    row, layer = cell
    rows, layers = norms.shape
    if norms[cell] == 0:
        return "length zero"
    if layer >= 0.8 * layers:
        return "last layers"
    if truth.induce is None and row == rows - 1:
        peaks = []
        for values in (truth.comply.tolist(), truth.refuse.tolist()):
            tops = sorted(values[other].index(max(values[other])) for other in range(rows - 1))
            peaks.append(tops[(len(tops) - 1) // 2])
        if layer > max(peaks):
            return "median peaks"
    if truth.induce is not None and truth.induce[cell] <= config.min_induce:
        return "induce"
    assert config.max_kl is not None
    return "KL" if truth.kl[cell] > config.max_kl else None


@pytest.mark.parametrize("method", ["cosmic", "substring"])
@pytest.mark.parametrize("ranked", [1, 3])
def test_order_and_verdicts_agree_with_a_naive_computation(method: str, ranked: int, tmp_path: Path) -> None:
    seen: set[str | None] = set()
    relaxed = 0
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        maps = [torch.rand(4, 10, generator=draw, dtype=torch.float64) for _ in range(5)]
        maps[2] *= 0.1 / 0.3 if seed % 3 else 100  # every third time hardly anything passes
        maps[3], maps[4] = -maps[3], maps[4] - 0.5
        norms = (torch.rand(4, 10, generator=draw) > 0.1).float()
        truth = Scores(*maps) if method == "substring" else Scores(*maps[:3])
        config = ExtractionConfig(method=method, ranked=ranked)  # type: ignore[arg-type]
        scores = measured_as_needed(truth, [-4, -3, -2, -1], norms, config)
        extraction = built(
            {name: rows.tolist() for name, rows in vars(scores).items() if isinstance(rows, torch.Tensor)},
            config,
            norms=norms.tolist(),
        )
        extraction.save(tmp_path / str(seed))
        found = explain(Extraction.load(tmp_path / str(seed)))
        cells = [(extraction.positions.index(one.position), one.layer) for one in found.candidates]
        best = {cell: float(truth.final[cell]) for cell in cells}
        assert sorted(best, key=lambda cell: best[cell], reverse=True) == cells
        assert all(not scores.final[cell].isfinite() for cell in set(_grid(4, 10)) - set(cells))

        filters = {cell: naive_filter(truth, cell, norms, config) for cell in _grid(4, 10)}
        passing = [cell for cell in cells if filters[cell] is None]
        place = cells.index((extraction.positions.index(found.winner.position), found.winner.layer))
        assert found.relaxed == (not passing)
        relaxed += found.relaxed
        if passing:
            assert cells[place] == passing[0]
        else:
            outside = [cell for cell in cells if filters[cell] not in ("length zero", "last layers")]
            assert cells[place] == outside[0]
        for one, cell in zip(found.candidates, cells, strict=True):
            assert one.behind == pytest.approx(best[cells[place]] - best[cell])
            if one.rank <= place and filters[cell]:
                assert one.status == "dropped"
                assert filter_of(one.reason or "") == filters[cell]
                seen.add(filters[cell])
            elif one.status == "passed":
                assert cell in passing[1:]
            elif one.status == "below":
                assert math.isnan(one.scores["kl"])
                assert len(passing) > 0
                assert one.behind > 0
        assert not passing or found.passed >= min(ranked, len(passing))
        assert sum(loss.count for loss in found.losses) + found.passed + found.below == found.total == 40
        named = re.search(r"layers (\d+) and (\d+)", " ".join(extraction.selection.dropped.values()))
        if named:
            assert found.peaks == tuple(int(layer) for layer in named.groups())
    assert relaxed > 1
    assert {"KL", "length zero", "median peaks" if method == "cosmic" else "induce"} <= seen


def _grid(rows: int, layers: int) -> list[Cell]:
    return [(row, layer) for row in range(rows) for layer in range(layers)]


# --- real extractions and the command ---


@pytest.fixture
def run() -> Run:
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("organism")
    config = ExtractionConfig(train_prompts=16, validation_prompts=8)
    extract(load_model("organism"), load_tokenizer("organism"), *direction_prompts(24), config).save(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"full_map": True}, {"method": "substring", "min_induce": -20.0}])
def test_a_tiny_model_is_explained_alike_before_and_after_saving(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, run: Run, options: dict[str, Any]
) -> None:
    config = ExtractionConfig(train_prompts=4, validation_prompts=3, max_kl=5.0, **options)
    extraction = extract(llama, tokenizer, HARMFUL, HARMLESS, config)
    extraction.save(tmp_path)
    found, loaded = explain(extraction), explain(Extraction.load(tmp_path))
    assert repr(found) == repr(loaded)
    assert repr(found.candidates) == repr(loaded.candidates)
    assert found.length == pytest.approx(float(extraction.direction.vector.norm()))
    assert counts(found)["length zero"] == 4
    chosen = extraction.direction
    assert (found.winner.layer, found.winner.position) == (chosen.layer, chosen.position)
    assert found.winner.scores == pytest.approx(chosen.scores, nan_ok=True)
    assert verdicts(found, extraction)[extraction.selection.chosen].startswith("chosen")
    assert run(tmp_path).exit_code == 0


def test_the_command_says_who_won_and_what_dropped_the_others(run: Run, organism: Path) -> None:
    done = run(organism, "--most", 3)
    assert done.exit_code == 0, done.output
    record = json.loads((organism / "extraction.json").read_text())
    row, layer = record["chosen"]
    text = " ".join(done.output.split())
    assert f"The winner is layer {layer}, position {record['positions'][row]} (" in text
    assert "organism: method cosmic, linear edit" in text
    assert "16 harmful and 16 harmless prompts made 48 candidates, 8 and 8 others scored them" in text
    lines = [line for line in done.output.splitlines() if line.startswith("│")]
    assert sum("chosen" in line for line in lines) == 1
    dropped = sum(reason.startswith("in the last") for *_, reason in record["dropped"])
    assert next(line for line in lines if "last layers" in line).split("│")[2].strip() == str(dropped)
    assert len(lines) == 8 + 3
    assert "not needed" in done.output


def test_winner_and_runner_up_are_shown_however_far_down_they_are(run: Run, tmp_path: Path) -> None:
    config = ExtractionConfig(last_layers_dropped=0.0)
    comply = [[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]]
    tokens = ["[/INST]"]  # must not be taken for markup
    built({"comply": comply, "kl": [[1.0, 1.0, 1.0, 0.0, NAN, NAN]]}, config, tokens=tokens).save(tmp_path)
    done = run(tmp_path, "--most", 1)
    assert done.exit_code == 0, done.output
    rows = [line.split("│") for line in done.output.splitlines() if line.startswith("│") and "INST" in line]
    assert [row[1].strip() for row in rows] == ["1", "4", "5"]
    assert [row[4].strip() for row in rows] == ["'[/INST]'"] * 3
    assert [row[-2].strip() for row in rows] == ["dropped: KL 1.000 above 0.1", "chosen", "below; KL not measured"]


def _break(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction.json": "{"}, "direction.json` is not valid JSON"),
        ({"extraction.json": "[]"}, "does not hold a saved extraction"),
        ({"extraction.json": "{}"}, "does not hold a saved extraction"),
        ({"candidates.safetensors": "no"}, "candidates.safetensors` is not a valid safetensors file"),
    ],
)
def test_a_damaged_folder_gives_one_line(run: Run, tmp_path: Path, change: dict[str, str], message: str) -> None:
    built({"comply": [[0.5, 0.9]]}).save(tmp_path)
    for name, text in change.items():
        _break(tmp_path, name, text)
    error = run(tmp_path).exception
    assert isinstance(error, InputError)
    assert message in str(error)
    assert "\n" not in str(error)


def test_other_folders_and_numbers_give_one_line(run: Run, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        error = run(folder).exception
        assert isinstance(error, InputError)
        assert str(error).startswith(f"`{folder}` holds no `extraction.json`; expected")
    error = run(tmp_path, "--most", 0).exception
    assert isinstance(error, InputError)
    assert str(error) == "`most` is 0; expected at least 1."
