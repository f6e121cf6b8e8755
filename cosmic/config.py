"""Settings of an extraction. Defaults are COSMIC's (ACL Findings 2025, §3-4 and appendix E)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cosmic.errors import InputError


@dataclass(frozen=True)
class ExtractionConfig:
    """How candidates are made, scored and chosen.

    Attributes:
        method: `cosmic` (cosine similarities, no look at the output) or `substring` (Arditi et al.: refusal-token
            odds).
        intervention: the edit that candidates are judged by: `linear` (LCE) or `affine` (ACE).
        candidates: `mean` (difference in means), `pca` (main component of paired differences) or `probe` (weight of a
            logistic regression).
        aggregate: `concat` joins the evaluation layers' states before the cosine (the paper's formula); `mean`
            averages them over layers too (what the authors' code computes).
        train_prompts: prompts per class whose means make the candidates (paper: 180).
        validation_prompts: prompts per class that candidates are scored on (paper: 100). If there are fewer prompts
            than both numbers together, they are divided in the same proportion.
        batch_tokens: most tokens of one forward pass, padding included; by default what `memory_gib` allows.
        memory_gib: working memory of a forward pass in GiB; by default half of what an accelerator has free, or 0.25.
        positions: how many of the last post-instruction tokens to try; all of them by default.
        evaluation_share: share of layers, at least one, whose harmful and harmless means are least alike (L_low).
        evaluation_from: where the layers that may be in L_low begin, as a share of depth (0.5 for weakly aligned
            models).
        alpha: strength of the addition.
        last_layers_dropped: share of layers at the end that no direction is taken from.
        max_kl: largest mean KL divergence at the last token of harmless prompts under ablation, in nats.
        ranked: how many candidates that pass all filters must be known; their KL is measured from the best score down
            until there are as many.
        ranked_by: whether these are the best by `score`, or first the best of every `layer` and then the best others.
        full_map: measure all scores of all candidates, also where the choice does not need them.
        median_peak: drop candidates of the last token that lie deeper than both median peaks of the other tokens.
        min_induce: `substring` only: least refusal metric that addition must reach on harmless prompts.
        refusal_tokens: `substring` only: token ids that start a refusal; derived from the tokenizer by default.
        system_prompt: a text put before prompts, such as an order to refuse everything (COSMIC §5).
        system_prompt_on: whether it is put before the prompts of `validation` only or of `both` sets.
        seed: draws the split into train and validation prompts.
    """

    method: Literal["cosmic", "substring"] = "cosmic"
    intervention: Literal["linear", "affine"] = "linear"
    candidates: Literal["mean", "pca", "probe"] = "mean"
    aggregate: Literal["concat", "mean"] = "concat"
    train_prompts: int = 180
    validation_prompts: int = 100
    batch_tokens: int | None = None
    memory_gib: float | None = None
    positions: int | None = None
    evaluation_share: float = 0.1
    evaluation_from: float = 0.0
    alpha: float = 1.0
    last_layers_dropped: float = 0.2
    max_kl: float | None = 0.1
    median_peak: bool = True
    ranked: int = 1
    ranked_by: Literal["score", "layer"] = "score"
    full_map: bool = False
    min_induce: float = 0.0
    refusal_tokens: tuple[int, ...] | None = None
    system_prompt: str | None = None
    system_prompt_on: Literal["validation", "both"] = "validation"
    seed: int = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            if get_origin(hints[item.name]) is Literal:
                allowed = get_args(hints[item.name])
                self._require(getattr(self, item.name) in allowed, item.name, f"one of {allowed}")
        for name in ("train_prompts", "validation_prompts", "ranked"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("batch_tokens", "memory_gib"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "above 0, or nothing for a default that fits")
        self._require(self.positions is None or self.positions >= 1, "positions", "at least 1, or nothing for all")
        self._require(0 < self.evaluation_share <= 1, "evaluation_share", "a share in (0, 1]")
        for name in ("evaluation_from", "last_layers_dropped"):
            self._require(0 <= getattr(self, name) < 1, name, "a share in [0, 1)")
        self._require(self.max_kl is None or 0 < self.max_kl < math.inf, "max_kl", "above 0, or nothing for no limit")
        for name in ("alpha", "min_induce"):
            self._require(math.isfinite(getattr(self, name)), name, "a finite number")

    def _require(self, valid: bool, name: str, expected: str) -> None:
        if not valid:
            raise InputError(f"`{name}` is {getattr(self, name)!r}; expected {expected}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
