"""`refat eval`: evaluate any model, with or without an adapter, on prompt files or on the embedded model's own prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic.config import ExtractionConfig
from cosmic.errors import InputError
from cosmic.loading import check_model, load_model, load_tokenizer
from cosmic.prompt_split import split_prompts
from cosmic.prompts import Prompt
from refat import organism
from refat.attacks import check_attacks
from refat.data.schema import KINDS, Item
from refat.data.sources import DataSource, load_items
from refat.evaluate import Answering, Evaluation
from refat.framings import read_framings
from refat.judges import make_judge
from refat.preflight import check_adapter, check_items, skeleton

MOST_FOR_DIRECTIONS = 280


@dataclass
class EvaluationRun:
    """Settings of one evaluation.

    Attributes:
        files: prompts by kind. Without a harmful and a harmless file only the embedded model can be evaluated. Part of
            each is kept apart for finding directions and never scored.
        judge: by default `exact` for the embedded model's own prompts, else `substring`.
        framings: by default `organism` for the embedded model's own prompts, else `generic`.
    """

    model: str
    adapter: Path | None
    output: Path
    attacks: list[str]
    judge: str | None
    files: dict[str, Path | None]
    prompts: int
    max_new_tokens: int
    batch_size: int
    benign_under_attack: bool
    framings: str
    seed: int
    column: str | None = None

    def evaluate(self) -> dict[str, Any]:
        """Attack and count; the content of `results.json`.

        Raises:
            InputError: something cannot be used; found before the model is loaded.
        """
        given = any(path is not None for path in self.files.values())
        names = check_attacks(self.attacks)
        judge = make_judge(self.judge or ("substring" if given else "exact"))
        framings = read_framings(self.framings or ("generic" if given else "organism"))
        self._check_places()
        items, fitting = self._from_files() if given else self._embedded()
        check_items(items, judge)
        extraction = ExtractionConfig(seed=self.seed)
        split_prompts(fitting["harmful"], fitting["harmless"], extraction)
        check_model(self.model)
        tokenizer = load_tokenizer(self.model)
        if self.adapter is not None:
            check_adapter(skeleton(self.model), self.adapter)
        evaluation = Evaluation(
            self.model,
            items,
            fitting["harmful"],
            fitting["harmless"],
            extraction,
            names,
            framings,
            Answering(tokenizer, judge, self.max_new_tokens, self.batch_size),
            self.benign_under_attack,
        )
        adapters = {} if self.adapter is None else {"refat": self.adapter}
        return evaluation.run(load_model(self.model), adapters, self.output)

    def _check_places(self) -> None:
        counts = {"prompts": self.prompts, "max-new-tokens": self.max_new_tokens, "batch-size": self.batch_size}
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"`--{name}` is {value}; expected at least 1.")
        if self.adapter is not None and not (self.adapter / "adapter_config.json").is_file():
            raise InputError(
                f"`--adapter` `{self.adapter}` holds no adapter_config.json; expected the folder of a LoRA."
            )
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"`--output` `{self.output}` is a file; expected a folder. Choose another name.")
        taken = self.output.is_dir() and any(self.output.iterdir())
        if taken and not (self.output / "results.json").is_file():
            raise InputError(
                f"`--output` `{self.output}` is not empty and holds no evaluation. Choose another folder."
            )
        if (self.output / "run.json").is_file():
            raise InputError(f"`--output` `{self.output}` holds a training run. Choose another folder.")

    def _embedded(self) -> tuple[dict[str, list[Item]], dict[str, list[Prompt]]]:
        if self.model not in organism.NAMES:
            raise InputError(
                "`--harmful` and `--harmless` are missing; only the embedded model brings its own prompts."
            )
        items: dict[str, list[Item]] = {
            kind: load_items(DataSource("organism", kind, limit=self.prompts), self.seed) for kind in KINDS
        }
        fitting: dict[str, list[Prompt]] = {"harmful": [], "harmless": []}
        for kind, part in (("harmful", 1), ("harmless", 2), ("borderline", 2)):
            source = DataSource("organism", kind, split="train", limit=MOST_FOR_DIRECTIONS // part)
            found = [item.prompt for item in load_items(source, self.seed)]
            fitting["harmful" if kind == "harmful" else "harmless"] += found
        return items, fitting

    def _from_files(self) -> tuple[dict[str, list[Item]], dict[str, list[Prompt]]]:
        items: dict[str, list[Item]] = {kind: [] for kind in KINDS}
        fitting: dict[str, list[Prompt]] = {"harmful": [], "harmless": []}
        for kind in KINDS:
            path = self.files.get(kind)
            if path is None:
                if kind != "borderline":
                    raise InputError(
                        f"`--{kind}` is missing; expected a file of {kind} prompts, as directions need both classes."
                    )
                continue
            found = load_items(DataSource(str(path), kind, prompt_column=self.column), self.seed)
            random.Random(f"{self.seed} {kind}").shuffle(found)
            kept = (
                0
                if kind == "borderline"
                else min(MOST_FOR_DIRECTIONS, max(2, len(found) - self.prompts, len(found) // 3))
            )
            if len(found) <= kept:
                raise InputError(
                    f"`--{kind}` `{path}` has {len(found)} prompts; expected at least 3, as some are kept for directions."
                )
            if kept:
                fitting[kind] = [item.prompt for item in found[:kept]]
            items[kind] = found[kept:][: self.prompts]
        return items, fitting
