"""On the embedded model the choice agrees with what the authors' released code would compute.

That code differs from the paper, and from `cosmic`, in three ways: it averages states over the evaluation layers before the
cosine; it reads `output_hidden_states`, whose last entry is behind the final norm; and its hooks edit in place, so that
the states recorded at a block's input are the edited ones. It also rounds the number of evaluation layers down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cosmic import ExtractionConfig, extract
from cosmic.loading import load_model, load_tokenizer
from cosmic.prompt_split import split_prompts
from cosmic.prompts import PromptEncoder
from cosmic.scores import Scores
from cosmic.selection import select
from refat.data.organism import direction_prompts

Change = Callable[[torch.Tensor], None]
SETTINGS: dict[str, Any] = {"train_prompts": 32, "validation_prompts": 8, "aggregate": "mean"}


def hidden_states(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of `output_hidden_states[1:]` at the last token `[L, d_model]`, and the last tokens' logits."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, position_ids=position, output_hidden_states=True)
    states = torch.stack([layer[:, -1].double().mean(0) for layer in output.hidden_states[1:]])
    return states, output.logits[:, -1].double()


def in_place(model: PreTrainedModel, changes: dict[int, Change], everywhere: Change | None) -> list[Any]:
    """Hooks that overwrite block inputs, and the outputs of attention and MLP."""
    handles = []
    for layer, block in enumerate(model.get_decoder().layers):
        change = changes.get(layer, everywhere)
        if change is not None:
            handles.append(block.register_forward_pre_hook(lambda _, args, f=change: f(args[0])))
        if everywhere is not None:
            handles.append(block.self_attn.register_forward_hook(lambda _, __, out: everywhere(out[0])))
            handles.append(block.mlp.register_forward_hook(lambda _, __, out: everywhere(out)))
    return handles


def under(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *hooks: Any) -> tuple[torch.Tensor, torch.Tensor]:
    handles = in_place(model, *hooks)
    try:
        return hidden_states(model, prompts)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("intervention", ["linear", "affine"])
def test_the_choice_agrees(intervention: str) -> None:
    model, tokenizer = load_model("organism"), load_tokenizer("organism")
    config = ExtractionConfig(intervention=intervention, **SETTINGS)  # type: ignore[arg-type]
    prompts = direction_prompts(40)
    found = extract(model, tokenizer, *prompts, config)
    encoder = PromptEncoder(tokenizer)
    ids = {name: [encoder.encode(one) for one in part] for name, part in split_prompts(*prompts, config).items()}
    train = [hidden_states(model, ids[f"train_{kind}"])[0] for kind in ("harmful", "harmless")]
    low = torch.cosine_similarity(*train, dim=-1).argsort()[: int(0.1 * len(train[0]))]
    plain_b, _ = hidden_states(model, ids["validation_harmful"])
    plain_a, logits = hidden_states(model, ids["validation_harmless"])
    maps = [torch.zeros(found.vectors.shape[:2], dtype=torch.float64) for _ in range(3)]
    for row, layer in torch.cartesian_prod(*map(torch.arange, maps[0].shape)).tolist():
        r, origin = found.vectors[row, layer], found.references[row, layer]
        unit = r / r.norm().clamp_min(1e-12)
        to = float(unit @ origin) if intervention == "affine" else 0.0

        def ablate(x: torch.Tensor, unit: torch.Tensor = unit, to: float = to) -> None:
            x -= (x @ unit - to)[..., None] * unit

        def add(x: torch.Tensor, unit: torch.Tensor = unit, to: float = to, r: torch.Tensor = r) -> None:
            if intervention == "affine":
                x -= (x @ unit - to)[..., None] * unit
            x += r

        hooks = ({}, ablate) if intervention == "linear" else ({layer: ablate}, None)
        ablated_b, _ = under(model, ids["validation_harmful"], *hooks)
        _, moved = under(model, ids["validation_harmless"], *hooks)
        added_a, _ = under(model, ids["validation_harmless"], {layer: add}, None)
        pairs = ((ablated_b, plain_a), (added_a, plain_b))
        maps[0][row, layer], maps[1][row, layer] = (
            torch.cosine_similarity(one[low].mean(0), two[low].mean(0), dim=0) for one, two in pairs
        )
        p, q = logits.log_softmax(-1), moved.log_softmax(-1)
        maps[2][row, layer] = (p.exp() * (p - q)).sum(-1).mean()
    published = select(Scores(*maps), found.positions, found.vectors.norm(dim=-1), config)
    assert published.chosen == found.selection.chosen
