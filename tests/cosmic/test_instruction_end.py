"""Where the user's text ends in a prompt, whatever the template and however the tokenizer merges."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cosmic import InputError
from cosmic.prompts import PromptEncoder
from cosmic.studies.instruction_end import InstructionEnd
from tests.cosmic.tiny import build_tokenizer

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why not?"}]


@pytest.mark.parametrize("prompt", ["a", "Why is it?", "Do it.  ", "Tell me\n", "snow ☃", "assistant", SYSTEM])
def test_the_users_last_token_is_found(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    end = InstructionEnd(tokenizer)
    assert end.after == "<|end|>\n<|assistant|>\n"
    ids, position = end.encode(prompt)
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    assert ids == PromptEncoder(tokenizer).encode(prompt)
    assert tokenizer.decode(ids[position + 1 :]) == text[len(text.rstrip()) :] + end.after
    assert tokenizer.decode(ids[: position + 1]).endswith(text.rstrip())
    assert position == (-5 if text == text.rstrip() else -4 - len(tokenizer.encode(text[len(text.rstrip()) :])) - 1)


def merging_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that makes one token of a question mark and a line break."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["who?\n", "why?\n", "how?\n"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = template
    return fast


def test_a_merged_last_token_holds_the_end_of_the_text_and_counting_template_tokens_would_miss_it() -> None:
    fast = merging_tokenizer("{% for message in messages %}Q: {{ message['content'] }}\nA:{% endfor %}")
    end = InstructionEnd(fast)
    assert end.after == "\nA:"
    ids, position = end.encode("Who is it?")
    assert fast.decode([ids[position]]) == "?\n"
    assert position == -len(end.encoder.post_instruction) - 1, (
        "here the template's first character is lost to the text"
    )
    ids, position = end.encode("Say it")
    assert fast.decode([ids[position]]) == "t"
    assert position == -len(end.encoder.post_instruction) - 2, "counting would have given the line break"


def test_one_token_after_the_text_is_enough_and_none_is_refused() -> None:
    one = build_tokenizer("{% for message in messages %}<|user|>{{ message['content'] }}<|assistant|>{% endfor %}")
    ids, position = InstructionEnd(one).encode("Why?")
    assert (position, one.decode([ids[-1]])) == (-2, "<|assistant|>")
    with pytest.raises(InputError, match="does not end in a user's message"):
        InstructionEnd(one).encode([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    none = build_tokenizer("{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}")
    with pytest.raises(InputError, match="puts nothing after the user's text"):
        InstructionEnd(none)


def test_a_template_that_is_merged_into_the_text_as_a_whole_is_refused_for_that_prompt() -> None:
    merging = merging_tokenizer("{% for message in messages %}Q: {{ message['content'] }}\n{% endfor %}")
    assert InstructionEnd(merging).encode("Say it")[1] == -2
    with pytest.raises(
        InputError, match="the last token of the prompt 'Who is it\\?' holds the end of the user's text"
    ):
        InstructionEnd(merging).encode("Who is it?")
