"""`cosmic steer`: what it writes and says, which prompts it takes, and that bad input ends before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from cosmic import Direction, ExtractionConfig, InputError, extract
from cosmic.commands.steer import steer
from cosmic.loading import load_model, load_tokenizer
from cosmic.prompt_split import split_prompts
from cosmic.prompts import Prompt
from cosmic.studies.steering import Sweep
from refat.data.organism import direction_prompts

Steer = Callable[..., Result]

FOUND_ON = 24
HARMFUL, HARMLESS = direction_prompts(40)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompt files and a direction that was found on the first of their prompts."""
    folder = tmp_path_factory.mktemp("steer")
    found = {
        "harmful": folder / "harmful.txt",
        "harmless": folder / "harmless.json",
        "direction": folder / "direction",
    }
    found["harmful"].write_text("\n".join(map(str, HARMFUL)))
    found["harmless"].write_text(json.dumps([{"instruction": prompt} for prompt in HARMLESS]))
    config = ExtractionConfig(train_prompts=16, validation_prompts=8)
    model, tokenizer = load_model("organism"), load_tokenizer("organism")
    extract(model, tokenizer, HARMFUL, HARMLESS, config).direction.save(found["direction"])
    return found


@pytest.fixture
def run(places: dict[str, Path], tmp_path: Path) -> Steer:
    app = typer.Typer()
    app.command()(steer)

    def call(model: str = "organism", **change: Any) -> Result:
        options = {**places, "output": tmp_path / "out"} | change
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return CliRunner().invoke(app, [model, *flags], env={"COLUMNS": "120"})

    return call


def test_it_writes_counts_and_curves_and_says_that_refusal_falls(run: Steer, tmp_path: Path) -> None:
    done = run(alpha="0,1,4", judge="exact", prompts=8, max_new_tokens=24)
    assert done.exit_code == 0, done.output
    swept = Sweep.load(tmp_path / "out")
    assert [point.alpha for point in swept.points] == [0, 1, 4]
    assert swept.unedited.harmful.refused == 8
    assert swept.points[0].harmful.complied == 8
    assert swept.points[1].harmful.refused >= 7
    assert swept.points[2].harmful.unclear == 8
    assert "not monotone: refusal of harmful prompts falls from" in done.output
    assert [line for line in done.output.splitlines() if line.startswith("│") and " 0 │" in line]
    assert str(tmp_path / "out" / "steering.json") in done.output
    assert (tmp_path / "out" / "steering.png").read_bytes().startswith(b"\x89PNG")
    assert swept.settings["judge"] == "exact"
    assert swept.settings["ablated"] is None
    assert run(alpha="0", judge="exact", prompts=1, max_new_tokens=2).exit_code == 0, "its own folder may be reused"
    assert len(Sweep.load(tmp_path / "out").points) == 1


def test_an_ablated_direction_is_deleted_throughout(run: Steer, places: dict[str, Path], tmp_path: Path) -> None:
    done = run(ablated=places["direction"], alpha="1", edit="linear", judge="substring", prompts=6, max_new_tokens=24)
    assert done.exit_code == 0, done.output
    swept = Sweep.load(tmp_path / "out")
    assert swept.unedited.harmful.complied == 6
    assert swept.edit == "linear"
    assert swept.settings["under"] is True
    assert swept.settings["ablated"]["layer"] == Direction.load(places["direction"]).layer
    assert "monotone" not in done.output, "of one strength nothing can be said"


def test_prompts_that_extraction_took_come_last(run: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seed, no prompt that the direction was found on is used as long as there are others."""
    import cosmic.studies.steering

    taken: dict[str, list[Prompt]] = {}

    def look(*arguments: Any, **options: Any) -> Sweep:
        taken["harmful"], taken["harmless"] = arguments[3:5]
        raise KeyboardInterrupt

    monkeypatch.setattr(cosmic.studies.steering, "sweep", look)
    for seed in (0, 3):
        config = ExtractionConfig(train_prompts=16, validation_prompts=8, seed=seed)
        parts = split_prompts(HARMFUL, HARMLESS, config)
        run(judge="exact", prompts=40 - FOUND_ON, seed=seed)
        for name, prompts in taken.items():
            seen = {*map(str, parts[f"train_{name}"]), *map(str, parts[f"validation_{name}"])}
            assert len(seen) == FOUND_ON
            assert len(prompts) == 40 - FOUND_ON
            assert not seen & set(map(str, prompts))
        run(judge="exact", prompts=500, seed=seed)
        assert sorted(map(str, taken["harmful"])) == sorted(map(str, HARMFUL))
        assert sorted(map(str, taken["harmless"])) == sorted(map(str, HARMLESS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": "0:4:0"}, "`alpha` '0:4:0' has a step of 0"),
        ({"edit": "cubic"}, "`edit` is 'cubic'"),
        ({"judge": "oracle"}, "`judge` is 'oracle'"),
        ({"prompts": 0}, "`prompts` is 0; expected at least 1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"batch_size": -1}, "`batch_size` is -1"),
        ({"harmful": "nowhere.csv"}, "nowhere.csv"),
        ({"column": "nothing"}, "nothing"),
        ({"direction": "nowhere"}, "`nowhere/direction.safetensors` does not exist"),
        ({"ablated": "nowhere"}, "`nowhere/direction.safetensors` does not exist"),
        ({"judge": "exact", "harmful": "odd.txt"}, "the `exact` judge knows only the embedded model's requests"),
        ({}, "`no/such-model` cannot be loaded"),
    ],
)
def test_bad_input_ends_before_a_model_is_loaded(
    run: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    """The model does not exist, so whatever is complained of instead was looked at first."""
    monkeypatch.chdir(tmp_path)
    Path("odd.txt").write_text("What is love?\nWhat is hate?")
    error = run("no/such-model", **change).exception
    assert isinstance(error, InputError)
    assert message in str(error)
    assert "\n" not in str(error)
    assert not (tmp_path / "out").exists()


def test_a_direction_of_another_model_and_a_folder_of_another_kind(run: Steer, tmp_path: Path) -> None:
    Direction(torch.ones(8), torch.ones(8), 1, -1).save(tmp_path / "other")
    error = run(direction=tmp_path / "other").exception
    assert isinstance(error, InputError)
    assert "width 8) does not fit a model of 12 layers and width 96" in str(error)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    error = run().exception
    assert isinstance(error, InputError)
    assert "holds no `steering.json`" in str(error)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
