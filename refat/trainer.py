"""`RefatTrainer`: `trl.SFTTrainer` in which an adversary perturbs the hidden states of some rows of every batch.

The perturbation is in force for the whole of `training_step`, forward *and* backward: under gradient checkpointing the
backward pass recomputes the forward, and must recompute the perturbed one. Hooks are permanent and do nothing while no
edits are set, so evaluation, generation and saving see the plain model. All randomness is drawn outside the hooks from a
generator seeded by (seed, step, batch), so a resumed run draws what an unbroken one would have drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cosmic.blocks import DecoderBlocks, Site, find_blocks
from cosmic.candidates import difference_in_means
from cosmic.errors import InputError
from cosmic.extraction import Extraction, extract
from cosmic.interventions import Edits, Interventions
from cosmic.prompt_split import split_prompts
from cosmic.prompts import Prompt, PromptEncoder, common_suffix, pad_id
from cosmic.ranks import require_same
from cosmic.storage import read_tensors, write_tensors
from refat.adversaries import Adversary, editable_sites, make_adversary, require_layers
from refat.checkpoints import UNFINISHED, clear_unfinished, finish, writing_errors
from refat.config import RefatConfig
from refat.data.schema import KINDS
from refat.launch import Launch

log = logging.getLogger(__name__)

STATE_FILE = "adversary.safetensors"
DRAWS = 0
"""The stream of random numbers that rows, forms and candidates are drawn from."""


class RefatCollator(DataCollatorForLanguageModeling):
    """TRL's collator, and the kind of each row as its index in `KINDS` (`[batch]`)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate."""
        batch: dict[str, Any] = super().torch_call(examples)
        if "kind" in examples[0]:  # an evaluation set may do without
            batch["kind"] = torch.tensor([KINDS.index(example["kind"]) for example in examples])
        return batch


class RefatTrainer(SFTTrainer):
    """Fine-tune so that refusal survives the deletion of its directions (ReFAT, arXiv:2409.20089).

    Args:
        model: a causal LM, or a PEFT model.
        args: the configuration.
        train_dataset: rows with `prompt`, `completion` (messages), `kind`, and `prefill` (words of the completion without
            loss, or empty); see `refat.data`.
        processing_class: the tokenizer.
        harmful, harmless: prompts that directions are found on, at step 0 and at every refresh. A `DriftTracker`
            looks for the best places anew after every epoch; without one they stay as they were found at step 0.
        peft_config: the adapter to train.
        callbacks: as in `transformers.Trainer`.

    Raises:
        InputError: the data set lacks a column, or the architecture is not understood.
    """

    _tag_names = ("trl", "sft", "refat")
    data_collator: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: RefatConfig,
        *,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        harmful: Sequence[Prompt],
        harmless: Sequence[Prompt],
        peft_config: PeftConfig | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        missing = {"prompt", "completion", "kind"} - set(train_dataset.column_names)
        if missing:
            raise InputError(
                f"`train_dataset` lacks {sorted(missing)}; it has {train_dataset.column_names}. See refat.data."
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        self.data_collator = RefatCollator(**vars(self.data_collator))
        self.refat_args = args
        self.launch = Launch.of(args)
        require_layers(args.layer_range, self.model.config.get_text_config().num_hidden_layers)
        self._saving = False
        self._encoder = PromptEncoder(processing_class)
        self._prompts = (list(harmful), list(harmless))
        parts = split_prompts(harmful, harmless, args.extraction())
        self._refresh_pools = [
            [self._encoder.encode(prompt) for prompt in parts[name]] for name in ("train_harmful", "train_harmless")
        ]
        self._positions = self._encoder.positions(
            [ids for pool in self._refresh_pools for ids in pool], args.positions
        )
        self._step_and_micro_step = (-1, -1)
        self._refreshed_at = -1

    @functools.cached_property
    def blocks(self) -> DecoderBlocks:
        """The model's blocks, measured when first asked for: sharded weights can only run once training has begun."""
        return find_blocks(self.model)

    @functools.cached_property
    def adversary(self) -> Adversary:
        """Who perturbs."""
        return make_adversary(self.refat_args, self.blocks)

    @functools.cached_property
    def interventions(self) -> Interventions:
        """The hooks, put on when first asked for."""
        return Interventions(self.model)

    @functools.cached_property
    def _sites(self) -> frozenset[Site]:
        return frozenset(editable_sites(self.blocks, self.refat_args.layer_range))

    def reselect(self, extraction: Extraction) -> None:
        """Give the adversary a new extraction, as `DriftTracker` does at step 0 and after every epoch.

        An adversary that needs one and has got none by the first step makes one extraction and stays with its places.
        """
        self.adversary.reselect(extraction)
        self._require_same_directions()

    def _require_same_directions(self) -> None:
        require_same(list(self.adversary.state().values()), "directions")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward pass under the adversary's edits."""
        kind = inputs.pop("kind")
        step, micro_step = self._step_and_micro_step
        micro_step = micro_step + 1 if step == self.state.global_step else 0
        self._step_and_micro_step = (self.state.global_step, micro_step)
        self._refresh_if_due()
        generator = self._generator(micro_step)
        rows = self._draw_rows(kind, generator)
        edits = self.adversary.draw(rows, generator)
        self._metrics["train"]["refat/perturbed_share"].append(rows.float().mean().item() if edits else 0.0)
        self.interventions.edits = self._within_limits(edits, inputs["labels"])
        try:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        finally:
            self.interventions.edits = {}

    def _generator(self, micro_step: int) -> torch.Generator:
        """A generator that depends on where training is, and on nothing that came before.

        Batches are counted over processes, so that two processes draw what one does that accumulates over two.
        """
        batch = micro_step * self.accelerator.num_processes + self.accelerator.process_index
        return seeded_generator(self.args.seed, self.state.global_step, batch, DRAWS)

    def _draw_rows(self, kind: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """`[batch]` bool: each eligible row with probability p, independently."""
        drawn = torch.rand(len(kind), generator=generator) < self.refat_args.ablation_probability
        eligible = torch.ones_like(kind, dtype=torch.bool) if self.refat_args.perturb_benign else kind == 0
        return eligible & drawn.to(kind.device)

    def _within_limits(self, edits: Edits, labels: torch.Tensor) -> Edits:
        """`edits` at the layers and on the tokens that the configuration allows."""
        limited = {site: found for site, found in edits.items() if site in self._sites}
        if self.refat_args.edited_tokens == "all":
            return limited
        tokens = (labels != -100) == (self.refat_args.edited_tokens == "completion")
        return {
            site: [dataclasses.replace(e, rows=tokens if e.rows is None else e.rows[:, None] & tokens) for e in found]
            for site, found in limited.items()
        }

    def _refresh_if_due(self) -> None:
        if self.adversary.uses_extraction and not self.adversary.state():
            found = extract(self.model, self.processing_class, *self._prompts, self.refat_args.extraction())
            self.reselect(found)
        step = self.state.global_step
        due = step % self.refat_args.refresh_interval == 0 and step != self._refreshed_at
        if not (self.adversary.uses_refresh and due):
            return
        self._refreshed_at = step
        generator = seeded_generator(self.args.seed, step, "refresh")
        drawn = [
            [
                pool[index]
                for index in torch.randperm(len(pool), generator=generator)[: self.refat_args.refresh_prompts]
            ]
            for pool in self._refresh_pools
        ]
        candidates = difference_in_means(
            self.model,
            *drawn,
            positions=self._positions,
            batch_tokens=self.refat_args.extraction_batch_tokens,
            pad=pad_id(self.processing_class),
        )
        self.adversary.refresh(candidates)
        self._require_same_directions()

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluation sees the plain model."""
        return super().prediction_step(model, {k: v for k, v in inputs.items() if k != "kind"}, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "kind" not in self._signature_columns:
            self._signature_columns.append("kind")

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """TRL's tokens and labels; then no loss on prefilled words, which would teach what they begin."""
        prepared: Dataset = super()._prepare_dataset(dataset, *args, **kwargs)
        if "prefill" not in prepared.column_names:
            return prepared
        encode = functools.partial(
            self._tokenizer.apply_chat_template, tokenize=True, return_dict=True, chat_template=self.chat_template
        )
        masked = prepared.map(lambda row: {"labels": _without_prefill(encode, row)}, desc="Masking prefilled words")
        learnable = masked.filter(lambda row: max(row["labels"]) >= 0, desc="Dropping rows with nothing left to learn")
        if len(learnable) < len(masked):
            log.warning(
                "%d rows end within their prefilled words and are left out; raise `max_length` or lower `prefill_words`",
                len(masked) - len(learnable),
            )
        return learnable

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a card without results would say nothing about safety."""

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the whole checkpoint, of all processes, beside its place and then rename it."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_unfinished(folder)
        self.accelerator.wait_for_everyone()
        self._saving = True
        with writing_errors(folder / name):
            if self.args.should_save and self.adversary.state():
                write_tensors(folder / UNFINISHED / name / STATE_FILE, self.adversary.state())
            super()._save_checkpoint(model, trial)
        self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish(folder, name, self.launch)
            rotate_checkpoints(str(folder), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Here and not with the weights, which DeepSpeed loads by itself.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / STATE_FILE).is_file():
            self.adversary.load_state(read_tensors(Path(checkpoint) / STATE_FILE))


def seeded_generator(*place: int | str) -> torch.Generator:
    """A generator seeded by a place in the run, the same in every process and on every machine."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _without_prefill(encode: Callable[..., Any], row: dict[str, Any]) -> list[int]:
    """The row's labels, with those of its prefilled words taken out.

    The words end where the row's tokens part from those of a row whose whole reply they are. Both are rendered by the
    same template, since tokens of the words alone could differ: some tokenizers begin every text with a space.
    """
    labels: list[int] = list(row["labels"])
    if not row["prefill"]:
        return labels
    reply = [{"role": "assistant", "content": row["prefill"]}]
    begun: list[int] = encode(row["prompt"] + reply)["input_ids"]
    shared = len(common_suffix([begun[::-1], row["input_ids"][::-1]]))
    return [-100] * min(shared, len(labels)) + labels[shared:]
