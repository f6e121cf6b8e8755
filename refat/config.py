"""`RefatConfig`: every switch of the hardening, on top of `trl.SFTConfig`.

Defaults marked (ReFAT) are that paper's, as far as known (arXiv:2409.20089 and its re-implementation); those marked
(prototype) rest on experiments with an earlier, similar model that this repository does not repeat.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from cosmic.config import ExtractionConfig
from cosmic.errors import InputError
from refat import launch

FORMS = ("linear", "affine", "layerwise")
TOKENS = ("all", "prompt", "completion")
ADVERSARIES = ("cosmic", "layerwise", "static", "none")


def option(default: Any, help_text: str) -> Any:
    """A dataclass field with help, in the manner of TRL."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass
class RefatConfig(SFTConfig):
    """Configuration of [`RefatTrainer`].

    Differs from `SFTConfig` in these defaults: `bf16` only where the accelerator has it, `use_cpu` where there is no
    accelerator, `gradient_checkpointing` off on CPU, `ddp_find_unused_parameters` false, `report_to` none, `save_strategy` and
    `logging` as below.

    Raises:
        InputError: a value is outside its range, or packing is on.
    """

    output_dir: str | None = option("runs/demo", "Folder for everything the run writes.")
    adversary: str = option(
        "cosmic",
        "Who perturbs hidden states in training: `cosmic` (this project: best candidates in mixed forms), `layerwise` "
        "(ReFAT), `static` (one direction, chosen once; DeepRefusal without its gates), `none` (plain SFT, the control).",
    )
    ablation_probability: float = option(0.5, "Share of harmful rows that are perturbed, p (ReFAT: 0.5).")
    perturb_benign: bool = option(
        False, "Perturb harmless and borderline rows with p too (DeepRefusal: yes; ReFAT: no)."
    )
    forms: list[str] = option(
        list(FORMS),
        "Forms of edit that `cosmic` draws from for each row: `linear` (LCE everywhere), `affine` (ACE at one block), "
        "`layerwise` (RFA). Robustness is won only against the forms used (prototype).",
    )
    form_weights: list[float] = option([1.0, 1.0, 1.0], "Relative frequency of each of `forms`.")
    candidates: int = option(
        8, "How many of COSMIC's best candidates, best per layer first, `cosmic` draws from (not tuned)."
    )
    recenter: str = option(
        "harmless",
        "Where layerwise ablation puts the removed component: on its `harmless` mean (ReFAT eq. 3) or on `zero`.",
    )
    layer_share: float = option(
        0.75, "Share of the layers, from the end, that layerwise ablation edits (ReFAT: 0.75)."
    )
    layer_range: list[int] | None = option(
        None, "First and last layer (from 0) whose inputs and outputs may be perturbed, e.g. `8 24`; all by default."
    )
    edited_tokens: str = option(
        "all", "Tokens that are perturbed: `all` (COSMIC; DeepRefusal), `prompt` or `completion` (ReFAT does not say)."
    )
    positions: int | None = option(
        None, "How many of the last post-instruction tokens directions are looked for at; all by default (COSMIC: 5)."
    )
    refresh_interval: int = option(10, "Steps between refreshes of the directions' means, k (ReFAT: 4).")
    refresh_prompts: int = option(32, "Prompts per class in a refresh, n (ReFAT: 32).")
    prefill_share: float = option(
        0.3,
        "Share of harmful rows whose refusal follows the first words of a compliant answer, which carry no loss "
        "(DeepRefusal and Qi et al. use such rows; prototype).",
    )
    prefill_words: int = option(
        8, "Most words of the compliant answer in such a row; the number is drawn anew per row."
    )
    extraction_train_prompts: int = option(180, "Prompts per class that make candidate directions (COSMIC: 180).")
    extraction_validation_prompts: int = option(100, "Prompts per class that score candidates (COSMIC: 100).")
    extraction_batch_tokens: int | None = option(
        None, "Most tokens per forward pass in extraction; by default what half of the device's free memory holds."
    )
    extraction_intervention: str = option("linear", "Edit by which COSMIC judges candidates: `linear` or `affine`.")
    extraction_aggregate: str = option(
        "concat", "COSMIC's aggregation over layers: `concat` (paper) or `mean` (its code)."
    )
    drift_prompts: int = option(64, "Validation prompts per kind for the behaviour in the drift record; 0 for none.")
    drift_max_new_tokens: int = option(100, "Longest reply in the drift record, in tokens.")
    drift_directions: int = option(8, "Most directions to ablate in turn for K in the drift record; 0 to leave K out.")
    rows_per_step: int | None = option(
        None,
        "Rows in a step over all processes, so that a run trains alike on any number of them. It sets "
        "`gradient_accumulation_steps`, and `per_device_train_batch_size` is the most rows at a time.",
    )
    evaluate_sharded: bool | None = option(
        None,
        "Under ZeRO-3 and FSDP: keep the weights sharded in the drift record and the final evaluation, which is slower; by "
        "default only if the model does not fit whole on a device.",
    )

    bf16: bool | None = option(None, "Mixed bf16; by default where the accelerator supports it.")
    gradient_checkpointing: bool | None = option(
        None, "Compute activations anew in backward, to save memory; by default on an accelerator only."
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "DDP's search for weights without gradient: every LoRA weight has one, with or without edits."
    )
    learning_rate: float = option(2e-4, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "A constant rate was unstable at the end (prototype), so decay.")
    warmup_steps: float = option(0.05, "Warm-up: steps, or a share of all steps if below 1.")
    logging_steps: float = option(10, "Steps between log lines.")
    log_on_each_node: bool = option(False, "Print log lines once per machine rather than once.")
    save_strategy: str = option("epoch", "When to write a checkpoint.")
    save_total_limit: int | None = option(2, "Checkpoints to keep.")

    def __post_init__(self) -> None:
        accelerator = torch.accelerator.is_available()
        self.use_cpu: bool = self.use_cpu or not accelerator
        if self.bf16 is None:
            supported = accelerator and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the launch file's
            self.bf16 = not self.fp16 and (asked == "bf16" or (asked == "no" and supported and not self.use_cpu))
        chosen = (self.activation_checkpointing, self.gradient_checkpointing, not self.use_cpu)
        self.activation_checkpointing: bool | None = next(value for value in chosen if value is not None)
        self._check()
        if self.rows_per_step is not None:
            self._divide_rows(self.rows_per_step, int(os.environ.get("WORLD_SIZE", "1")))
        launch.start(self.use_cpu, self.ddp_timeout)
        super().__post_init__()
        launch.check("bf16" if self.bf16 else "fp16" if self.fp16 else "no", self.n_gpu)

    def _check(self) -> None:
        self._require(self.adversary in ADVERSARIES, "adversary", f"one of {ADVERSARIES}")
        for name in ("ablation_probability", "prefill_share"):
            self._require(0 <= getattr(self, name) <= 1, name, "a probability in [0, 1]")
        self._require(0 < self.layer_share <= 1, "layer_share", "a share in (0, 1]")
        self._require(self.recenter in ("harmless", "zero"), "recenter", "`harmless` or `zero`")
        self._require(self.edited_tokens in TOKENS, "edited_tokens", f"one of {TOKENS}")
        ordered = self.layer_range is None or (
            len(self.layer_range) == 2 and 0 <= self.layer_range[0] <= self.layer_range[1]
        )
        self._require(ordered, "layer_range", "two layers, the first not after the last")
        known = len(self.forms) > 0 and all(form in FORMS for form in self.forms)
        self._require(known and len(set(self.forms)) == len(self.forms), "forms", f"one or more of {FORMS}, each once")
        fitting = len(self.form_weights) == len(self.forms) and all(0 <= w < math.inf for w in self.form_weights)
        self._require(fitting and sum(self.form_weights) > 0, "form_weights", "one weight per form, not all zero")
        counts = ("candidates", "refresh_interval", "refresh_prompts", "prefill_words", "drift_max_new_tokens")
        for name in (*counts, "per_device_train_batch_size", "gradient_accumulation_steps"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.learning_rate > 0, "learning_rate", "above 0")
        self._require(self.num_train_epochs > 0, "num_train_epochs", "above 0")
        for name in ("drift_prompts", "drift_directions"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("packing", "eval_packing", "padding_free"):
            self._require(not getattr(self, name), name, "false: merged rows lose which of them is harmful")
        self._require(self.completion_only_loss is not False, "completion_only_loss", "true: requests are not learnt")
        self._require(
            self.truncation_mode == "keep_start", "truncation_mode", "`keep_start`, where prefilled words are"
        )
        self._require(not self.activation_offloading, "activation_offloading", "false: it is not tested with edits")
        self.extraction()

    def _divide_rows(self, rows: int, processes: int) -> None:
        """Batch and accumulation with which so many processes see so many rows in a step."""
        self._require(
            rows >= 1 and rows % processes == 0, "rows_per_step", f"a multiple of {processes}, the processes"
        )
        share, most = rows // processes, self.per_device_train_batch_size
        self.per_device_train_batch_size: int = max(
            size for size in range(1, min(most, share) + 1) if share % size == 0
        )
        self.gradient_accumulation_steps: int = share // self.per_device_train_batch_size

    def _require(self, valid: bool, name: str, expected: str) -> None:
        if not valid:
            raise InputError(f"`{name}` is {getattr(self, name)!r}; expected {expected}.")

    def extraction(self) -> ExtractionConfig:
        """The settings of every extraction in training."""
        return ExtractionConfig(
            intervention=self.extraction_intervention,  # type: ignore[arg-type]
            aggregate=self.extraction_aggregate,  # type: ignore[arg-type]
            train_prompts=self.extraction_train_prompts,
            validation_prompts=self.extraction_validation_prompts,
            batch_tokens=self.extraction_batch_tokens,
            positions=self.positions,
            ranked=self.candidates,
            ranked_by="layer",
            seed=self.seed,
        )
