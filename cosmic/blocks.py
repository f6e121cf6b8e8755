"""The decoder blocks of any Hugging Face causal LM and the modules that write into its residual stream.

Nothing here is a table of model families. The model is found inside PEFT, DDP, DeepSpeed or FSDP wrappers as the first
`PreTrainedModel`; its blocks are the one list of as many modules as the config has layers. Which children of a block
write into the residual stream is *measured* by one short forward pass: they are those whose outputs, added to the
block's input, give the block's output. So norms after a branch (Gemma), parallel branches (GPT-J), mixtures of experts
and hybrid mixers need no special case, and an architecture that works differently is refused, never half-edited.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from cosmic.errors import InputError
from cosmic.quantization import keep_differentiable
from cosmic.ranks import input_device

Place = Literal["block_input", "attention_output", "mlp_output"]
PLACES: tuple[Place, ...] = ("block_input", "attention_output", "mlp_output")


class Site(NamedTuple):
    """A point of the residual stream: `place` in the block of index `layer` (0-based)."""

    layer: int
    place: Place


@dataclass(frozen=True)
class DecoderBlocks:
    """The `L` blocks of a decoder.

    Attributes:
        layers: the blocks.
        writers: each block's modules that write into the residual stream, in the order they are called.
        hidden_size: `d_model`.
        bare: whether all blocks return hidden states alone, not in a tuple with something else.
    """

    layers: tuple[nn.Module, ...]
    writers: tuple[tuple[nn.Module, ...], ...]
    hidden_size: int
    bare: bool

    def __len__(self) -> int:
        return len(self.layers)

    def sites(self) -> list[Site]:
        """All sites of the model: every block input and every writer's output."""
        places = [PLACES[: 1 + len(writers)] for writers in self.writers]
        return [Site(layer, place) for layer, names in enumerate(places) for place in names]

    def writing_sites(self) -> list[Site]:
        """The input of the first block and all writers' outputs: what adds up to the whole residual stream.

        A component that is zero at all of these is zero at every block's input, up to rounding of the sums.
        """
        return [site for site in self.sites() if site.layer == 0 or site.place != "block_input"]

    def writer(self, site: Site) -> nn.Module:
        """The module whose output is added to the residual stream at `site`."""
        return self.writers[site.layer][PLACES.index(site.place) - 1]


_found: weakref.WeakKeyDictionary[nn.Module, DecoderBlocks] = weakref.WeakKeyDictionary()


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside any wrappers.

    Raises:
        InputError: there is none, or it is not a causal language model.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            config = module.config
            if config.is_encoder_decoder or not module.can_generate():
                raise InputError(
                    f"`model` is a {type(module).__name__}, which is not a decoder-only language model. "
                    "Give a causal LM (one that `AutoModelForCausalLM` loads)."
                )
            return module
    raise InputError(f"`model` of type {type(model).__name__} holds no Hugging Face `PreTrainedModel`.")


def find_blocks(model: nn.Module) -> DecoderBlocks:
    """The decoder blocks of `model`, measured once (one forward of four tokens), then remembered while they stay.

    Raises:
        InputError: the blocks or their writers cannot be told; the message lists what was found.
    """
    inner = causal_lm(model)
    layers = _block_list(inner)
    known = _found.get(inner)
    if known is None or known.layers != layers:
        keep_differentiable(inner)
        hidden_size = int(inner.config.get_text_config().hidden_size)
        writers, bare = _measure(model, layers)
        known = _found[inner] = DecoderBlocks(layers, writers, hidden_size, bare)
    return known


def _block_list(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    expected = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    matching = [child for child in lists.values() if len(child) == expected]
    if len(matching) != 1:
        sizes = [f"{name} ({len(child)} x {type(child[0]).__name__})" for name, child in lists.items() if len(child)]
        raise InputError(
            f"{type(model).__name__}: expected one list of {expected} decoder blocks in {type(decoder).__name__}, "
            f"found: {', '.join(sizes) or 'no module list'}. This architecture is not supported."
        )
    return tuple(matching[0])


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and checkpointing off, no gradients; every module's own mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _first(value: object) -> object:
    return next(iter(value), None) if isinstance(value, tuple) else value


def hidden_states(value: object) -> torch.Tensor:
    """The hidden states `[batch, seq, d_model]` in what a block or writer took or returned (a tensor or a tuple)."""
    first = _first(value)
    if not isinstance(first, torch.Tensor):
        raise InputError(f"expected hidden states, got {type(first).__name__}; this architecture is not supported.")
    return first


def replace_hidden_states(value: object, new: torch.Tensor) -> object:
    """`value` with its hidden states replaced by `new`."""
    return (new, *value[1:]) if isinstance(value, tuple) else new


def _measure(model: nn.Module, layers: Sequence[nn.Module]) -> tuple[tuple[tuple[nn.Module, ...], ...], bool]:
    """Each block's writers, and whether all blocks return hidden states alone."""
    inner = causal_lm(model)
    seen: list[dict[str, torch.Tensor | None]] = [{} for _ in layers]
    bare = []
    handles = []

    def keep(layer: int, name: str, value: object) -> None:
        first = _first(value)
        if name == "output":
            bare.append(isinstance(value, torch.Tensor))
        called_again = name in seen[layer]  # an edit of its output would hit both calls, so it is no writer
        seen[layer][name] = first.detach() if isinstance(first, torch.Tensor) and not called_again else None

    for index, block in enumerate(layers):
        handles.append(block.register_forward_pre_hook(lambda _, args, i=index: keep(i, "input", args)))
        handles.append(block.register_forward_hook(lambda _, __, output, i=index: keep(i, "output", output)))
        for name, child in block.named_children():
            handles.append(
                child.register_forward_hook(lambda _, __, output, i=index, n=name: keep(i, f"child {n}", output))
            )
    try:
        with evaluation_mode(model):
            device = input_device(inner.get_input_embeddings())
            model(input_ids=torch.arange(1, 5, device=device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    states = [{name: value for name, value in found.items() if value is not None} for found in seen]
    return tuple(_writers_of(inner, index, block, states[index]) for index, block in enumerate(layers)), all(bare)


def _writers_of(
    model: PreTrainedModel, index: int, block: nn.Module, seen: dict[str, torch.Tensor]
) -> tuple[nn.Module, ...]:
    """The children whose outputs make up the difference between the block's output and its input.

    Of all single children and pairs the best fit counts, as in low precision a small wrong one could fit, too. If
    several fit alike, as a branch and the dropout after it do, the last called is what is really added.
    """
    if "input" not in seen or "output" not in seen:
        raise InputError(
            f"{type(model).__name__}: block {index} ({type(block).__name__}) was not called once with hidden states "
            "as its first argument. This architecture is not supported."
        )
    change = seen["output"].cpu().double() - seen["input"].cpu().double()
    outputs = {
        name.removeprefix("child "): value.cpu().double()
        for name, value in seen.items()
        if name.startswith("child ") and value.shape == change.shape
    }
    fits = [
        (float((change - sum(outputs[name] for name in names)).abs().sum()), names)
        for count in (2, 1)
        for names in itertools.combinations(reversed(outputs), count)
    ]
    _, best = min(fits, key=lambda fit: fit[0], default=(math.inf, ()))
    rounding = 2 * torch.finfo(seen["output"].dtype).eps
    size = seen["input"].cpu().double().abs() + sum(outputs[name].abs() for name in best)
    error = (change - sum(outputs[name] for name in best)).abs()
    if not best or float((error <= rounding * size).double().mean()) < 0.99:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
        raise InputError(
            f"{type(model).__name__}: in block {index} ({type(block).__name__}) no one or two children add up to what "
            f"the block writes into the residual stream; found: {children}. This architecture is not supported."
        )
    return tuple(block.get_submodule(name) for name in reversed(best))
