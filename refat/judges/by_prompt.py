"""The judges as functions of prompt and reply, for `cosmic`, which knows nothing of evaluation items."""

from __future__ import annotations

import functools

from cosmic.errors import InputError
from cosmic.judging import Verdict
from cosmic.prompts import Prompt
from refat.data.schema import Item
from refat.judges.exact import ExactJudge
from refat.judges.substring import SubstringJudge
from refat.organism import grammar


def substring(prompt: Prompt, reply: str) -> Verdict:
    """Refusal phrases in the opening of the reply."""
    return SubstringJudge().judge(Item(prompt, "harmful"), reply).value


def exact(prompt: Prompt, reply: str) -> Verdict:
    """By the embedded model's grammar: the request is read off the prompt.

    Raises:
        InputError: the prompt is none of the grammar's requests.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    asked = next((found for words, found in _requests() if words in text), None)
    if asked is None:
        raise InputError(
            f"the `exact` judge knows only the embedded model's requests, not {text[:60]!r}. Use `--judge substring`."
        )
    return ExactJudge().judge(Item(prompt, asked.kind, grammar.answer(asked)), reply).value


@functools.cache
def _requests() -> list[tuple[str, grammar.Combination]]:
    """All that can be asked for, by the words that say it."""
    return [(f"{found.action.verb} {found.thing.name}", found) for found in grammar.combinations()]
