"""Which prompts a run trains on, finds directions on, validates with and is scored on; none of the scored ones elsewhere."""

from __future__ import annotations

import random
from dataclasses import dataclass

from cosmic.prompts import Prompt
from refat.config import RefatConfig
from refat.data.mixing import mix
from refat.data.prefill import add_prefills
from refat.data.schema import KINDS, Item, Row
from refat.data.sources import load_items, load_source
from refat.framings import add_framings, read_framings
from refat.run_config import RunConfig


@dataclass(frozen=True)
class PromptSets:
    """The data of a run.

    Attributes:
        rows: training rows.
        harmful, harmless: distinct prompts to find directions on; borderline ones are harmless here.
        items: held-out prompts that are scored, by kind.
        validation: prompts of the drift record, by kind.
    """

    rows: list[Row]
    harmful: list[Prompt]
    harmless: list[Prompt]
    items: dict[str, list[Item]]
    validation: dict[str, list[Item]]


def load_prompt_sets(config: RunConfig, training: RefatConfig) -> PromptSets:
    """Load and mix what the configuration names.

    Raises:
        InputError: a source cannot be used.
    """
    seed = training.seed
    items, validation = _evaluation_items(config, seed)
    scored = {_key(item.prompt) for chosen in items.values() for item in chosen}
    sources = config.sources("data")
    loaded = [[row for row in load_source(source, seed) if _key(row["prompt"]) not in scored] for source in sources]
    plain = mix(loaded, [source.weight for source in sources], config.train_rows, seed)
    rows = add_framings(plain, read_framings(config.train_framings, "train_framings"), config.framing_share, seed)
    rows = add_prefills(rows, training.prefill_share, training.prefill_words, seed)
    return PromptSets(rows, *_direction_prompts(config, plain, scored, seed), items, validation)


def _evaluation_items(config: RunConfig, seed: int) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """Scored items and validation items, by kind; no prompt twice, and none in both."""
    test: dict[str, list[Item]] = {kind: [] for kind in KINDS}
    validation: dict[str, list[Item]] = {kind: [] for kind in KINDS}
    for name, chosen in (("eval_data", test), ("validation_data", validation)):
        for source in config.sources(name):
            chosen[source.kind] += load_items(source, seed)
    for kind in KINDS:
        distinct = list({_key(item.prompt): item for item in test[kind]}.values())
        random.Random(f"{seed} {kind}").shuffle(distinct)
        test[kind] = distinct[: config.eval_prompts]
        if not config.validation_data:
            validation[kind] = distinct[config.eval_prompts :]
        scored = {_key(item.prompt) for item in test[kind]}
        validation[kind] = [item for item in validation[kind] if _key(item.prompt) not in scored]
    return test, validation


def _key(prompt: Prompt) -> str:
    """What makes two prompts the same: their user texts, whatever the case, the spacing and the final mark."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [turn["content"] for turn in turns if turn["role"] == "user"]
    return " ".join(" ".join(texts).lower().split()).rstrip(".?! ")


def _direction_prompts(
    config: RunConfig, rows: list[Row], scored: set[str], seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Distinct harmful and harmless prompts, none of them `scored`."""
    found: dict[bool, dict[str, Prompt]] = {True: {}, False: {}}
    if config.direction_data:
        for source in config.sources("direction_data"):
            for item in load_items(source, seed):
                if _key(item.prompt) not in scored:
                    found[item.kind == "harmful"][_key(item.prompt)] = item.prompt
    else:
        for row in rows:
            turns = row["prompt"]
            prompt: Prompt = turns[0]["content"] if len(turns) == 1 else turns
            found[row["kind"] == "harmful"][_key(prompt)] = prompt
    return list(found[True].values()), list(found[False].values())
