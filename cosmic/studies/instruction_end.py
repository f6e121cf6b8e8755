"""The last token of the user's text in a rendered prompt, t_inst, as against the last token of all, t_post.

The template's part after the text is found as what differently ending texts have in common at their end. Where a
tokenizer merges the end of the text with the beginning of that part (`?` and a line break, say), the merged token holds
the end of the text, so it is t_inst: it is found by characters, not by counting the template's tokens.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from cosmic.errors import InputError
from cosmic.prompts import Prompt, PromptEncoder, common_suffix

_PROBES = ("a", "Why is the sky blue?", "Say 7.", "x y z!")


class InstructionEnd:
    """Encodes prompts and says where the user's text ends.

    Args:
        tokenizer: must have a chat template.

    Raises:
        InputError: there is no chat template, or it puts nothing after the user's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.encoder = PromptEncoder(tokenizer)
        rendered = [self.encoder.render(text) for text in _PROBES]
        self.after = "".join(map(chr, common_suffix([list(map(ord, text)) for text in rendered])))
        """What the template puts between the user's text and the reply."""
        if not self.after:
            raise InputError(
                f"the chat template of `{tokenizer.name_or_path}` puts nothing after the user's text, so its last token is "
                "also the last of the prompt, and harmfulness and refusal cannot be read apart. Use a template that marks "
                "the end of the user's turn."
            )

    def encode(self, prompt: Prompt) -> tuple[list[int], int]:
        """Token ids of the rendered prompt, and the position of t_inst, negative from the end, at most -2.

        Raises:
            InputError: the prompt does not end in a user's text, or t_inst and t_post are one token.
        """
        if not isinstance(prompt, str) and (not prompt or prompt[-1]["role"] != "user"):
            raise InputError("a prompt does not end in a user's message; expected one. Remove what follows it.")
        text = self.encoder.render(prompt)
        told = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        body = text.removesuffix(self.after).rstrip()
        if not text.endswith(self.after) or not body:
            raise InputError(
                f"the chat template writes the prompt {told[:60]!r} so that it does not end in {self.after!r} as others do."
            )
        ids = self.encoder.encode(prompt)
        position = self._place(text, len(body), ids) - len(ids)
        if position >= -1:
            raise InputError(
                f"the last token of the prompt {told[:60]!r} holds the end of the user's text and all of the template's "
                "part after it, so harmfulness and refusal cannot be read apart. Remove the prompt or end it differently."
            )
        return ids, position

    def _place(self, text: str, end: int, ids: list[int]) -> int:
        """Index of the token that holds the character before `end`; of several, the last."""
        tokenizer, counted = self.encoder.tokenizer, len(ids) - len(self.encoder.post_instruction) - 1
        if not tokenizer.is_fast:  # it cannot say which characters a token has
            return counted
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return max((index for index, (start, stop) in enumerate(offsets) if start < end <= stop), default=counted)
