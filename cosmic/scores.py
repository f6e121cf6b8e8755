"""What a candidate is judged by: the formulas, on states and logits that others have measured.

COSMIC judges by hidden states alone (§3.3): with a the harmless and b the harmful validation prompts, states averaged
over prompts at the outputs of the evaluation layers, last token,

    S_comply = cos( b under ablation , a clean )        S_refuse = cos( a under addition , b clean )

The substring baseline (Arditi et al. §2.3) judges by the log-odds of refusal tokens: *bypass* is its mean on b under
ablation, *induce* on a under addition. Both are filtered by the mean KL divergence of the next-token distribution on a
under ablation from the clean one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cosmic.errors import InputError


@dataclass(frozen=True)
class Scores:
    """Scores of all candidates, each `[P, L]` float64; not-a-number where one was not needed and not measured.

    `bypass` and `induce` are there for the substring method only. `unedited` is cos(b clean, a clean): what S_comply and
    S_refuse are if nothing is edited.
    """

    comply: torch.Tensor
    refuse: torch.Tensor
    kl: torch.Tensor
    bypass: torch.Tensor | None = None
    induce: torch.Tensor | None = None
    unedited: float = math.nan

    @classmethod
    def unmeasured(cls, positions: int, layers: int, *, substring: bool) -> Scores:
        """Maps to be filled in."""

        def empty() -> torch.Tensor:
            return torch.full((positions, layers), torch.nan, dtype=torch.float64)

        return cls(empty(), empty(), empty(), *((empty(), empty()) if substring else ()))

    @property
    def final(self) -> torch.Tensor:
        """What is maximised: S_comply + S_refuse, or -bypass."""
        return self.comply + self.refuse if self.bypass is None else -self.bypass

    def as_dict(self) -> dict[str, torch.Tensor]:
        """All score maps by name."""
        maps = {"comply": self.comply, "refuse": self.refuse, "kl": self.kl, "final": self.final}
        if self.bypass is not None and self.induce is not None:
            maps |= {"bypass": self.bypass, "induce": self.induce}
        return maps


def similarity(first: torch.Tensor, second: torch.Tensor, aggregate: Literal["concat", "mean"]) -> torch.Tensor:
    """Cosine of mean states `[..., K, d_model]` with `[K, d_model]`, layers joined or averaged first; `[...]` float64."""
    a, b = first.double(), second.double()
    if aggregate == "mean":
        return torch.nn.functional.cosine_similarity(a.mean(-2), b.mean(-2), dim=-1)
    return torch.nn.functional.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)


def kl_divergence(clean: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """KL(clean ‖ edited) of next-token distributions given as logits `[..., vocab]`; `[...]` in nats."""
    precise = torch.float32 if clean.device.type == "mps" else torch.float64
    p, q = clean.to(precise).log_softmax(-1), edited.to(precise).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def refusal_metric(logits: torch.Tensor, refusal_tokens: Sequence[int]) -> torch.Tensor:
    """log P(refusal) - log(1 - P(refusal)) for logits `[..., vocab]`; `[...]` (Arditi et al. §2.3)."""
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    probability = logits.to(precise).softmax(-1)[..., list(refusal_tokens)].sum(-1)
    epsilon = 1e-8
    return torch.log(probability + epsilon) - torch.log(1 - probability + epsilon)


def evaluation_layers(
    harmful_outputs: torch.Tensor, harmless_outputs: torch.Tensor, share: float, start: float
) -> list[int]:
    """L_low: the ⌈share · L⌉ layers from depth `start` on whose mean outputs are least alike (COSMIC §3.2), sorted.

    Args:
        harmful_outputs, harmless_outputs: `[L, d_model]`.
    """
    alike = torch.nn.functional.cosine_similarity(harmful_outputs, harmless_outputs, dim=-1)
    count = len(alike)
    wanted = max(1, int(-(-round(share * count, 9) // 1)))
    allowed = [layer for layer in range(int(start * count + 1e-9), count) if math.isfinite(float(alike[layer]))]
    if not allowed:
        raise InputError(
            "the model's hidden states are not finite at any layer that could be evaluated. Load it in bfloat16 or float32."
        )
    return sorted(sorted(allowed, key=lambda layer: (float(alike[layer]), layer))[:wanted])
