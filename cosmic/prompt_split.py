"""Prompts divided into those that directions are found on and those that score them, the same whatever order they come in."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence

from cosmic.config import ExtractionConfig
from cosmic.errors import InputError
from cosmic.prompts import Prompt


def split_prompts(
    harmful: Sequence[Prompt], harmless: Sequence[Prompt], config: ExtractionConfig
) -> dict[str, list[Prompt]]:
    """Distinct prompts of each class, shuffled and divided into train and validation, whatever order they come in.

    Raises:
        InputError: fewer than two distinct prompts of a class, an empty prompt, or a prompt in both classes.
    """
    parts: dict[str, list[Prompt]] = {}
    keys: dict[str, set[str]] = {}
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if isinstance(prompts, str):
            raise InputError(f"`{name}` is one text; expected a list of prompts. Put it into a list.")
        by_key = {_key(prompt, f"`{name}` prompt {row}"): prompt for row, prompt in enumerate(prompts, start=1)}
        keys[name] = set(by_key)
        distinct = [by_key[key] for key in sorted(by_key)]
        if len(distinct) < 2:
            raise InputError(
                f"`{name}` has {len(distinct)} distinct prompts; expected at least 2, one to find directions and one "
                f"to score them (the paper uses {config.train_prompts} and {config.validation_prompts})."
            )
        random.Random(config.seed).shuffle(distinct)
        wanted = config.train_prompts + config.validation_prompts
        train, validation = config.train_prompts, config.validation_prompts
        if len(distinct) < wanted:
            train = min(len(distinct) - 1, max(1, round(len(distinct) * train / wanted)))
            validation = len(distinct) - train
        parts[f"train_{name}"] = distinct[:train]
        parts[f"validation_{name}"] = distinct[train : train + validation]
    shared = keys["harmful"] & keys["harmless"]
    if shared:
        raise InputError(
            f"{len(shared)} prompts are in both `harmful` and `harmless`, such as {min(shared)}. Remove them from one."
        )
    return parts


def fingerprint(prompts: Mapping[str, Sequence[Prompt]]) -> str:
    """A hash of sets of prompts, by their names; a text and one user message with it are the same."""
    told = {name: [_plain(prompt) for prompt in values] for name, values in prompts.items()}
    return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()


def _key(prompt: Prompt, name: str) -> str:
    """What tells prompts apart: a text is the same as one user message with it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not all(_is_message(message) for message in messages):
        raise InputError(
            f"{name} is {str(prompt)[:60]!r}; expected a text, or a list of messages, each with a text as `role` and as "
            "`content`. Correct it."
        )
    if not messages or not messages[-1]["content"].strip():
        raise InputError(f"{name} is empty; expected a text or messages that end in one. Remove it.")
    turns = [(message["role"], message["content"]) for message in messages]
    if turns[-1][0] != "user":
        raise InputError(
            f"{name} ends in a message of the {turns[-1][0]}; expected the user's. Remove what follows it."
        )
    return repr(turns[0][1] if len(turns) == 1 else turns)


def _plain(prompt: Prompt) -> Prompt:
    """One user message as the text that it is; anything else as given."""
    if isinstance(prompt, str) or len(prompt) != 1 or prompt[0]["role"] != "user":
        return prompt
    return prompt[0]["content"]


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
