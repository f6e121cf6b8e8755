"""What a model does with prompts: its greedy replies, and what a judge says of each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from cosmic.blocks import causal_lm
from cosmic.errors import InputError
from cosmic.generation import generate
from cosmic.interventions import Edits
from cosmic.judging import JudgeFunction, Verdict
from cosmic.prompts import Prompt, PromptEncoder


def verdicts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    judge: JudgeFunction,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    edits: Edits | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """What `judge` says of the model's greedy reply to each prompt, in the given order.

    Several processes divide the prompts among them, and all get every verdict.

    Args:
        edits: interventions in force during the whole generation.
        progress: called with the number of replies finished after each batch.

    Raises:
        InputError: a setting below 1, or a prompt too long for the model.
    """
    check_generation(max_new_tokens, batch_size)
    encoder = PromptEncoder(tokenizer)
    encoded = [encoder.encode(prompt) for prompt in prompts]
    limit = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, encoded), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and a reply of `max_new_tokens` {max_new_tokens} exceed the model's limit of "
            f"{limit} tokens. Shorten or remove the prompt, or ask for shorter replies."
        )
    replies = generate(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        edits=edits,
        progress=progress,
    )
    return [judge(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]


def check_generation(max_new_tokens: int, batch_size: int) -> None:
    """Refuse settings of generation that are out of range."""
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"`{name}` is {value}; expected at least 1.")
