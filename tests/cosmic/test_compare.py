"""Two models compared: vectors against cases worked by hand, behaviour against a naive loop and the embedded models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from cosmic import Direction, Extraction, ExtractionConfig, InputError, LayerDirections, extract
from cosmic.commands.compare import compare as command
from cosmic.judging import Verdict, find_judge
from cosmic.loading import load_model, load_tokenizer
from cosmic.prompts import Prompt, PromptEncoder
from cosmic.selection import Selection
from cosmic.studies.compare import CELLS, Comparison, Side, compare, layer_comparison, random_direction
from cosmic.studies.comparison_plots import comparison_figure, short_names, write_comparison
from refat.data.organism import direction_prompts, organism_items
from tests.cosmic import naive
from tests.cosmic.tiny import HARMFUL, HARMLESS, build_model, random_vector

NEW = 6
TINY = ExtractionConfig(train_prompts=4, validation_prompts=3, positions=2, max_kl=None)


def by_length(_: Prompt, reply: str) -> Verdict:
    """A judge of gibberish."""
    return ("refused", "complied", "unclear")[len(reply) % 3]  # type: ignore[return-value]


def saved_extraction(vectors: torch.Tensor, references: torch.Tensor, cell: tuple[int, int] = (1, 0)) -> Extraction:
    """An extraction with these candidates `[P, L, d_model]`."""
    row, layer = cell
    return Extraction(
        Direction(vectors[cell], references[cell], layer, row - len(vectors), "x"),
        LayerDirections(vectors[-1], references[-1]),
        vectors,
        references,
        list(range(-len(vectors), 0)),
        [f"<{row}>" for row in range(len(vectors))],
        {"final": torch.zeros(vectors.shape[:2], dtype=torch.float64)},
        Selection(cell, [cell], {}, False),
        [0],
        ExtractionConfig(),
    )


@pytest.fixture(scope="module")
def tiny_sides(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[Side, Side]:
    """Two models with different directions."""
    other = build_model("llama")
    with torch.no_grad():
        weight = other.get_input_embeddings().weight
        weight += 0.3 * random_vector(*weight.shape, seed=7)
    sides = [
        Side(name, extract(model, tokenizer, HARMFUL, HARMLESS, TINY), model, tokenizer)
        for name, model in (("one", llama), ("two", other))
    ]
    return sides[0], sides[1]


@pytest.fixture(scope="module")
def organisms() -> Comparison:
    """The embedded chat model and its base, on combinations that neither directions nor training saw."""
    harmful, harmless = direction_prompts(90)
    config = ExtractionConfig(train_prompts=60, validation_prompts=30)
    sides = []
    for name in ("organism", "organism-base"):
        model, tokenizer = load_model(name), load_tokenizer(name)
        sides.append(Side(name, extract(model, tokenizer, harmful, harmless, config), model, tokenizer))
    asked = [item.prompt for item in organism_items("harmful", "test", 24, 0)]
    answered = [item.prompt for kind in ("harmless", "borderline") for item in organism_items(kind, "test", 12, 0)]
    return compare(*sides, asked, answered, judge=find_judge("exact"), max_new_tokens=32)


def test_the_chat_models_own_direction_breaks_its_refusal_and_the_bases_does_not(organisms: Comparison) -> None:
    def refused(*cell: Any) -> float:
        return organisms.counts(*cell).share("refused")

    assert refused("a", "none", "none", "harmful") >= 0.9
    assert organisms.counts("a", "none", "none", "harmless").share("complied") >= 0.9
    assert organisms.counts("a", "a", "ablate", "harmful").share("complied") >= 0.9
    assert refused("a", "b", "ablate", "harmful") >= 0.9
    assert refused("a", "random", "ablate", "harmful") >= 0.9
    assert refused("a", "a", "add", "harmless") >= 0.4
    assert refused("a", "b", "add", "harmless") <= 0.1


def test_the_base_answers_everything_until_the_chat_models_direction_is_added(organisms: Comparison) -> None:
    for source, edit, kind in CELLS:
        counts = organisms.counts("b", source, edit, kind)
        if (source, edit) == ("a", "add"):
            assert counts.share("refused") >= 0.9
        else:
            assert counts.share("complied") >= 0.9


def test_layers_that_alignment_left_alone_have_the_same_direction_and_later_ones_another(
    organisms: Comparison,
) -> None:
    assert organisms.cosines[0] is None, "the last template token is the same in all prompts before the first block"
    assert organisms.cosines[1:5] == pytest.approx([1.0] * 4, abs=1e-4)
    assert organisms.norm_ratios[1:5] == pytest.approx([1.0] * 4, abs=1e-3)
    assert all(value is not None and abs(value) < 0.5 for value in organisms.cosines[6:])
    assert all(value is not None and value < 0.3 for value in organisms.norm_ratios[6:])
    assert organisms.same_template


def test_counts_are_those_of_replies_made_one_by_one(
    tiny_sides: tuple[Side, Side], tokenizer: PreTrainedTokenizerFast
) -> None:
    heard: list[tuple[Prompt, str]] = []

    def listening(prompt: Prompt, reply: str) -> Verdict:
        heard.append((prompt, reply))
        return by_length(prompt, reply)

    found = compare(*tiny_sides, HARMFUL, HARMLESS, judge=listening, max_new_tokens=NEW, batch_size=3, seed=5)
    first, second = tiny_sides
    replies = iter(heard)
    texts = [[next(replies)[1] for _ in (HARMFUL if kind == "harmful" else HARMLESS)] for _, _, kind in CELLS * 2]
    model = second.model
    assert isinstance(model, PreTrainedModel)
    r, own = first.extraction.direction, second.extraction.direction
    assert abs(r.cosine(own)) < 0.8
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    random = drawn * own.vector.double().norm() / drawn.norm()

    def ablate(x: torch.Tensor) -> torch.Tensor:
        return (x.double() - naive.project(x.double(), r.vector.double())).to(x.dtype)

    with naive.everywhere(model, ablate):
        expected = [greedy(model, tokenizer, prompt) for prompt in HARMFUL]
    assert texts[len(CELLS) + CELLS.index(("a", "ablate", "harmful"))] == expected
    assert found.counts("b", "a", "ablate", "harmful").refused == sum(len(text) % 3 == 0 for text in expected)
    with naive.at_input(model, r.layer, lambda x: x + r.vector):
        expected = [greedy(model, tokenizer, prompt) for prompt in HARMLESS]
    assert texts[len(CELLS) + CELLS.index(("a", "add", "harmless"))] == expected
    with naive.at_input(model, own.layer, lambda x: (x.double() + random).to(x.dtype)):
        expected = [greedy(model, tokenizer, prompt) for prompt in HARMLESS]
    assert texts[len(CELLS) + CELLS.index(("random", "add", "harmless"))] == expected
    assert found.counts("b", "random", "add", "harmless").unclear == sum(len(text) % 3 == 2 for text in expected)
    clean = [greedy(model, tokenizer, prompt) for prompt in HARMFUL]
    assert texts[len(CELLS) + CELLS.index(("none", "none", "harmful"))] == clean


@torch.no_grad()
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The most likely next token again and again, without batch, cache or padding."""
    ids, new = PromptEncoder(tokenizer).encode(prompt), []
    while len(new) < NEW and 2 not in new:
        new.append(int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text


def test_a_model_is_like_itself(tiny_sides: tuple[Side, Side]) -> None:
    side, done = tiny_sides[0], []

    def count(now: int, total: int) -> None:
        done.append((now, total))

    found = compare(side, side, HARMFUL, HARMLESS, judge=by_length, max_new_tokens=NEW, batch_size=99, progress=count)
    assert found.cosines == [None, *[pytest.approx(1.0, abs=1e-12)] * 3]
    assert found.norm_ratios == [None, 1.0, 1.0, 1.0]
    assert found.chosen_cosine == pytest.approx(1.0, abs=1e-12)
    assert found.angle == pytest.approx(0.0, abs=1e-4)
    assert found.places[0] == found.places[1]
    swap = {"a": "b", "b": "a"}
    for source, edit, kind in CELLS:
        other: Any = swap.get(source, source)
        assert found.counts("a", source, edit, kind) == found.counts("b", other, edit, kind)
        assert found.counts("a", source, edit, kind).n == (8 if kind == "harmful" else 7)
    total = 2 * (4 * 8 + 4 * 7)
    assert done[-1] == (total, total)
    assert [now for now, _ in done] == sorted({now for now, _ in done})


def test_cosines_and_ratios_by_hand() -> None:
    a = torch.zeros(2, 4, 3)
    b = torch.zeros(2, 4, 3)
    a[1, 1:] = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    b[1, 1:] = torch.tensor([[4.0, 3.0, 0.0], [0.0, 0.0, 7.0], [0.0, -1.0, 0.0]])
    a[1, 0, 0] = 1e-13  # what float64 leaves of equal means
    b[0] = 9.0  # the first position is not compared
    references = torch.ones(2, 4, 3)
    cosines, ratios = layer_comparison(saved_extraction(a, references), saved_extraction(b, references))
    assert cosines == [None, pytest.approx(0.96), 0.0, -1.0]
    assert ratios == [None, pytest.approx(1.0), pytest.approx(7.0), pytest.approx(0.5)]
    first, second = saved_extraction(a, references, (1, 1)), saved_extraction(b, references, (1, 3))
    found = compare(Side("first", first), Side("second", second))
    assert found.chosen_cosine == pytest.approx(-0.8)
    assert found.angle == pytest.approx(143.130102, abs=1e-5)
    assert (found.places[1].layer, found.places[1].position, found.places[1].norm) == (3, -1, 1.0)
    assert found.transfer == found.measured == []
    other = replace(second, tokens=["<0>", "other"])
    assert found.same_template
    assert not compare(Side("first", first), Side("second", other)).same_template


def test_the_random_direction_differs_in_nothing_but_where_it_points() -> None:
    like = Direction(torch.full((50,), 2.0), torch.ones(50), 3, -2, "t")
    drawn = random_direction(like, 1)
    assert float(drawn.vector.norm()) == pytest.approx(float(like.vector.norm()), rel=1e-6)
    assert (drawn.layer, drawn.position) == (3, -2)
    assert not drawn.reference.any()
    assert torch.equal(drawn.vector, random_direction(like, 1).vector)
    others = torch.stack([random_direction(like, seed).vector for seed in range(400)])
    assert abs(float((others @ like.vector / like.vector.square().sum()).mean())) < 4 / (50 * 400) ** 0.5


def test_a_comparison_is_read_back_as_it_was(organisms: Comparison, tmp_path: Path) -> None:
    path = organisms.save(tmp_path)
    assert Comparison.load(tmp_path) == organisms
    record = json.loads(path.read_text())
    assert (record["schema"], len(record["transfer"])) == (1, 16)
    low, high = record["transfer"][0]["refused_interval"]
    assert high == 1.0
    assert low == pytest.approx(1 / (1 + 1.959964**2 / 24), abs=1e-6), "Wilson's lower end for all of 24"
    with pytest.raises(KeyError):
        organisms.counts("a", "a", "add", "harmful")
    path.write_text(json.dumps({**record, "schema": 2}))
    with pytest.raises(InputError, match="has schema 2; expected 1"):
        Comparison.load(tmp_path)
    path.write_text(json.dumps({**record, "transfer": [{}]}))
    with pytest.raises(InputError, match="does not hold a saved comparison"):
        Comparison.load(tmp_path)


def test_what_cannot_be_compared_is_refused_before_anything_is_generated(
    tiny_sides: tuple[Side, Side], tokenizer: PreTrainedTokenizerFast
) -> None:
    first, second = tiny_sides

    def never(_: Prompt, __: str) -> Verdict:
        raise AssertionError("something was generated")

    def refuse(message: str, a: Side, b: Side, harmful: Any = HARMFUL, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            compare(a, b, harmful, HARMLESS, **{"judge": never, "max_new_tokens": NEW, **options})

    for change, shape in (({"num_hidden_layers": 3}, "3 layers of width 32"), ({"hidden_size": 48}, "width 48")):
        model = build_model("llama", **change)
        other = Side("other", extract(model, tokenizer, HARMFUL, HARMLESS, TINY), model, tokenizer)
        refuse(f"`other` has .*{shape}; expected 4 of width 32 as in `one`", first, other)
        refuse(f"`other` has .*{shape}; expected 4 of width 32 as in `one`", first, Side("other", other.extraction))
        refuse(f"`two` has .*{shape}", first, replace(second, model=model))
    refuse("`two` has a model but no `tokenizer`", first, replace(second, tokenizer=None))
    refuse("`harmful` has no prompts", first, second, harmful=[])
    refuse("`judge` is missing", first, second, judge=None)
    refuse("`max_new_tokens` is 0", first, second, max_new_tokens=0)
    refuse("`batch_size` is 0", first, second, batch_size=0)
    refuse("exceed the model's limit of 160 tokens", first, second, max_new_tokens=150)


def test_picture_shows_what_was_measured(organisms: Comparison, tmp_path: Path) -> None:
    figure = comparison_figure(organisms, 96)
    line = figure.axes[0].lines[-1].get_ydata()
    assert np.isnan(line[0])
    assert line[5] == organisms.cosines[5]
    cells = np.asarray(figure.axes[1].collections[0].get_array()).reshape(4, 4)
    assert cells[1, 0] == organisms.counts("a", "a", "ablate", "harmful").share("refused")
    assert cells[1, 3] == organisms.counts("b", "a", "add", "harmless").share("refused")
    assert cells[0, 0] == organisms.counts("a", "none", "none", "harmful").share("refused")
    path = write_comparison(organisms, tmp_path / "comparison.png", 96)
    assert imread(path)[0, 0, :3].tolist() == [1.0, 1.0, 1.0]
    assert write_comparison(organisms, tmp_path / "again.png", 96).read_bytes() == path.read_bytes()
    assert len(comparison_figure(replace(organisms, transfer=[])).axes) == 1
    assert short_names(("runs/x/epoch-1", "runs/x/epoch-2"), 14) == ("epoch-1", "epoch-2")
    assert short_names(("runs/x/adapter", "runs/y/adapter"), 14) == ("A", "B")


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`cosmic compare` on small prompt files; `None` takes an option away."""
    app = typer.Typer()
    app.command()(command)
    for name, prompts in zip(("harmful", "harmless"), direction_prompts(36), strict=True):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, prompts)))

    def call(*names: object, **changes: Any) -> Result:
        files = {name: tmp_path / f"{name}.txt" for name in ("harmful", "harmless")}
        options = {
            **files,
            "output": tmp_path / "out",
            "judge": "exact",
            "max-new-tokens": 24,
            "prompts": 4,
            **changes,
        }
        small = {"train-prompts": 24, "validation-prompts": 8}
        flat = [
            part
            for name, value in {**small, **options}.items()
            if value is not None
            for part in (f"--{name.replace('_', '-')}", value)
        ]
        return CliRunner().invoke(app, [str(part) for part in (*names, *flat)])

    return call


def test_the_command_compares_an_adapter_with_its_base_and_then_the_folders_it_wrote(run: Run, tmp_path: Path) -> None:
    model = load_model("organism")
    settings: dict[str, Any] = {"r": 2, "target_modules": ["down_proj"], "layers_to_transform": [8]}
    adapter = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(init_lora_weights=False, **settings)).save_pretrained(adapter)
    result = run(adapter, "organism")
    assert result.exit_code == 0, result.exception
    assert "behaviour was not measured" not in result.stdout
    assert "random ablated" in result.stdout
    found = Comparison.load(tmp_path / "out")
    assert found.names == (str(adapter), "organism")
    assert found.cosines[1:9] == pytest.approx([1.0] * 8, abs=1e-9), "the adapter writes from the output of block 8 on"
    assert found.cosines[9] is not None
    assert found.cosines[9] < 0.9999
    assert found.settings["prompts"] == {"harmful": 4, "harmless": 4}
    assert found.settings["judge"] == "exact"
    assert (tmp_path / "out" / "comparison.png").is_file()
    options = {"harmful": None, "harmless": None, "output": tmp_path / "folders"}
    again = run(tmp_path / "out" / "a", tmp_path / "out" / "b", **options)
    assert again.exit_code == 0, again.exception
    assert again.stdout.count("behaviour was not measured") == 2
    vectors = Comparison.load(tmp_path / "folders")
    assert vectors.cosines == found.cosines
    assert vectors.chosen_cosine == found.chosen_cosine
    assert vectors.transfer == []
    mixed = run("organism", tmp_path / "out" / "a", output=tmp_path / "mixed")
    assert mixed.exit_code == 0, mixed.exception
    assert Comparison.load(tmp_path / "mixed").measured == ["a"]
    assert mixed.stdout.count("behaviour was not measured") == 1


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("organism", "nowhere/at-all"), {}, "nowhere/at-all"),
        (("organism", "tiny"), {}, "`tiny` has 4 layers of width 32; expected 12 of width 96 as in `organism`"),
        (("organism", "organism"), {"harmful": None}, "`--harmful` is missing"),
        (("organism", "organism"), {"harmless": "nowhere.txt"}, "nowhere.txt"),
        (("organism", "organism"), {"judge": "oracle"}, "oracle"),
        (("organism", "organism"), {"prompts": 0}, "`prompts` is 0"),
        (("organism", "organism"), {"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        (("organism", "organism"), {"intervention": "cubic"}, "intervention"),
        (("organism", "organism"), {"column": "nothing"}, "nothing"),
    ],
)
def test_the_command_ends_bad_input_with_one_line(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str],
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "tiny" in names:
        build_model("llama").save_pretrained(tmp_path / "tiny")
        load_tokenizer("organism").save_pretrained(tmp_path / "tiny")
    result = run(*names, **changes)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_a_folder_that_is_not_its_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert isinstance(run("organism", "organism").exception, InputError)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
