"""How many processes there are and what they share out, and a refusal where that is not what the launch file asked for.

Several setups start, train and exit with 0 without being distributed as asked. Whatever can be told from the environment is
refused here, when the settings are read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, str_to_bool
from torch import distributed

from cosmic.errors import InputError


@dataclass(frozen=True)
class Launch:
    """Processes, and what each holds a part of.

    Attributes:
        processes: how many.
        strategy: `single`, `DDP` (nothing is sharded), `ZeRO-1` (optimizer), `ZeRO-2` (and gradients), `ZeRO-3` or `FSDP2`
            (and weights).
    """

    processes: int
    strategy: str

    @classmethod
    def of(cls, training: Any) -> Launch:
        """The launch that `transformers.TrainingArguments` found themselves in."""
        processes = PartialState().num_processes
        if training.deepspeed_plugin is not None:
            return cls(processes, f"ZeRO-{training.deepspeed_plugin.zero_stage}")
        if _asks_for("ACCELERATE_USE_FSDP"):
            return cls(processes, "FSDP2")
        return cls(processes, "DDP" if processes > 1 else "single")

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds the whole model."""
        return self.strategy in ("ZeRO-3", "FSDP2")

    def __str__(self) -> str:
        return "1 process" if self == Launch(1, "single") else f"{self.processes} process(es), {self.strategy}"


def start(use_cpu: bool, timeout: float) -> None:
    """Bring processes on CPU together, with the time limit that `transformers` would forget there.

    Args:
        timeout: seconds after which a wait for another process fails.

    Raises:
        InputError: the launcher was asked for several processes and has started one.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    launched, by_mpi = "ACCELERATE_MIXED_PRECISION" in os.environ, "OMPI_COMM_WORLD_SIZE" in os.environ
    if launched and not by_mpi and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "the launch asked for several processes, but Accelerate started one, as it does for `MULTI_CPU` and `--cpu`. "
            "Use `accelerate_configs/multi_cpu.yaml`, or `num_processes: 1`."
        )
    if _asks_for("ACCELERATE_USE_DEEPSPEED"):
        _require_deepspeed(use_cpu)
    if world > 1 and use_cpu and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def _require_deepspeed(use_cpu: bool) -> None:
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(f"the launch asks for DeepSpeed ({error}). Install `refat[deepspeed]`.") from error
    if use_cpu:  # it would compile an operator for shared memory, for minutes or with no compiler in vain
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check(precision: str, devices: int = 1) -> None:
    """Refuse launches that are not what they were asked to be.

    Args:
        precision: `bf16`, `fp16` or `no`, as training will have it.
        devices: how many GPUs this process would use.

    Raises:
        InputError: processes do not know of each other, one process would use several GPUs, FSDP on CPU, of version 1 or
            with sharded state dicts, a kind of parallelism that splits
            the tokens or the layers of one row, or two precisions at once.
    """
    state, world = PartialState(), int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != world:
        raise InputError(
            f"{world} processes were launched, but each sees {state.num_processes}: they would train apart. Launch with a file "
            "of `accelerate_configs/`."
        )
    if devices > 1:
        raise InputError(
            f"one process sees {devices} GPUs and would split every batch over them. Launch with "
            "`accelerate_configs/multi_gpu.yaml`, or with `single.yaml`, which uses one."
        )
    if _asks_for("ACCELERATE_USE_FSDP"):
        _check_fsdp(state)
    if _asks_for("ACCELERATE_USE_MEGATRON_LM"):
        raise InputError(
            "the launch asks for Megatron-LM, which is not supported. Use a file of `accelerate_configs/`."
        )
    for name in ("TP", "CP", "SP"):
        if int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")) > 1:
            raise InputError(
                f"the launch asks for `parallelism_config_{name.lower()}_size` above 1, which splits rows that edits need "
                "whole. Use a file of `accelerate_configs/`."
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in (precision, "no"):
        raise InputError(
            f"`mixed_precision` in the launch file is {asked!r}, but `bf16` and `fp16` make it {precision!r}. Make them agree."
        )


def _check_fsdp(state: PartialState) -> None:
    expected = {
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    for name, value in expected.items():
        found = os.environ.get(name, value)
        if found.lower() != value.lower():
            raise InputError(f"`{name.lower()}` is {found}; expected {value}. Use `accelerate_configs/fsdp2.yaml`.")
    if state.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
        raise InputError(
            "FSDP needs an accelerator and several processes: on CPU Accelerate leaves it out without a word. Use "
            "`accelerate_configs/deepspeed_zero3_cpu.yaml`."
        )


def _asks_for(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))
