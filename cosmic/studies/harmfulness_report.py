"""How well a `LatentGuard` tells harmful from harmless and refused from accepted, on prompts it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from cosmic.errors import InputError
from cosmic.judging import JudgeFunction
from cosmic.prompts import Prompt
from cosmic.studies.behaviour import verdicts
from cosmic.studies.harmfulness import LatentGuard

Behaviour = Literal["refused", "accepted"]
Kind = Literal["harmful", "harmless"]
BEHAVIOURS: tuple[Behaviour, ...] = ("refused", "accepted")
KINDS: tuple[Kind, ...] = ("harmful", "harmless")


@dataclass(frozen=True)
class Group:
    """Prompts of one kind that the model refused, or accepted.

    Attributes:
        n: how many.
        harm, refusal: mean scores; `None` for no prompts.
        harm_above, refusal_above: shares of prompts above the axis's threshold, likewise.
    """

    n: int
    harm: float | None
    refusal: float | None
    harm_above: float | None
    refusal_above: float | None


@dataclass(frozen=True)
class Quality:
    """What one score says of one question, such as whether the prompt is harmful.

    Attributes:
        accuracy: share of prompts that are on the right side of the threshold.
        auroc: probability that a positive prompt scores above a negative one, ties counted half; `None` if there are no
            positive or no negative prompts.
    """

    accuracy: float
    auroc: float | None


@dataclass(frozen=True)
class GuardReport:
    """Scores beside behaviour.

    Attributes:
        groups: by behaviour and kind.
        unclear: prompts whose replies were neither; they count for harm and not for refusal.
        harm_on_harm, refusal_on_refusal: each score on its own question.
        harm_on_refusal, refusal_on_harm: each on the other's. A harm score that foresees refusal as well as harm, on
            prompts where the two come apart, has not been told from it.
    """

    groups: dict[Behaviour, dict[Kind, Group]]
    unclear: int
    harm_on_harm: Quality
    harm_on_refusal: Quality
    refusal_on_harm: Quality
    refusal_on_refusal: Quality

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def assess(
    guard: LatentGuard,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    judge: JudgeFunction,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> GuardReport:
    """Score held-out prompts, generate replies to them and lay the two side by side.

    Where `torch.distributed` runs, all processes call this alike and get the same report.

    Args:
        harmful, harmless: prompts that the guard was not fitted to.
        judge: sorts the replies.
        max_new_tokens, batch_size: of the replies.
        batch_tokens: most tokens of a forward pass; what memory allows by default.
        progress: called with the number of replies finished after each batch.

    Raises:
        InputError: no prompts, or as for `LatentGuard.scores`.
    """
    for name, given in (("harmful", harmful), ("harmless", harmless)):
        if not given:
            raise InputError(f"`{name}` has no prompts; expected at least one. Give some.")
    prompts = [*harmful, *harmless]
    harm, refusal = guard.scores(model, tokenizer, prompts, batch_tokens=batch_tokens)
    said = verdicts(
        model, tokenizer, prompts, judge, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    is_harmful = torch.arange(len(prompts)) < len(harmful)
    was_refused, was_accepted = (
        torch.tensor([verdict == name for verdict in said]) for name in ("refused", "complied")
    )
    above = (harm > guard.harm.threshold, refusal > guard.refusal.threshold)
    behaviours = {"refused": was_refused, "accepted": was_accepted}
    kinds = {"harmful": is_harmful, "harmless": ~is_harmful}
    groups = {
        behaviour: {kind: _group(behaviours[behaviour] & kinds[kind], (harm, refusal), above) for kind in KINDS}
        for behaviour in BEHAVIOURS
    }
    clear = was_refused | was_accepted

    def quality(scores: torch.Tensor, threshold: float, truth: torch.Tensor, rows: torch.Tensor) -> Quality:
        return _quality(scores[rows], threshold, truth[rows])

    everything = torch.ones_like(clear)
    return GuardReport(
        groups,
        int((~clear).sum()),
        quality(harm, guard.harm.threshold, is_harmful, everything),
        quality(harm, guard.harm.threshold, was_refused, clear),
        quality(refusal, guard.refusal.threshold, is_harmful, everything),
        quality(refusal, guard.refusal.threshold, was_refused, clear),
    )


def _group(rows: torch.Tensor, scores: tuple[torch.Tensor, ...], above: tuple[torch.Tensor, ...]) -> Group:
    count = int(rows.sum())
    means = [float(values[rows].double().mean()) if count else None for values in (*scores, *above)]
    return Group(count, *means)


def _quality(scores: torch.Tensor, threshold: float, truth: torch.Tensor) -> Quality:
    right = (scores > threshold) == truth
    return Quality(float(right.double().mean()) if len(right) else 0.0, auroc(scores[truth], scores[~truth]))


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float | None:
    """Share of pairs of a `positive` (`[N]`) and a `negative` (`[M]`) score in which the positive one is greater.

    Ties count half; `None` without pairs.
    """
    if not len(positive) or not len(negative):
        return None
    ordered = negative.sort().values
    below, up_to = (torch.searchsorted(ordered, positive, right=right).double().sum() for right in (False, True))
    return float(below + up_to) / (2 * len(positive) * len(negative))
