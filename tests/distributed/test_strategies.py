"""Two processes do what one does, whatever they share out: the same losses, directions, records and results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cosmic.extraction import Extraction
from tests.distributed.conftest import Observed

PLAIN: dict[str, Any] = {
    "train_rows": 32,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "sft_control": False,
    "attacks": ["direct", "cosmic-lce"],
}
LEAN: dict[str, Any] = {
    "train_rows": 14,  # seven batches of two
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1,
    "adversary": "layerwise",
    "drift_prompts": 0,
    "sft_control": False,
    "attacks": ["direct"],
    "positions": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "uneven": {**LEAN, "evaluate_sharded": True},
    "checkpointed": {**LEAN, "gradient_checkpointing": True},
    "reentrant": {**LEAN, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {**LEAN, "bf16": True},
    "quantized": {**LEAN, "load_in_4bit": True, "gradient_checkpointing": True},
}
TOLERANCES = {("bf16", "loss"): 2e-2, ("bf16", "grad_norm"): 1e-1, ("quantized", "grad_norm"): 1e-2}
"""Where something is in bfloat16: with 4 bits, TRL keeps the adapter so."""

ALL = ("plain", "uneven", "checkpointed", "reentrant", "bf16")
STRATEGIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "multi_cpu": ("DistributedDataParallel", ALL),
    "deepspeed_zero1_cpu": ("DeepSpeedEngine", ("plain", "uneven")),
    "deepspeed_zero2_cpu": ("DeepSpeedEngine", ("plain", "reentrant", "quantized")),
    "deepspeed_zero3_cpu": ("DeepSpeedEngine", ("plain", "uneven", "reentrant", "bf16")),
    "fsdp2_cpu": ("FSDPPeftModelForCausalLM", ("plain", "uneven", "reentrant", "bf16")),
}
"""What Accelerate wraps the model in, and what is tried, by launch file."""
Observe = Callable[..., Observed]


def accumulating(names: Iterable[str], plain: int, others: int) -> dict[str, dict[str, Any]]:
    """Variants with so many batches per step."""
    over = {name: plain if name == "plain" else others for name in names}
    return {name: {**VARIANTS[name], "gradient_accumulation_steps": count} for name, count in over.items()}


@pytest.fixture(scope="module")
def alone(observe: Observe) -> Observed:
    """One process, which accumulates over the batches that two have at a time."""
    return observe(None, 1, accumulating(("plain", "uneven", "bf16", "quantized"), 4, 2), FOUR_BITS="1")


@pytest.fixture(scope="module", params=list(STRATEGIES))
def together(observe: Observe, request: pytest.FixtureRequest) -> tuple[str, Observed]:
    """Two processes, `plain` with accumulation too."""
    config, names = request.param, STRATEGIES[request.param][1]
    wanted = {"FORCE_FSDP": config.startswith("fsdp"), "FOUR_BITS": "quantized" in names}
    environment = {name: "1" for name, value in wanted.items() if value}
    return config, observe(config, 2, accumulating(names, 2, 1), **environment)


def adapter(observed: Observed, name: str) -> dict[str, torch.Tensor]:
    return load_file(observed.run(name) / "adapter" / "adapter_model.safetensors")


def extraction(observed: Observed, name: str, epoch: int) -> Extraction:
    return Extraction.load(observed.run(name) / "directions" / f"epoch-{epoch}")


def test_processes_and_shards_are_what_was_asked_for(together: tuple[str, Observed]) -> None:
    config, observed = together
    wrapper, names = STRATEGIES[config]
    shards_weights = config in ("deepspeed_zero3_cpu", "fsdp2_cpu")
    assert observed.output.count("evaluate: on sharded weights") == int(shards_weights)  # where it is asked for
    for name in names:
        for rank in (0, 1):
            note = observed.training(name, rank)
            assert note["processes"] == 2
            assert note["wrapper"] == wrapper
            local, whole = note["sizes"]
            if config == "deepspeed_zero3_cpu":
                assert local == 0, "between steps no weight is whole anywhere"
            elif config == "fsdp2_cpu":
                assert 0.4 * whole < local < 0.6 * whole
            else:
                assert local == whole > 0
    modes = {name: observed.training(name) for name in names}
    for name, note in modes.items():
        assert note["checkpointing"] == (name in ("checkpointed", "reentrant", "quantized"))
        assert note["dtype"] == ("bf16" if name == "bf16" else "no")
        assert note["reentrant"] or name != "reentrant"


def test_losses_and_gradient_norms_are_those_of_one_process(together: tuple[str, Observed], alone: Observed) -> None:
    config, observed = together
    for what in ("loss", "grad_norm"):
        expected, found = alone.logged("plain", what), observed.logged("plain", what)
        assert len(found) == 4
        assert found == pytest.approx(expected, rel=1e-4), what
    for name in STRATEGIES[config][1][1:]:
        reference = name if name in ("bf16", "quantized") else "uneven"  # checkpointing changes nothing
        for what in ("loss", "grad_norm"):
            expected, found = alone.logged(reference, what), observed.logged(name, what)
            assert len(found) == 4
            tolerance = TOLERANCES.get((name, what), 1e-4)
            assert found[:3] == pytest.approx(expected[:3], rel=tolerance), (name, what)  # the fourth repeats rows


def test_rows_drawn_are_those_of_one_process(together: tuple[str, Observed], alone: Observed) -> None:
    config, observed = together
    draws = [observed.training("plain", rank)["draws"] for rank in (0, 1)]
    interleaved = [rows for pair in zip(*draws, strict=True) for rows in pair]
    assert interleaved == alone.training("plain")["draws"]
    assert any(any(rows) for rows in interleaved)
    uneven = STRATEGIES[config][1][1]
    kinds = [step["kinds"] for rank in (0, 1) for step in observed.training(uneven, rank)["micro_steps"]]
    assert any(0 not in batch for batch in kinds), "some batch has no harmful row"
    assert any(0 in batch for batch in kinds)


def test_directions_are_those_of_one_process(together: tuple[str, Observed], alone: Observed) -> None:
    config, observed = together
    for name in set(STRATEGIES[config][1]) - {"bf16"}:
        reference = name if name in ("plain", "quantized") else "uneven"
        for epoch in range(3 if name == "plain" else 2):
            expected, found = extraction(alone, reference, epoch), extraction(observed, name, epoch)
            assert found.selection.chosen == expected.selection.chosen
            repeated = name != "plain" and epoch > 0  # rows in the last step of an uneven epoch, to fill it up
            assert found.direction.cosine(expected.direction) > (0.999 if repeated else 0.99999)
            if repeated:
                continue
            assert found.selection.ranking[:3] == expected.selection.ranking[:3]
            for score, values in expected.scores.items():
                torch.testing.assert_close(found.scores[score], values, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_drift_record_and_results_are_those_of_one_process(together: tuple[str, Observed], alone: Observed) -> None:
    config, observed = together
    expected, found = alone.drift("plain"), observed.drift("plain")
    assert [record["step"] for record in found] == [0, 2, 4]
    for one, two in zip(expected, found, strict=True):
        for name, value in one.items():
            if isinstance(value, list):  # cosines; `None` where a direction has length 0
                assert [item is None for item in two[name]] == [item is None for item in value]
                value, two[name] = ([item or 0.0 for item in items] for items in (value, two[name]))
            close = pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float | list) else value
            assert two[name] == close, name
    one, two = (json.loads((run.run("plain") / "results.json").read_text()) for run in (alone, observed))
    assert {row["n"] for row in two["rows"]} == {5}
    assert two["rows"] == one["rows"]
    for name in {"plain", "uneven"} & set(
        STRATEGIES[config][1]
    ):  # every reply, word for word, of every system under every attack
        one, two = (json.loads((run.run(name) / "samples.json").read_text()) for run in (alone, observed))
        assert two == one
    wanted, got = adapter(alone, "plain"), adapter(observed, "plain")
    assert wanted.keys() == got.keys()
    for key, weight in wanted.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-3, atol=1e-5)


def test_only_the_main_process_prints_and_writes(together: tuple[str, Observed]) -> None:
    config, observed = together
    names = STRATEGIES[config][1]
    assert observed.output.count("train: ") == len(names)
    assert observed.output.count("'train_runtime'") == len(names)
    for name in names:
        left = {path.name for path in observed.run(name).iterdir()}
        wanted = {"run.json", "results.json", "samples.json", "drift.jsonl", "adapter", "directions"}
        assert wanted <= left
        assert ("report.html" in left) == (name == names[0])
        assert not any(part.startswith(".") for part in left), left
        assert {record["directions"] for record in observed.drift(name)} == {
            f"directions/{path.name}" for path in (observed.run(name) / "directions").iterdir()
        }
