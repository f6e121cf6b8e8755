"""How much fits into one forward pass: a number of tokens from a number of bytes, and what to do when it was too much."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from cosmic.blocks import causal_lm
from cosmic.errors import InputError
from cosmic.ranks import from_all, is_sharded

T = TypeVar("T")

GIB = 2**30
FREE_SHARE = 0.5
"""Share of an accelerator's free memory that passes may use if no budget is given."""
HOST_BUDGET = 0.25 * GIB
"""Bytes that passes may use on a CPU, where more rows at once do not run faster."""
MOST_TOKENS = {"cpu": 1024}
"""Tokens beyond which a pass gains nothing; elsewhere `MOST_TOKENS_ACCELERATOR`."""
MOST_TOKENS_ACCELERATOR = 65536


def tokens_per_pass(model: nn.Module, device: torch.device, memory_gib: float | None = None) -> int:
    """Tokens of one forward pass, padding included, whose working memory stays within the budget.

    The working memory of a token is taken as that of one block, its hidden states several times over and the MLP's inner
    states, in the model's precision and once more in float32, and of the outputs of all blocks, which may be recorded.
    Of several ranks the one with the least memory decides, so that all make the same passes.

    Args:
        memory_gib: the budget in GiB; by default half of what an accelerator has free, or 0.25 on a CPU.
    """
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    inside = max(int(getattr(config, "intermediate_size", 0) or 0), 4 * int(config.hidden_size))
    size, width = inner.dtype.itemsize, int(config.hidden_size)
    per_token = (8 * width + 3 * inside) * (4 + size) + int(config.num_hidden_layers) * width * size
    if memory_gib is not None:
        budget = memory_gib * GIB
    elif device.type == "cpu":
        budget = HOST_BUDGET
    else:
        kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        budget = FREE_SHARE * (torch.accelerator.get_memory_info(device)[0] + kept)
    tokens = max(1, min(int(budget / per_token), MOST_TOKENS.get(device.type, MOST_TOKENS_ACCELERATOR)))
    return min(from_all(tokens))


def run_within_memory(
    model: nn.Module, pieces: Iterable[T], run: Callable[[T], None], halves: Callable[[T], Sequence[T]]
) -> None:
    """Run every piece; one that does not fit into memory is cut in two and tried again, the others are not repeated.

    Args:
        run: does the work of a piece and keeps its result only when it has succeeded.
        halves: cuts a piece; fewer than two parts mean that it cannot be cut.

    Raises:
        InputError: a piece that cannot be cut does not fit.
    """
    waiting = deque(pieces)
    while waiting:
        piece = waiting.popleft()
        try:
            run(piece)
            continue
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # Where every pass is a meeting of all ranks, one that went back alone would leave the others waiting.
            parts = [] if is_sharded(model) else halves(piece)
            if len(parts) < 2:
                raise InputError(
                    "a forward pass does not fit into memory. Lower `batch_tokens`, shorten the longest prompts, or load "
                    "the model in fewer bits."
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        waiting.extendleft(reversed(parts))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out; on a CPU it is a `RuntimeError` like any other."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
