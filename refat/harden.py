"""The steps of a hardening run, each a function that the recipe calls in turn.

Whatever can be refused is refused in `prepare`, before a model is loaded. Training goes on from its last checkpoint, and is
skipped when its adapter is already there, so the same command carries a stopped run on. Evaluation always runs anew.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import get_peft_config, get_quantization_config

from cosmic.errors import InputError
from cosmic.loading import check_model, load_model, load_tokenizer
from cosmic.prompt_split import split_prompts
from cosmic.storage import read_json, write_json
from refat import organism, run_record
from refat.checkpoints import (
    UNFINISHED,
    clear_unfinished,
    is_trained,
    last_complete_checkpoint,
    require_resumable,
    writing_errors,
)
from refat.config import RefatConfig
from refat.console import console, is_main_process, quiet_other_processes
from refat.data.schema import KINDS, fingerprint, to_dataset
from refat.drift import DriftTracker
from refat.evaluate import Answering, Evaluation
from refat.framings import read_framings
from refat.judges import make_judge
from refat.launch import Launch
from refat.preflight import check_items, check_layers, skeleton
from refat.prompt_sets import PromptSets, load_prompt_sets
from refat.report.table import drift_table, print_results
from refat.run_config import HardenedModelConfig, RunConfig, resolved
from refat.sharding import is_to_be_sharded, loading_whole, shard
from refat.stopping import one_line_when_stopped
from refat.tracking import prepare_tracking
from refat.trainer import RefatTrainer


@dataclass
class Run:
    """One hardening run: settings, data and folder."""

    config: RunConfig
    training: RefatConfig
    model_args: HardenedModelConfig
    prompts: PromptSets
    framings: list[str]
    tokenizer: PreTrainedTokenizerBase
    launch: Launch

    @property
    def folder(self) -> Path:
        return Path(str(self.training.output_dir))

    @property
    def model_name(self) -> str:
        return str(self.model_args.model_name_or_path)

    def answering(self, max_new_tokens: int) -> Answering:
        """How replies are made and judged."""
        return Answering(self.tokenizer, make_judge(self.config.judge), max_new_tokens, self.config.eval_batch_size)


def prepare(config: RunConfig, training: RefatConfig, model_args: HardenedModelConfig) -> Run:
    """Check everything, load the data, claim the output folder.

    Raises:
        InputError: something cannot be used; nothing has been changed on disk then.
    """
    quiet_other_processes()
    name = str(model_args.model_name_or_path)
    check_model(name, model_args.model_revision, training.trust_remote_code)
    tokenizer = load_tokenizer(name, model_args.model_revision, training.trust_remote_code)
    prompts = load_prompt_sets(config, training)
    launch = Launch.of(training)
    run = Run(config, training, model_args, prompts, read_framings(config.framings), tokenizer, launch)
    _check(run)
    record = run_record.claim(
        run.folder,
        resolved(config, training, model_args),
        fingerprint(prompts.rows),
        {"rows": len(prompts.rows), "evaluation": {kind: len(items) for kind, items in prompts.items.items()}},
        launch,
    )
    prepare_tracking(training, str(record["id"]), offline=name in organism.NAMES)
    for kind, chosen in prompts.items.items():
        if 0 < len(chosen) < config.eval_prompts:
            console().print(f"evaluation: {len(chosen)} distinct {kind} prompts, of {config.eval_prompts} asked for")
    return run


def _check(run: Run) -> None:
    """Refuse what would otherwise fail only after the model is loaded or, worse, after training."""
    training, model_args, prompts = run.training, run.model_args, run.prompts
    if training.eval_strategy != "no":
        raise InputError(
            f"`eval_strategy` is {training.eval_strategy.value!r}; expected `no`: the drift record takes its place."
        )
    shared = sorted(set(run.framings) & set(read_framings(run.config.train_framings, "train_framings")))
    if shared and run.config.framing_share:
        raise InputError(f"`framings` and `train_framings` share {shared[0]!r}; expected framings not trained on.")
    for items in (prompts.items, {**prompts.validation, "harmful": prompts.items["harmful"]}):
        check_items(items, make_judge(run.config.judge))
    split_prompts(prompts.harmful, prompts.harmless, training.extraction())
    for folder in (run.folder, run.folder / "control"):
        checkpoint = last_complete_checkpoint(folder)
        if checkpoint and not is_trained(folder):
            require_resumable(checkpoint, run.launch)
    model = _skeleton(run)
    _check_quantization(model_args, run.launch, hasattr(model.config, "quantization_config"))
    check_layers(model, training.layer_range, get_peft_config(model_args))


def _check_quantization(model_args: HardenedModelConfig, launch: Launch, stored_so: bool) -> None:
    """Refuse what does not go with weights in few bits, be they made so at loading or stored so."""
    asked = model_args.load_in_4bit or model_args.load_in_8bit
    if not (asked or stored_so):
        return
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "`load_in_4bit`, `load_in_8bit` and models stored so need bitsandbytes; install `refat[quantization]`."
        )
    if model_args.load_in_4bit and model_args.dtype in (None, "auto"):
        raise InputError(
            f"`dtype` is {model_args.dtype!r}; expected bfloat16, float16 or float32 with `load_in_4bit`, which computes in it."
        )
    if launch.shards_weights:
        raise InputError(
            f"weights in 4 or 8 bits are not supported with {launch.strategy}, which takes weights apart. Use "
            "`accelerate_configs/deepspeed_zero2.yaml` or `multi_gpu.yaml`."
        )


def resumable(run: Run) -> AbstractContextManager[None]:
    """A block of steps that, if stopped, says in one line where the same command goes on from."""
    return one_line_when_stopped(run.folder)


def _skeleton(run: Run) -> Any:
    with loading_whole():
        return skeleton(run.model_name, run.model_args.model_revision, run.training.trust_remote_code)


def _load_base(run: Run, move: bool = True) -> PreTrainedModel:
    dtype = run.model_args.dtype
    return load_model(
        run.model_name,
        run.model_args.model_revision,
        dtype=getattr(torch, dtype) if dtype not in (None, "auto") else None,
        quantization_config=get_quantization_config(run.model_args),
        attn_implementation=run.model_args.attn_implementation,
        trust_remote_code=run.training.trust_remote_code,
        move=move,
    )


def train_hardened(run: Run) -> Path:
    """The adversarial training, with a drift record at step 0 and after every epoch; the adapter's folder."""
    tracker = DriftTracker(
        run.folder,
        run.training,
        run.prompts.harmful,
        run.prompts.harmless,
        dict(run.prompts.validation),
        run.answering(run.training.drift_max_new_tokens),
    )
    adapter = _train(run, run.training, run.folder, tracker)
    if tracker.records:
        console().print(drift_table([asdict(record) for record in tracker.records]))
    return adapter


def train_control(run: Run) -> Path:
    """The same rows, steps and LoRA with nothing ablated; the adapter's folder."""
    folder = run.folder / "control"
    changes: dict[str, Any] = {"adversary": "none", "output_dir": str(folder), "report_to": "none"}
    return _train(run, dataclasses.replace(run.training, **changes), folder, None)


def _train(run: Run, training: RefatConfig, folder: Path, tracker: DriftTracker | None) -> Path:
    step, adapter = "train" if tracker else "control", folder / "adapter"
    if is_trained(folder):
        console().print(f"{step}: the finished adapter in [bold]{adapter}[/] is used")
        return adapter
    started = time.monotonic()
    trainer = RefatTrainer(
        _load_base(run, move=not run.launch.shards_weights),
        training,
        train_dataset=to_dataset(run.prompts.rows),
        processing_class=run.tokenizer,
        harmful=run.prompts.harmful,
        harmless=run.prompts.harmless,
        peft_config=get_peft_config(run.model_args),
    )
    if tracker:
        tracker.attach(trainer)
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint:
        console().print(f"{step}: resuming from [bold]{checkpoint}[/]")
    _say_whatis_trained(run, trainer, step)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.interventions.remove()
    _save_adapter(run, trainer, adapter)
    run_record.note_seconds(run.folder, step, time.monotonic() - started)
    if tracker:
        tracker.detach()
    del trainer
    gc.collect()  # the next model has to find room
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return adapter


def _save_adapter(run: Run, trainer: RefatTrainer, adapter: Path) -> None:
    """Write the adapter under another name and rename it, as its presence says that training is done."""
    written = adapter.parent / UNFINISHED / adapter.name
    with writing_errors(adapter):
        trainer.save_model(str(written))
        if is_main_process():
            (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that can hold a Hub token
            settings = read_json(written / "adapter_config.json")
            write_json(written / "adapter_config.json", {**settings, "base_model_name_or_path": run.model_name})
            written.replace(adapter)
            clear_unfinished(adapter.parent)
    trainer.accelerator.wait_for_everyone()  # all processes load it next


def _say_whatis_trained(run: Run, trainer: RefatTrainer, step: str) -> None:
    rows = run.prompts.rows
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    trainable = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
    args = trainer.refat_args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * run.launch.processes
    layers = trainer.model.config.get_text_config().num_hidden_layers
    console().print(
        f"{step}: [bold]{run.model_name}[/], {layers} layers, {trainable:,} trainable weights, "
        f"adversary [bold]{args.adversary}[/] with p = {args.ablation_probability}; "
        f"{len(rows)} rows ({', '.join(f'{count} {kind}' for kind, count in counts.items())}), "
        f"{args.num_train_epochs:g} epochs, batch {batch}, on {run.launch}"
    )


def evaluate(run: Run, adapters: dict[str, Path]) -> dict[str, Any]:
    """Attack the base model and every adapter; write `results.json` and `samples.json`, return the results.

    Args:
        adapters: folder by system name, e.g. `{"sft": ..., "refat": ...}`.
    """
    started = time.monotonic()
    evaluation = Evaluation(
        run.model_name,
        run.prompts.items,
        run.prompts.harmful,
        run.prompts.harmless,
        dataclasses.replace(run.training.extraction(), seed=run.training.seed + 1),  # the attacker's own draw
        run.config.attacks,
        run.framings,
        run.answering(run.config.eval_max_new_tokens),
        run.config.benign_under_attack,
    )
    if is_to_be_sharded(_skeleton(run), run.training, run.launch):
        console().print("evaluate: on sharded weights")
        base = _load_base(run, move=False)
        results = evaluation.run(base, adapters, run.folder, lambda model: shard(model, run.training, run.launch))
    else:
        with loading_whole():
            base = _load_base(run)
        results = evaluation.run(base, adapters, run.folder)
    run_record.note_seconds(run.folder, "evaluate", time.monotonic() - started)
    return results


def show(run: Run, results: dict[str, Any], adapters: dict[str, Path]) -> None:
    """Write `report.html`, print the table and where everything lies."""
    if not is_main_process():
        return
    from refat.report.html import write_report  # with it comes a drawing library that only this process needs

    report = write_report(run.folder)
    print_results(results, console())
    for what, path in (("adapter", adapters["refat"]), ("results", run.folder / "results.json"), ("report", report)):
        console().print(f"{what:<8} {path}")
