"""Launches that would train otherwise than asked are refused, with what to do instead."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig

from cosmic.errors import InputError
from refat import launch
from refat.config import RefatConfig
from refat.harden import _check_quantization
from refat.launch import Launch
from refat.run_config import HardenedModelConfig

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
DEEPSPEED = {**LAUNCHED, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
FSDP = {**LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REFUSED: list[tuple[str, dict[str, str], str]] = [
    (
        "multi-cpu",
        {**LAUNCHED, "MASTER_ADDR": "127.0.0.1"},
        r"several processes, but Accelerate started one.*multi_cpu\.yaml",
    ),
    ("apart", {"WORLD_SIZE": "2"}, r"2 processes were launched, but each sees 1"),
    ("fsdp on cpu", FSDP, r"FSDP needs an accelerator.*deepspeed_zero3_cpu\.yaml"),
    (
        "fsdp shards",
        {**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        r"is SHARDED_STATE_DICT; expected FULL_STATE_DICT",
    ),
    (
        "fsdp empty",
        {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
        r"`fsdp_cpu_ram_efficient_loading` is true; expected false",
    ),
    ("fsdp 1", {**FSDP, "FSDP_VERSION": "1"}, r"`fsdp_version` is 1; expected 2"),
    ("megatron", {**LAUNCHED, "ACCELERATE_USE_MEGATRON_LM": "true"}, r"Megatron-LM, which is not supported"),
    ("tensor parallel", {"PARALLELISM_CONFIG_TP_SIZE": "2"}, r"`parallelism_config_tp_size` above 1"),
    ("context parallel", {"PARALLELISM_CONFIG_CP_SIZE": "4"}, r"`parallelism_config_cp_size` above 1"),
    (
        "precision",
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        r"launch file is 'fp16', but `bf16` and `fp16` make it 'no'",
    ),
]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing of a launcher's."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_", "MASTER_", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("variables", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_launch_is_refused(variables: dict[str, str], message: str, environment: pytest.MonkeyPatch) -> None:
    def begin() -> None:
        if "WORLD_SIZE" not in os.environ:  # it would wait for the others
            launch.start(True, 60)
        launch.check("no")

    begin()
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(InputError, match=message):
        begin()


def test_one_process_with_several_gpus_is_refused(environment: pytest.MonkeyPatch) -> None:
    launch.check("no", 1)
    with pytest.raises(InputError, match="sees 4 GPUs"):
        launch.check("no", 4)


def test_deepspeed_that_is_not_there_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    environment.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"asks for DeepSpeed.*Install `refat\[deepspeed\]`"):
        launch.start(True, 60)


@pytest.mark.parametrize(("asked", "expected"), [("bf16", True), ("no", False)])
def test_precision_of_the_launch_file_is_the_default(
    asked: str, expected: bool, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("ACCELERATE_MIXED_PRECISION", asked)
    options: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True}
    assert RefatConfig(**options).bf16 is expected
    if expected:
        with pytest.raises(InputError, match="Make them agree"):
            RefatConfig(bf16=False, **options)


@pytest.mark.parametrize("strategy", ["ZeRO-3", "FSDP2"])
def test_quantized_weights_are_not_taken_apart(strategy: str) -> None:
    for options in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        settings = HardenedModelConfig(**options)
        assert isinstance(settings, ModelConfig)
        with pytest.raises(InputError, match=f"not supported with {strategy}.*deepspeed_zero2.yaml"):
            _check_quantization(settings, Launch(2, strategy), False)
        _check_quantization(settings, Launch(2, "ZeRO-2"), False)
    _check_quantization(HardenedModelConfig(), Launch(2, strategy), False)
    with pytest.raises(InputError, match=f"not supported with {strategy}"):
        _check_quantization(HardenedModelConfig(), Launch(2, strategy), True)


def test_names_of_launches() -> None:
    assert str(Launch(1, "single")) == "1 process"
    assert str(Launch(8, "ZeRO-3")) == "8 process(es), ZeRO-3"
    assert [Launch(2, name).shards_weights for name in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("rows", "most", "processes", "batch", "accumulation"),
    [(32, 32, 1, 32, 1), (32, 32, 2, 16, 1), (32, 4, 2, 4, 4), (24, 5, 2, 4, 3), (8, 16, 8, 1, 1)],
)
def test_a_step_has_the_same_rows_on_any_number_of_processes(
    rows: int, most: int, processes: int, batch: int, accumulation: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": most}
    config = RefatConfig(**options)
    for _ in range(2):  # a copy divides again
        config._divide_rows(rows, processes)
        assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (batch, accumulation)
    assert RefatConfig(rows_per_step=rows, **options).per_device_train_batch_size <= most


def test_rows_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    config = RefatConfig(output_dir=str(tmp_path), use_cpu=True, rows_per_step=6)
    with pytest.raises(InputError, match=r"`rows_per_step` is 6; expected a multiple of 4"):
        config._divide_rows(6, 4)
