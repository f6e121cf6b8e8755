"""Models whose weights are spread over processes in evaluation as in training, and models that are whole all the same."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from trl.models import unwrap_model_for_generation

from cosmic import ranks
from refat.config import RefatConfig
from refat.launch import Launch

ROOM = 0.7


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Models that are built in this block are whole on every process, whatever the launch shards."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before, config = os.environ.get(name), deepspeed_integration._hf_deepspeed_config_weak_ref
    os.environ[name] = "false"
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = config
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def is_to_be_sharded(model: nn.Module, training: RefatConfig, launch: Launch) -> bool:
    """Whether the evaluation runs on sharded weights: as `evaluate_sharded` says, or if `model` (a skeleton) fills a device."""
    if not launch.shards_weights:
        return False
    if training.evaluate_sharded is not None:
        return training.evaluate_sharded
    if training.use_cpu:
        return False
    torch.accelerator.empty_cache()
    free = min(ranks.from_all(torch.accelerator.get_memory_info()[0]))  # processes that disagree would wait for ever
    size = 2 if training.bf16 or training.fp16 else 4
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters()) * size > ROOM * free


def gathered(trainer: Any) -> AbstractContextManager[Any]:
    """The trainer's weights whole on every process for a while, if ZeRO-3 has spread them and they fit.

    Without it every token of every reply would gather all the weights anew.
    """
    gather = trainer.launch.strategy == "ZeRO-3" and not is_to_be_sharded(trainer.model, trainer.args, trainer.launch)
    if not gather:
        return contextlib.nullcontext()
    checkpointing = trainer.args.gradient_checkpointing_kwargs
    return unwrap_model_for_generation(  # type: ignore[no-any-return]
        trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=checkpointing
    )


def shard(model: PreTrainedModel | nn.Module, training: RefatConfig, launch: Launch) -> Any:
    """`model`, for inference, spread over the processes in the way that the launch asks for."""
    if launch.strategy == "FSDP2":
        return fsdp2_prepare_model(Accelerator(), model)
    import deepspeed

    zero = training.deepspeed_plugin.deepspeed_config["zero_optimization"]
    kept = {name: value for name, value in zero.items() if value != "auto" and name != "offload_optimizer"}
    dtype = next(model.parameters()).dtype
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": kept,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        },
    )
    return engine.module
