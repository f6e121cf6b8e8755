"""Find the refusal direction of a chat model: candidates, scores, choice, in one call. Used as

    extraction = cosmic.extract(model, tokenizer, harmful, harmless)
    with extraction.direction.ablate(model):
        model.generate(...)

where `harmful` and `harmless` are prompts without answers.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from cosmic.blocks import causal_lm
from cosmic.budget import tokens_per_pass
from cosmic.candidates import Candidates, difference_in_means
from cosmic.config import ExtractionConfig
from cosmic.direction import Direction, LayerDirections
from cosmic.errors import InputError
from cosmic.fitted_candidates import fitted_candidates
from cosmic.interventions import Edits
from cosmic.loading import registered_name
from cosmic.prompt_split import fingerprint, split_prompts
from cosmic.prompts import Prompt, PromptEncoder, pad_id
from cosmic.ranks import input_device, rank
from cosmic.scores import Scores, evaluation_layers
from cosmic.scoring import score_candidates
from cosmic.selection import Cell, Selection, select
from cosmic.storage import read_json, read_tensors, write_json, write_tensors

log = logging.getLogger(__name__)

WORTH = 0.05
"""Gain in S_comply + S_refuse over no edit below which a choice is no better than chance."""

REFUSAL_OPENERS = ("I cannot", "I'm sorry", "Sorry", "As an AI")


@dataclass(frozen=True)
class Extraction:
    """What was found, and everything that was considered.

    Attributes:
        direction: the chosen direction.
        layers: one direction per layer, last token.
        vectors, references: all candidates, `[P, L, d_model]` float32.
        positions: token position of each row.
        tokens: text of the token at each position.
        scores: score maps by name (`comply`, `refuse`, `kl`, `final`, ...), each `[P, L]`.
        selection: ranking and reasons.
        evaluation_layers: L_low.
        config: the settings used.
        unedited: what S_comply and S_refuse are without any edit, cos(b clean, a clean).
    """

    direction: Direction
    layers: LayerDirections
    vectors: torch.Tensor
    references: torch.Tensor
    positions: list[int]
    tokens: list[str]
    scores: dict[str, torch.Tensor]
    selection: Selection
    evaluation_layers: list[int]
    config: ExtractionConfig
    provenance: dict[str, Any] = field(default_factory=dict)
    unedited: float = math.nan

    def at(self, cell: Cell) -> Direction:
        """The candidate at (position index, layer) as a direction of its own."""
        row, layer = cell
        scores = {name: float(values[cell]) for name, values in self.scores.items()}
        return Direction(
            self.vectors[cell],
            self.references[cell],
            layer,
            self.positions[row],
            self.tokens[row],
            scores,
            {**self.provenance, "extraction": self.config.as_dict()},
        )

    def save(self, folder: Path | str) -> None:
        """Write the direction, the layer directions, all candidates and `extraction.json`."""
        folder = Path(folder)
        self.direction.save(folder)
        self.layers.save(folder)
        write_tensors(folder / "candidates.safetensors", {"vectors": self.vectors, "references": self.references})
        write_json(
            folder / "extraction.json",
            {
                "schema": 1,
                "positions": self.positions,
                "tokens": self.tokens,
                "evaluation_layers": self.evaluation_layers,
                "chosen": list(self.selection.chosen),
                "relaxed": self.selection.relaxed,
                "ranking": [list(cell) for cell in self.selection.ranking],
                "dropped": [[*cell, reason] for cell, reason in self.selection.dropped.items()],
                "scores": {name: _finite(values) for name, values in self.scores.items()},
                "unedited": self.unedited if math.isfinite(self.unedited) else None,
                "config": self.config.as_dict(),
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, folder: Path | str) -> Extraction:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or malformed.
        """
        folder = Path(folder)
        record, tensors = read_json(folder / "extraction.json"), read_tensors(folder / "candidates.safetensors")
        try:
            settings = {name: value for name, value in record["config"].items() if name != "batch_size"}  # until 0.1
            if settings["refusal_tokens"] is not None:
                settings["refusal_tokens"] = tuple(settings["refusal_tokens"])
            selection = Selection(
                tuple(record["chosen"]),
                [tuple(cell) for cell in record["ranking"]],
                {(row, layer): reason for row, layer, reason in record["dropped"]},
                record["relaxed"],
            )
            return cls(
                Direction.load(folder),
                LayerDirections.load(folder),
                tensors["vectors"],
                tensors["references"],
                record["positions"],
                record["tokens"],
                {name: torch.tensor(_unfinite(rows), dtype=torch.float64) for name, rows in record["scores"].items()},
                selection,
                record["evaluation_layers"],
                ExtractionConfig(**settings),
                record["provenance"],
                math.nan if record.get("unedited") is None else record["unedited"],
            )
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{folder}` does not hold a saved extraction: {error!r}.") from error


def extract(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    config: ExtractionConfig | None = None,
    *,
    under: Edits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Find the direction along which `model` refuses (COSMIC §3).

    Where `torch.distributed` runs, all processes call this alike, divide the work and get the same extraction.

    Args:
        model: a causal LM, wrapped by PEFT, DDP, DeepSpeed, FSDP2 or nothing; it is left as it was.
        tokenizer: its tokenizer, with a chat template.
        harmful: prompts it should refuse, as texts or message lists; repeated ones count once.
        harmless: prompts it should answer.
        config: settings; the paper's by default.
        under: edits that are in force throughout, such as the ablation of a direction found before.
        progress: called with the work done and the work expected.

    Returns:
        The chosen direction, all candidates with scores, and why each was dropped.

    Raises:
        InputError: too few, empty or too long prompts, a prompt in both sets, refusal tokens that do not exist, no
            chat template, or an architecture that is not understood.
    """
    config = config or ExtractionConfig()
    both = PromptEncoder(tokenizer, config.system_prompt if config.system_prompt_on == "both" else None)
    validation = PromptEncoder(tokenizer, config.system_prompt)
    parts = split_prompts(harmful, harmless, config)
    encoded = {
        name: [(both if name.startswith("train") else validation).encode(prompt) for prompt in prompts]
        for name, prompts in parts.items()
    }
    _require_readable(model, encoded, config)
    pad = pad_id(tokenizer)
    positions = both.positions([*encoded["train_harmful"], *encoded["train_harmless"]], config.positions)
    train = encoded["train_harmful"], encoded["train_harmless"]
    device = input_device(causal_lm(model).get_input_embeddings())
    batch_tokens = config.batch_tokens or tokens_per_pass(model, device, config.memory_gib)
    options: Any = {"positions": positions, "pad": pad, "batch_tokens": batch_tokens, "edits": under}
    candidates = (
        difference_in_means(model, *train, **options)
        if config.candidates == "mean"
        else fitted_candidates(model, *train, kind=config.candidates, **options)
    )
    layers = evaluation_layers(
        candidates.harmful_outputs, candidates.harmless_outputs, config.evaluation_share, config.evaluation_from
    )
    scores = score_candidates(
        model,
        candidates,
        encoded["validation_harmful"],
        encoded["validation_harmless"],
        layers=layers,
        config=dataclasses.replace(config, batch_tokens=batch_tokens),
        pad=pad,
        refusal_tokens=sorted(set(config.refusal_tokens or refusal_token_ids(both))),
        under=under,
        progress=progress,
    )
    selection = _select(scores, candidates, config)
    example = encoded["train_harmless"][0]
    return _assemble(
        candidates,
        [tokenizer.decode([example[position]]) for position in positions],
        scores,
        selection,
        layers,
        config,
        provenance(model, parts),
    )


def _assemble(
    candidates: Candidates,
    tokens: list[str],
    scores: Scores,
    selection: Selection,
    layers: list[int],
    config: ExtractionConfig,
    origin: dict[str, Any],
) -> Extraction:
    (row, layer), maps = selection.chosen, scores.as_dict()
    direction = Direction(
        candidates.vectors[row, layer].float(),
        candidates.references[row, layer].float(),
        layer,
        candidates.positions[row],
        tokens[row],
        {name: float(values[row, layer]) for name, values in maps.items()},
        {**origin, "extraction": config.as_dict()},
    )
    return Extraction(
        direction,
        candidates.layer_directions(),
        candidates.vectors.float(),
        candidates.references.float(),
        candidates.positions,
        tokens,
        maps,
        selection,
        layers,
        config,
        origin,
        scores.unedited,
    )


def _select(scores: Scores, candidates: Candidates, config: ExtractionConfig) -> Selection:
    try:
        selection = select(scores, candidates.positions, candidates.vectors.norm(dim=-1), config)
    except ArithmeticError as error:
        raise InputError(f"{error}. Give prompts that the model tells apart.") from error
    if selection.relaxed and rank() == 0:
        log.warning("no candidate passed the filters; the best of those outside the last layers was taken")
    gained = float(scores.comply[selection.chosen] + scores.refuse[selection.chosen]) - 2 * scores.unedited
    if gained < WORTH and rank() == 0:
        log.warning(
            "the chosen direction scores %.3f more than no edit at all (harmful and harmless validation prompts have a "
            "cosine of %.3f as they are); refusal may depend on another",
            gained,
            scores.unedited,
        )
    return selection


def _require_readable(
    model: nn.Module, encoded: Mapping[str, Sequence[Sequence[int]]], config: ExtractionConfig
) -> None:
    settings = causal_lm(model).config.get_text_config()
    limit = getattr(settings, "max_position_embeddings", None)
    name, longest = max(
        ((name, len(ids)) for name, prompts in encoded.items() for ids in prompts), key=lambda item: item[1]
    )
    if limit is not None and longest > limit:
        raise InputError(
            f"a prompt of `{name.split('_')[1]}` has {longest} tokens; expected at most {limit}, the model's limit. "
            "Shorten or remove it."
        )
    outside = [token for token in config.refusal_tokens or () if not 0 <= token < settings.vocab_size]
    if outside:
        raise InputError(f"`refusal_tokens` has {outside}; expected token ids from 0 to {settings.vocab_size - 1}.")


def refusal_token_ids(encoder: PromptEncoder) -> list[int]:
    """First tokens of common refusals as this tokenizer writes them at the start of a reply."""
    prompt = encoder.encode("Hello")
    ids = {encoder.encode("Hello", opener)[len(prompt)] for opener in REFUSAL_OPENERS}
    return sorted(ids)


def provenance(model: nn.Module, prompts: dict[str, list[Prompt]]) -> dict[str, Any]:
    """Model, revision, prompts' fingerprint and versions."""
    config = causal_lm(model).config
    return {
        "model": registered_name(config.name_or_path),
        "revision": getattr(config, "_commit_hash", None),
        "prompts": {name: len(values) for name, values in prompts.items()},
        "prompts_sha256": fingerprint(prompts),
        "versions": {
            "cosmic": version("refat"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _finite(values: torch.Tensor) -> list[list[float | None]]:
    return [[value if abs(value) < float("inf") else None for value in row] for row in values.tolist()]


def _unfinite(rows: list[list[float | None]]) -> list[list[float]]:
    return [[float("nan") if value is None else value for value in row] for row in rows]
