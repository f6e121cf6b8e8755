"""Does a model see harm, and does it refuse? Two axes at two tokens (Zhao et al., LLMs Encode Harmfulness and Refusal
Separately; their *Latent Guard*). Used as

    guard = fit(model, tokenizer, harmful, harmless, judge=find_judge("substring"))
    harm, refusal = guard.scores(model, tokenizer, prompts)

Harm is read at t_inst, the last token of the user's text, from prompts that are harmful or not; refusal at t_post, the
last token of the template, from prompts that the model refused or answered. All states are block *outputs*.
The two can be told apart only if some harmful prompts are answered (jailbroken, say) or some harmless ones refused:
otherwise both axes are fitted to the same groups.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from cosmic.activations import read
from cosmic.blocks import causal_lm, find_blocks
from cosmic.errors import InputError
from cosmic.extraction import provenance
from cosmic.judging import VERDICTS, JudgeFunction, Verdict
from cosmic.probes import Probe, fit_probe
from cosmic.prompts import Prompt, pad_id
from cosmic.storage import read_json, read_tensors, write_json, write_tensors
from cosmic.studies.behaviour import check_generation, verdicts
from cosmic.studies.instruction_end import InstructionEnd

Method = Literal["centroid", "probe"]

SCHEMA = 1
FILE_NAME, TENSORS = "harmfulness.json", "harmfulness.safetensors"
FOLDS = 5


@dataclass(frozen=True)
class Axis:
    """What tells two groups of prompts apart at one token.

    Attributes:
        positive, negative: the groups' centroids μ₁ and μ₀, `[L, d_model]` float32: means of block outputs.
        layers: the layers whose scores are averaged.
        sizes: prompts in the positive and in the negative group.
        probe: logistic regressions at all layers (weight `[L, d_model]`, bias `[L]`), or `None` to score by centroids.
        accuracies: cross-validated accuracy of each layer's probe, both groups weighted equally; empty for centroids.
        threshold: a score above it is positive.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    layers: list[int]
    sizes: tuple[int, int]
    probe: Probe | None = None
    accuracies: list[float] = field(default_factory=list)
    threshold: float = 0.0

    @property
    def directions(self) -> torch.Tensor:
        """v = μ₁ - μ₀ of each layer (eq. 5), `[L, d_model]` float64."""
        return self.positive.double() - self.negative.double()

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """Scores `[N]` float64 of block outputs (`[N, L, d_model]`), averaged over `layers`.

        By centroids cos(h, μ₁) - cos(h, μ₀) (eq. 2-4), from -2 to 2; by probes the log-odds.
        """
        if self.probe is not None:
            return self.probe.logits(states)[:, self.layers].mean(1)
        states = states.double()
        near, far = (
            torch.nn.functional.cosine_similarity(states, centroid.double(), dim=-1)
            for centroid in (self.positive, self.negative)
        )
        return (near - far)[:, self.layers].mean(1)


@dataclass(frozen=True)
class LatentGuard:
    """Both axes of one model.

    Attributes:
        harm: at t_inst, positive is harmful.
        refusal: at t_post, positive is refused.
        method: how scores are made.
        settings: the model, the prompts' fingerprint and versions.
    """

    harm: Axis
    refusal: Axis
    method: Method
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def cosines(self) -> list[float]:
        """Cosine of the harm and the refusal direction at each layer; 0 where one has length zero."""
        found = torch.nn.functional.cosine_similarity(self.harm.directions, self.refusal.directions, dim=-1)
        return [float(value) for value in found]

    def scores(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        *,
        batch_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Harm and refusal scores of `prompts`, `[N]` float64 each; nothing is generated.

        Raises:
            InputError: no prompts, one whose t_inst and t_post are the same token, or another architecture.
        """
        blocks = find_blocks(model)
        if tuple(self.harm.positive.shape) != (len(blocks), blocks.hidden_size):
            raise InputError(
                f"the guard has {self.harm.positive.shape[0]} layers of width {self.harm.positive.shape[1]}; expected "
                f"{len(blocks)} of width {blocks.hidden_size}. Fit one to this model."
            )
        instruction, template = _states(model, tokenizer, prompts, batch_tokens)
        return self.harm.scores(instruction), self.refusal.scores(template)

    def calibrated(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        harmless: Sequence[Prompt],
        false_alarms: float = 0.05,
        *,
        batch_tokens: int | None = None,
    ) -> LatentGuard:
        """The same guard with the least harm threshold that at most a share `false_alarms` of `harmless` is above.

        Args:
            harmless: prompts that the guard was not fitted to.

        Raises:
            InputError: `false_alarms` is not in [0, 1), or as for `scores`.
        """
        check_false_alarms(false_alarms)
        harm, _ = self.scores(model, tokenizer, harmless, batch_tokens=batch_tokens)
        ranked = harm.sort(descending=True).values
        threshold = float(ranked[math.floor(false_alarms * len(ranked) + 1e-9)])
        return replace(self, harm=replace(self.harm, threshold=threshold))

    def save(self, folder: Path | str) -> None:
        """Write `harmfulness.json` and `harmfulness.safetensors`."""
        folder = Path(folder)
        tensors: dict[str, torch.Tensor] = {}
        record: dict[str, Any] = {"schema": SCHEMA, "method": self.method, "cosines": self.cosines}
        for name, axis in (("harm", self.harm), ("refusal", self.refusal)):
            tensors |= {f"{name}.positive": axis.positive, f"{name}.negative": axis.negative}
            if axis.probe is not None:
                tensors |= {f"{name}.weight": axis.probe.weight, f"{name}.bias": axis.probe.bias}
            parts = ("layers", "sizes", "accuracies", "threshold")
            record[name] = {part: getattr(axis, part) for part in parts}
        write_tensors(folder / TENSORS, tensors)
        write_json(folder / FILE_NAME, {**record, "settings": self.settings})

    @classmethod
    def load(cls, folder: Path | str) -> LatentGuard:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing, malformed, or of another schema.
        """
        folder = Path(folder)
        record, tensors = read_json(folder / FILE_NAME), read_tensors(folder / TENSORS)
        try:
            if record["schema"] != SCHEMA:
                raise InputError(
                    f"`{folder / FILE_NAME}` has schema {record['schema']!r}; expected {SCHEMA}. Fit again."
                )
            harm, refusal = (_axis_of(name, record, tensors) for name in ("harm", "refusal"))
            return cls(harm, refusal, record["method"], record["settings"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{folder}` does not hold a saved guard: {error!r}.") from error


def _axis_of(name: str, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Axis:
    part = record[name]
    first, second = part["sizes"]
    probe = Probe(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) if record["method"] == "probe" else None
    return Axis(
        tensors[f"{name}.positive"],
        tensors[f"{name}.negative"],
        part["layers"],
        (first, second),
        probe,
        part["accuracies"],
        part["threshold"],
    )


def fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    judge: JudgeFunction | None = None,
    refused: Sequence[Prompt] | None = None,
    accepted: Sequence[Prompt] | None = None,
    method: Method = "centroid",
    max_new_tokens: int = 64,
    batch_size: int = 64,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LatentGuard:
    """Fit both axes to one model.

    Where `torch.distributed` runs, all processes call this alike and get the same guard.

    Args:
        model: a causal LM, wrapped or not; it is left as it was.
        tokenizer: its tokenizer, with a chat template that puts something after the user's text.
        harmful, harmless: prompts for the harm axis. Jailbroken harmful and over-refused harmless ones among them keep it
            from following refusal.
        judge: sorts the replies to all of them into refused and accepted; unclear ones are left out.
        refused, accepted: prompts for the refusal axis instead, taken as they are; nothing is generated then.
        method: `centroid` for the paper's cosines over all layers, `probe` for logistic regressions, averaged over the
            layers whose cross-validated accuracy is within one standard error of the best layer's.
        max_new_tokens, batch_size: of the replies.
        batch_tokens: most tokens of a forward pass; what memory allows by default.
        seed: deals the prompts out to the folds of the cross-validation.
        progress: called with the number of replies finished after each batch.

    Raises:
        InputError: a group is empty (the message gives the counts), no judge and no groups, an unknown method, or a prompt
            or template whose t_inst and t_post cannot be told apart.
    """
    check_method(method)
    check_generation(max_new_tokens, batch_size)
    for name, given in (("harmful", harmful), ("harmless", harmless)):
        if not given:
            raise InputError(f"`{name}` has no prompts; expected at least one. Give some.")
    prompts = [*harmful, *harmless]
    instruction, template = _states(model, tokenizer, prompts, batch_tokens)
    settings = provenance(model, {"harmful": list(harmful), "harmless": list(harmless)})
    if refused is None and accepted is None:
        if judge is None:
            raise InputError("`judge` is missing; expected one, or the groups `refused` and `accepted`.")
        said = verdicts(
            model, tokenizer, prompts, judge, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
        _require_both(said)
        positive, negative = (
            template[[row for row, verdict in enumerate(said) if verdict == name]] for name in ("refused", "complied")
        )
        parts = {"harmful": said[: len(harmful)], "harmless": said[len(harmful) :]}
        settings["replies"] = {kind: {name: part.count(name) for name in VERDICTS} for kind, part in parts.items()}
    else:
        if not refused or not accepted:
            raise InputError(
                f"`refused` has {len(refused or ())} prompts and `accepted` {len(accepted or ())}; expected at least one in "
                "each, or neither given."
            )
        positive, negative = (_states(model, tokenizer, group, batch_tokens)[1] for group in (refused, accepted))
    return LatentGuard(
        _axis(instruction[: len(harmful)], instruction[len(harmful) :], method, seed),
        _axis(positive, negative, method, seed),
        method,
        settings,
    )


def _require_both(said: Sequence[Verdict]) -> None:
    """Refuse replies of which none, or all, are refusals."""
    counts = ", ".join(f"{said.count(name)} {name}" for name in VERDICTS)
    for verdict, verb in (("refused", "refused"), ("complied", "answered")):
        if verdict not in said:
            raise InputError(
                f"the model {verb} none of the {len(said)} prompts ({counts}), so its refusal cannot be located; expected "
                f"at least one. Give prompts that are {verb}, or another judge."
            )


def check_method(method: str) -> None:
    """Refuse an unknown way of scoring."""
    if method not in get_args(Method):
        raise InputError(f"`method` is {method!r}; expected one of {list(get_args(Method))}.")


def check_false_alarms(share: float) -> None:
    """Refuse a share that is none."""
    if not 0 <= share < 1:
        raise InputError(f"`false_alarms` is {share}; expected a share in [0, 1), such as 0.05.")


def _states(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch_tokens: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All blocks' outputs at t_inst and at t_post, `[N, L, d_model]` float32 each."""
    if not prompts:
        raise InputError("there are no prompts; expected at least one. Give some.")
    end = InstructionEnd(tokenizer)
    encoded = [end.encode(prompt) for prompt in prompts]
    limit = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids) for ids, _ in encoded)
    if limit is not None and longest > limit:
        raise InputError(f"a prompt has {longest} tokens; expected at most {limit}, the model's limit. Shorten it.")
    rows_of: dict[int, list[int]] = {}
    for row, (_, position) in enumerate(encoded):
        rows_of.setdefault(position, []).append(row)
    found: dict[int, torch.Tensor] = {}
    for position, rows in sorted(rows_of.items()):
        reading = read(
            model,
            [encoded[row][0] for row in rows],
            layers=range(len(find_blocks(model))),
            positions=[position, -1],
            place="output",
            pad=pad_id(tokenizer),
            batch_tokens=batch_tokens,
        )
        found |= dict(zip(rows, reading.states, strict=True))
    states = torch.stack([found[row] for row in range(len(encoded))])
    return states[:, 0], states[:, 1]


def _axis(positive: torch.Tensor, negative: torch.Tensor, method: Method, seed: int) -> Axis:
    plus, minus = (states.double().mean(0).float() for states in (positive, negative))
    sizes = (len(positive), len(negative))
    if method == "centroid":
        return Axis(plus, minus, list(range(positive.shape[1])), sizes)
    accuracies = cross_validated(positive, negative, seed)
    layers = best_layers(accuracies, sum(sizes))
    return Axis(plus, minus, layers, sizes, fit_probe(positive, negative), accuracies)


def cross_validated(positive: torch.Tensor, negative: torch.Tensor, seed: int = 0) -> list[float]:
    """Accuracy of probes at each layer on prompts they were not fitted to, the mean of both groups' accuracies.

    In at most 5 folds; both groups are divided over the folds evenly, in an order drawn by `seed`.

    Args:
        positive, negative: `[N, L, d_model]`.

    Raises:
        InputError: a group has fewer than two prompts.
    """
    sizes = (len(positive), len(negative))
    if min(sizes) < 2:
        raise InputError(
            f"`method` `probe` has groups of {sizes[0]} and {sizes[1]} prompts; expected at least 2 in each. Give more "
            "prompts, or use `centroid`."
        )
    folds = min(FOLDS, *sizes)
    rng = random.Random(seed)
    places = [torch.tensor(rng.sample([row % folds for row in range(size)], size)) for size in sizes]
    right = [torch.zeros(positive.shape[1], dtype=torch.float64) for _ in sizes]
    for fold in range(folds):
        probe = fit_probe(positive[places[0] != fold], negative[places[1] != fold])
        right[0] += (probe.logits(positive[places[0] == fold]) > 0).sum(0)
        right[1] += (probe.logits(negative[places[1] == fold]) <= 0).sum(0)
    return [float(value) for value in (right[0] / sizes[0] + right[1] / sizes[1]) / 2]


def best_layers(accuracies: Sequence[float], count: int) -> list[int]:
    """Layers whose accuracy is within one standard error, for `count` prompts, of the best."""
    best = max(accuracies)
    margin = math.sqrt(best * (1 - best) / count)
    return [layer for layer, accuracy in enumerate(accuracies) if accuracy >= best - margin - 1e-12]
