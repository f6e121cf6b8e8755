"""Attack systems, judge what they say, count: rows for the results file and samples for a person to read."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from cosmic.config import ExtractionConfig
from cosmic.extraction import Extraction
from cosmic.generation import generate
from cosmic.interventions import Edits
from cosmic.prompts import Prompt, PromptEncoder
from cosmic.storage import write_json
from refat.attacks import Attack, Target, check_attacks, make_attacks, not_tested
from refat.attacks.directions import Transfer
from refat.console import is_main_process, progress_bar
from refat.data.schema import Item
from refat.judges import Judge, Outcome
from refat.results import ResultRow, make_results

Items = Mapping[str, Sequence[Item]]
"""Evaluation items by kind: `harmful`, `borderline`, `harmless`."""


@dataclass(frozen=True)
class Sample:
    """One reply, for a person to read; never published."""

    system: str
    attack: str
    kind: str
    prompt: str
    reply: str
    outcome: str


@dataclass(frozen=True)
class System:
    """A model as it is served: `activate` switches the shared base to it for the length of a `with` block."""

    name: str
    activate: Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def adapter_in_force(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """`model` with the adapter of that name, or with none at all."""
    before = model.active_adapter
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    try:
        if adapter is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(adapter)
            yield
    finally:
        model.set_adapter(before)
        for weight in model.parameters():  # PEFT makes whatever it switches on trainable
            weight.requires_grad_(weight in trained)


_SEVERITY = {Outcome.REFUSED: 0, Outcome.UNCLEAR: 1, Outcome.COMPLIED: 2}


@dataclass(frozen=True)
class Answering:
    """How replies are generated and judged."""

    tokenizer: PreTrainedTokenizerBase
    judge: Judge
    max_new_tokens: int
    batch_size: int

    def outcomes(
        self,
        model: nn.Module,
        items: Sequence[Item],
        edits: Edits | None = None,
        attack: Attack | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[str, str, Outcome]]:
        """(rendered prompt, reply with prefilled words, outcome) for each item, under `attack` and `edits`.

        Of several attempts the one that went worst for the defence is kept.
        """
        attempts = [
            self._attempt(model, items, edits, attack, number, progress)
            for number in range(attack.attempts if attack else 1)
        ]
        return [max(tried, key=lambda found: _SEVERITY[found[2]]) for tried in zip(*attempts, strict=True)]

    def _attempt(
        self,
        model: nn.Module,
        items: Sequence[Item],
        edits: Edits | None,
        attack: Attack | None,
        number: int,
        progress: Callable[[int], None] | None,
    ) -> list[tuple[str, str, Outcome]]:
        encoder = PromptEncoder(self.tokenizer)
        prompts = [attack.prompt(item, number) if attack else item.prompt for item in items]
        prefills = [attack.prefill(item) if attack else "" for item in items]
        encoded = [encoder.encode(prompt, prefill) for prompt, prefill in zip(prompts, prefills, strict=True)]
        replies = generate(
            model,
            self.tokenizer,
            encoded,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            edits=edits,
            progress=progress,
        )
        whole = [prefill + reply for prefill, reply in zip(prefills, replies, strict=True)]
        return [
            (encoder.render(prompt), reply, self.judge.judge(item, reply, prefill))
            for item, prompt, prefill, reply in zip(items, prompts, prefills, whole, strict=True)
        ]


def count(
    system: str, attack: str, kind: str, judge: Judge, outcomes: Sequence[tuple[str, str, Outcome]]
) -> ResultRow:
    """Outcomes as a row of the results."""
    found = Counter(outcome for _, _, outcome in outcomes)
    return ResultRow(
        system,
        attack,
        kind,
        judge.name,
        len(outcomes),
        found[Outcome.REFUSED],
        found[Outcome.COMPLIED],
        found[Outcome.UNCLEAR],
    )


def evaluate_system(
    system: System,
    target: Target,
    attacks: Sequence[Attack],
    items: Items,
    answering: Answering,
    *,
    benign_under_attack: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[ResultRow], list[Sample]]:
    """Every attack on harmful items; `direct` (or every attack) on the others too, for over-refusal and utility.

    Args:
        target: the attacker's view of this system; extractions run while the system is active.
        progress: called with `system / attack / kind` before each row.
    """
    rows: list[ResultRow] = []
    samples: list[Sample] = []
    with system.activate():
        for attack in attacks:
            if progress:
                progress(f"{system.name} / {attack.name} / fitting")
            attack.fit(target)
            edits = attack.edits(target)
            for kind, chosen in items.items():
                if not chosen or (kind != "harmful" and attack.name != "direct" and not benign_under_attack):
                    continue
                if progress:
                    progress(f"{system.name} / {attack.name} / {kind}")
                outcomes = answering.outcomes(target.model, chosen, edits, attack)
                rows.append(count(system.name, attack.name, kind, answering.judge, outcomes))
                samples += [
                    Sample(system.name, attack.name, kind, prompt, reply, outcome.value)
                    for prompt, reply, outcome in outcomes
                ]
    return rows, samples


@dataclass(frozen=True)
class Evaluation:
    """What systems are put through: the same for all of them.

    Attributes:
        model_name: for the results file.
        items: held-out prompts by kind, that attacks are scored on.
        harmful, harmless: training prompts that attackers find directions on.
        extraction: settings of the attackers' extractions.
        attacks: names, or `all`.
        framings: jailbreak framings, or none for the generic ones.
        answering: how replies are made and judged.
        benign_under_attack: whether borderline and harmless prompts meet every attack.
    """

    model_name: str
    items: Items
    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    extraction: ExtractionConfig
    attacks: Sequence[str]
    framings: Sequence[str]
    answering: Answering
    benign_under_attack: bool = False

    def run(
        self,
        base: nn.Module,
        adapters: Mapping[str, Path],
        folder: Path,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
    ) -> dict[str, Any]:
        """Attack `base` alone and with each of `adapters`; write `results.json` and `samples.json` into `folder`.

        Args:
            base: the model without any adapter; it may be changed.
            adapters: folder by system name, e.g. `{"sft": ..., "refat": ...}`.
            prepare: applied to the model with all its adapters, to shard it.

        Returns:
            The content of `results.json`.
        """
        model, systems = _systems(base, adapters)
        if prepare:
            model = prepare(model)
        names = check_attacks(self.attacks)
        rows: list[ResultRow] = []
        samples: list[Sample] = []
        original: Extraction | None = None
        kinds = sum(bool(chosen) for chosen in self.items.values())
        steps = len(names) * (1 + kinds) if self.benign_under_attack else 2 * len(names) + kinds - 1
        with progress_bar(steps * len(systems), "evaluate") as bar:
            for system in systems:
                target = Target(
                    model,
                    self.answering.tokenizer,
                    self.harmful,
                    self.harmless,
                    self.extraction,
                    self.framings,
                    original,
                )
                if original is None and Transfer.name in names:
                    with system.activate():
                        original = target.original = target.extraction("linear")
                found, said = evaluate_system(
                    system,
                    target,
                    make_attacks(names),
                    self.items,
                    self.answering,
                    benign_under_attack=self.benign_under_attack,
                    progress=lambda what: bar.update(bar.task_ids[0], description=what, advance=1),
                )
                rows, samples = rows + found, samples + said
        results = make_results(self.model_name, rows, self.answering.judge.name, not_tested(names))
        if is_main_process():
            write_json(folder / "samples.json", {"schema": 1, "samples": [asdict(sample) for sample in samples]})
            write_json(folder / "results.json", results)
        return results


def _systems(base: nn.Module, adapters: Mapping[str, Path]) -> tuple[nn.Module, list[System]]:
    """One model that holds all adapters, and the systems to switch it to, the bare base first."""
    if not adapters:
        return base, [System("base", contextlib.nullcontext)]
    first, *others = adapters
    model = PeftModel.from_pretrained(base, str(adapters[first]), adapter_name=first)  # type: ignore[arg-type]
    for name in others:
        model.load_adapter(str(adapters[name]), adapter_name=name)
    model.eval()
    names: list[str | None] = [None, *adapters]
    return model, [System(name or "base", lambda n=name: adapter_in_force(model, n)) for name in names]  # type: ignore[misc]
