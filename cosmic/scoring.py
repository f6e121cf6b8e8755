"""How well each candidate switches refusal off and on.

COSMIC judges by hidden states alone (§3.3): with a the harmless and b the harmful validation prompts, states averaged
over prompts at the outputs of the evaluation layers, last token,

    S_comply = cos( b under ablation , a clean )        S_refuse = cos( a under addition , b clean )

The substring baseline (Arditi et al. §2.3) judges by the log-odds of refusal tokens: *bypass* is its mean on b under
ablation, *induce* on a under addition. Both are filtered by the mean KL divergence of the next-token distribution on a
under ablation from the clean one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cosmic import interventions
from cosmic.activations import Reading, read
from cosmic.blocks import find_blocks
from cosmic.candidates import Candidates
from cosmic.config import ExtractionConfig
from cosmic.interventions import Edits
from cosmic.ranks import rank_count, share

Encoded = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Scores:
    """Scores of all candidates, each `[P, L]` float64.

    `bypass` and `induce` are there for the substring method only.
    """

    comply: torch.Tensor
    refuse: torch.Tensor
    kl: torch.Tensor
    bypass: torch.Tensor | None = None
    induce: torch.Tensor | None = None

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


def evaluation_layers(candidates: Candidates, share: float, start: float) -> list[int]:
    """L_low: the ⌈share · L⌉ layers from depth `start` on whose mean outputs are least alike (COSMIC §3.2), sorted."""
    similarity = torch.nn.functional.cosine_similarity(candidates.harmful_outputs, candidates.harmless_outputs, dim=-1)
    count = len(similarity)
    wanted = max(1, int(-(-round(share * count, 9) // 1)))
    allowed = range(int(start * count), count)
    return sorted(sorted(allowed, key=lambda layer: (float(similarity[layer]), layer))[:wanted])


def similarity(first: torch.Tensor, second: torch.Tensor, aggregate: Literal["concat", "mean"]) -> float:
    """Cosine of two sets of states `[N, K, d_model]` averaged over prompts, layers joined or averaged; in float64."""
    a, b = first.double().mean(0), second.double().mean(0)
    if aggregate == "mean":
        a, b = a.mean(0), b.mean(0)
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def kl_divergence(clean: torch.Tensor, edited: torch.Tensor) -> float:
    """Mean over prompts of KL(clean ‖ edited) of next-token distributions, given as logits `[N, vocab]`, in nats."""
    p, q = clean.double().log_softmax(-1), edited.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def refusal_metric(logits: torch.Tensor, refusal_tokens: Sequence[int]) -> float:
    """Mean over prompts of log P(refusal) - log(1 - P(refusal)) for logits `[N, vocab]` (Arditi et al. §2.3)."""
    probability = logits.double().softmax(-1)[:, list(refusal_tokens)].sum(-1)
    epsilon = 1e-8
    return float((torch.log(probability + epsilon) - torch.log(1 - probability + epsilon)).mean())


def score_candidates(
    model: nn.Module,
    candidates: Candidates,
    harmful: Encoded,
    harmless: Encoded,
    *,
    layers: Sequence[int],
    config: ExtractionConfig,
    pad: int,
    refusal_tokens: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores of every candidate on encoded validation prompts; several processes divide the candidates among them.

    Args:
        layers: the evaluation layers.
        refusal_tokens: ids for the substring method.
        progress: called with (done, total) after each candidate of this process and those that others score meanwhile.
    """

    def run(prompts: Encoded, edits: Edits | None) -> Reading:
        return read(
            model,
            prompts,
            layers=layers,
            positions=[-1],
            place="output",
            batch_tokens=config.batch_tokens,
            pad=pad,
            edits=edits,
            logits=True,
        )

    count = len(harmful)
    both = [*harmful, *harmless]
    clean = run(both, None)
    assert clean.logits is not None
    clean_harmful, clean_harmless = clean.states[:count, 0], clean.states[count:, 0]

    def scores_of(cell: tuple[int, int]) -> list[float]:
        ablate, add = candidate_edits(model, candidates.vectors[cell], candidates.references[cell], cell[1], config)
        ablated, added = run(both, ablate), run(harmless, add)
        assert clean.logits is not None
        assert ablated.logits is not None
        assert added.logits is not None
        found = [
            similarity(ablated.states[:count, 0], clean_harmless, config.aggregate),
            similarity(added.states[:, 0], clean_harmful, config.aggregate),
            kl_divergence(clean.logits[count:], ablated.logits[count:]),
        ]
        if config.method == "substring":
            metrics = (refusal_metric(logits, refusal_tokens) for logits in (ablated.logits[:count], added.logits))
            found += metrics
        return found

    positions, depth = candidates.vectors.shape[:2]
    cells = list(itertools.product(range(positions), range(depth)))
    part = share(len(cells))
    found = []
    for done, cell in enumerate(part.of(cells), start=1):
        found.append(scores_of(cell))
        if progress:
            progress(min(done * rank_count(), len(cells)), len(cells))
    table = torch.tensor(part.joined(found), dtype=torch.float64).T
    return Scores(*table.reshape(-1, positions, depth))


def candidate_edits(
    model: nn.Module, vector: torch.Tensor, reference: torch.Tensor, layer: int, config: ExtractionConfig
) -> tuple[Edits, Edits]:
    """The ablation and the addition that a candidate is judged by."""
    if config.intervention == "linear":
        return (
            interventions.ablation(vector, find_blocks(model).sites()),
            interventions.addition(vector, layer, config.alpha),
        )
    return (
        interventions.affine(vector, reference, layer, 0.0),
        interventions.affine(vector, reference, layer, config.alpha),
    )
