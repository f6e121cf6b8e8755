"""From instructions to token ids, through the tokenizer's own chat template.

The *post-instruction tokens* are what the template puts between the user's text and the assistant's first word;
candidate directions live there. They are found by rendering the template around different texts and taking what all
results end in, so there is no table of models, and no negative offset that could be off by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from cosmic.errors import InputError
from cosmic.ranks import rank, rank_count

Messages = list[dict[str, str]]
Prompt = str | Messages

_PROBE_SYSTEM = "Mind the 5 blue doors."
_PROBES = ("a", "Why is the sky blue?", "Say 7.", "x y z!")


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded prompts: `input_ids`, `attention_mask` (`[batch, seq]`) and each row's `length` (`[batch]`).

    Right padding keeps every real token at its natural place and after nothing but real tokens, so padding cannot
    change a result in any causal model, whether attention, recurrent or convolutional.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    length: torch.Tensor
    rows: torch.Tensor
    """`[batch]`, the index of each row among all prompts."""
    counted: torch.Tensor
    """`[batch]` bool, false for a row that only keeps this rank as busy as the others."""

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, rows: slice) -> TokenBatch:
        """Some of the rows, as long as the longest of them."""
        longest = int(self.length[rows].max())
        return TokenBatch(
            self.input_ids[rows, :longest],
            self.attention_mask[rows, :longest],
            self.length[rows],
            self.rows[rows],
            self.counted[rows],
        )

    def tiled(self, times: int) -> TokenBatch:
        """The batch several times over, one after the other."""
        if times == 1:
            return self
        return TokenBatch(
            self.input_ids.repeat(times, 1),
            self.attention_mask.repeat(times, 1),
            self.length.repeat(times),
            self.rows.repeat(times),
            self.counted.repeat(times),
        )

    def halves(self) -> list[TokenBatch]:
        """The batch in two, or as it is if it has one row."""
        middle = len(self) // 2
        return [self.part(slice(middle)), self.part(slice(middle, None))] if middle else [self]

    def position_index(self, position: int) -> torch.Tensor:
        """`[batch]`, where the token `position` (negative, from the end of the prompt) is in each row."""
        return self.length + position


class PromptEncoder:
    """Renders and tokenizes prompts for one tokenizer.

    Args:
        tokenizer: must have a chat template.
        system_prompt: put before every prompt; merged into the first user turn if the template knows no system role.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of `{tokenizer.name_or_path}` has no chat template; expected a chat model. "
                "Use an instruction-tuned checkpoint or set `tokenizer.chat_template`."
            )
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        encoded = [self.encode(text) for text in _PROBES]
        self.post_instruction = tuple(common_suffix(encoded))
        """Ids of the template tokens after the instruction, generation prompt included."""

    def render(self, prompt: Prompt) -> str:
        """The text the model sees, ending where the assistant is to speak."""
        messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt is not None:
            messages = self._with_system_prompt(messages, self.system_prompt)
        try:
            return self._template(messages)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template refuses a prompt with the roles {roles}: {reason}.") from error

    def _with_system_prompt(self, messages: Messages, system_prompt: str) -> Messages:
        """The messages with the system prompt: in its own role, before the text of a system message, or the user's."""
        begins = messages[0]["role"] == "system"
        knows = self._has_system_role(messages[1:] if begins else messages)
        if knows and not begins:
            return [{"role": "system", "content": system_prompt}, *messages]
        if not system_prompt:
            return messages
        role = "system" if knows else "user"
        place = next((index for index, message in enumerate(messages) if message["role"] == role), 0)
        merged = {**messages[place], "content": f"{system_prompt}\n\n{messages[place]['content']}"}
        return [*messages[:place], merged, *messages[place + 1 :]]

    def _has_system_role(self, messages: Messages) -> bool:
        """Whether the template writes a system message before `messages`, and neither refuses nor ignores it."""
        try:
            return _PROBE_SYSTEM in self._template([{"role": "system", "content": _PROBE_SYSTEM}, *messages])
        except (jinja2.TemplateError, TypeError, ValueError):
            return False

    def _template(self, messages: Messages) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def encode(self, prompt: Prompt, prefill: str = "") -> list[int]:
        """Token ids of the rendered prompt, followed by the first words of an answer if `prefill` is given."""
        ids = self.tokenizer(self.render(prompt), add_special_tokens=False)["input_ids"]
        if prefill:
            ids = ids + self.tokenizer(prefill, add_special_tokens=False)["input_ids"]
        return list(ids)

    def positions(self, encoded: Sequence[Sequence[int]], most: int | None = None) -> list[int]:
        """Negative positions of the post-instruction tokens, e.g. `[-4, -3, -2, -1]`, that all `encoded` prompts have.

        A template without any (the user's text comes last) gives `[-1]`, the last token of the prompt.
        """
        count = len(self.post_instruction)
        for ids in encoded:
            while count and tuple(ids[-count:]) != self.post_instruction[-count:]:
                count -= 1
        count = max(count, 1) if most is None else max(1, min(count, most))
        return list(range(-count, 0))


def common_suffix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest run of ids that all `sequences` end in."""
    suffix: list[int] = []
    for column in zip(*(reversed(ids) for ids in sequences), strict=False):
        if len(set(column)) > 1:
            break
        suffix.append(column[0])
    return suffix[::-1]


def batches(
    encoded: Sequence[Sequence[int]], batch_tokens: int, pad_id: int, device: torch.device, *, shared: bool = False
) -> list[TokenBatch]:
    """`encoded` prompts in right-padded batches of like length; `TokenBatch.rows` tells which prompts they are.

    Args:
        batch_tokens: most tokens of a batch, padding included, unless it has one row.
        shared: deal the prompts out to all ranks; each gets as many batches of as many rows and columns, and the last row
            may be a repeat that is not counted.
    """
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    hands = rank_count() if shared else 1
    deals = [order[start : start + hands] for start in range(0, len(order), hands)]
    place = rank() if shared else 0
    found = []
    for run in length_groups([len(encoded[deal[-1]]) for deal in deals], batch_tokens):
        dealt = deals[run.start : run.stop]
        counted = torch.tensor([place < len(deal) for deal in dealt])
        rows = [deal[min(place, len(deal) - 1)] for deal in dealt]
        found.append(_padded(encoded, rows, len(encoded[dealt[-1][-1]]), counted, pad_id, device))
    return found


def length_groups(lengths: Sequence[int], batch_tokens: int, most_padding: float = 0.1) -> list[range]:
    """Ascending `lengths` cut into runs of at most `batch_tokens` tokens, padding included, or of one item.

    Args:
        most_padding: share of a run that may be padding, unless the run is smaller than a quarter of the budget.
    """
    groups: list[range] = []
    start = total = 0
    for index, length in enumerate(lengths):
        padded_size = (index + 1 - start) * length
        wasteful = padded_size - total - length > most_padding * padded_size and 4 * padded_size > batch_tokens
        if index > start and (padded_size > batch_tokens or wasteful):
            groups.append(range(start, index))
            start, total = index, 0
        total += length
    return [*groups, range(start, len(lengths))] if lengths else []


def _padded(
    encoded: Sequence[Sequence[int]],
    rows: Sequence[int],
    longest: int,
    counted: torch.Tensor,
    pad_id: int,
    device: torch.device,
) -> TokenBatch:
    length = torch.tensor([len(encoded[row]) for row in rows])
    input_ids = torch.full((len(rows), longest), pad_id)
    for line, row in enumerate(rows):
        input_ids[line, : len(encoded[row])] = torch.tensor(encoded[row])
    mask = (torch.arange(input_ids.shape[1])[None] < length[:, None]).long()
    return TokenBatch(input_ids.to(device), mask.to(device), length.to(device), torch.tensor(rows), counted)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with; which one does not matter, as padding is masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if isinstance(candidate, int):
            return candidate
    return 0
