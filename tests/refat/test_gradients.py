"""Losses and gradients of a perturbed step, against an oracle that shares no code with the trainer.

Under every kind of gradient checkpointing, with edits at every site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback

from refat.trainer import DRAWS, RefatTrainer, seeded_generator
from tests.refat.training import (
    SMALL,
    Recording,
    blocks_of,
    train,
)

TrainerOf = Callable[..., RefatTrainer]


def modes(model: nn.Module) -> set[str]:
    """The checkpointing that is really in force, block by block."""
    found = set()
    for block in blocks_of(model):
        if not getattr(block, "gradient_checkpointing", False):
            found.add("off")
        else:
            keywords = block._gradient_checkpointing_func.keywords  # type: ignore[union-attr]
            found.add("reentrant" if keywords.get("use_reentrant", True) else "non-reentrant")
    return found


class ModeAndCalls(TrainerCallback):
    """Notes the mode in force and how often the attention of the first block ran in a step."""

    def __init__(self, trainer: RefatTrainer) -> None:
        self.modes: set[str] = set()
        self.calls = 0
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.modes = modes(self.trainer.model)
        block = blocks_of(self.trainer.model)[0]
        block.self_attn.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))  # type: ignore[union-attr]

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls_in_training = self.calls


CHECKPOINTING = {
    "off": {"gradient_checkpointing": False},
    "non-reentrant": {
        "gradient_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant": {
        "gradient_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
}
FORMS = ("linear", "affine", "layerwise")


def oracle(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    plan: list[tuple[str, torch.Tensor, torch.Tensor, int] | None],
    layers: torch.Tensor,
    references: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by a forward with one simple hook per place, formulas written out row by row.

    Args:
        plan: for each row nothing, or (form, r, r⁻, layer).
        layers, references: r and r⁻ of every layer at the last token, for layerwise ablation.
    """

    def without(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return x - (x @ r / (r @ r))[:, None] * r

    def edited(x: torch.Tensor, layer: int, is_input: bool) -> torch.Tensor:
        new = []
        for state, row in zip(x, plan, strict=True):
            if row is None:
                new.append(state)
                continue
            form, r, mean, place = row
            if form == "linear":
                state = without(state, r)
            elif form == "affine" and is_input and layer == place:
                state = without(state, r) + (mean @ r / (r @ r)) * r
            elif form == "layerwise" and is_input and layer >= 1:  # the last three of four blocks
                own, own_mean = layers[layer], references[layer]
                state = without(state, own) + (own_mean @ own / (own @ own)) * own
            new.append(state)
        return torch.stack(new)

    handles = []
    for index, block in enumerate(blocks_of(model)):
        handles += [
            block.register_forward_pre_hook(lambda _, args, i=index: (edited(args[0], i, True), *args[1:])),
            block.self_attn.register_forward_hook(lambda _, __, out, i=index: (edited(out[0], i, False), *out[1:])),
            block.mlp.register_forward_hook(lambda _, __, out, i=index: edited(out, i, False)),
        ]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for handle in handles:
        handle.remove()
    return loss.detach(), gradients


@pytest.fixture
def one_step(trainer_of: TrainerOf) -> Callable[[str], tuple[RefatTrainer, dict[str, torch.Tensor], Recording]]:
    """A trainer before its step, the batch of that step and what was recorded in it, for a mode of checkpointing."""

    def run(mode: str) -> tuple[RefatTrainer, dict[str, torch.Tensor], Recording]:
        options = {
            "per_device_train_batch_size": 16,
            "ablation_probability": 0.8,
            "candidates": 100,
            "max_steps": 1,
            "learning_rate": 1e-30,
            **CHECKPOINTING[mode],
        }
        trainer = trainer_of(**options)
        counted = ModeAndCalls(trainer)
        trainer.add_callback(counted)
        inputs: dict[str, torch.Tensor] = {}
        step = trainer.training_step

        def keep(model: nn.Module, batch: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            inputs.update({name: value.clone() for name, value in batch.items()})
            trainer._refresh_if_due()
            counted.calls = 0
            return step(model, batch, *args, **kwargs)

        trainer.training_step = keep  # type: ignore[method-assign]
        recording = train(trainer)
        assert counted.modes == {mode}
        assert counted.calls_in_training == (1 if mode == "off" else 2)
        return trainer, inputs, recording

    return run


@pytest.mark.parametrize("mode", list(CHECKPOINTING))
def test_gradients_are_those_of_the_formulas_under_every_checkpointing(
    mode: str, one_step: Callable[[str], tuple[RefatTrainer, dict[str, torch.Tensor], Recording]]
) -> None:
    trainer, batch, recording = one_step(mode)
    state = trainer.adversary.state()
    vectors, references = state["vectors"].float(), state["references"].float()

    generator = seeded_generator(SMALL["seed"], 0, 0, DRAWS)
    chosen = (torch.rand(16, generator=generator) < 0.8) & (batch["kind"] == 0)
    forms = torch.multinomial(torch.ones(3, dtype=torch.float64), 16, replacement=True, generator=generator)
    picks = state["cells"][torch.randint(len(state["cells"]), (16,), generator=generator)]
    plan = [
        (FORMS[form], vectors[tuple(cell)], references[tuple(cell)], int(cell[1])) if drawn else None
        for drawn, form, cell in zip(chosen.tolist(), forms.tolist(), picks, strict=True)
    ]
    assert {row[0] for row in plan if row} == set(FORMS)
    assert any(row is None for row in plan)

    trainer.interventions.remove()
    trainer.model.eval()  # no checkpointing; there is no dropout
    loss, gradients = oracle(trainer.model, batch, plan, vectors[-1], references[-1])
    found = recording.gradients[0]
    assert torch.allclose(recording.losses[0], loss, rtol=1e-6)
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-7 + 1e-5 * float(expected.abs().max())), name


def test_oracle_notices_a_missing_edit(
    one_step: Callable[[str], tuple[RefatTrainer, dict[str, torch.Tensor], Recording]],
) -> None:
    trainer, batch, recording = one_step("off")
    trainer.interventions.remove()
    state = trainer.adversary.state()
    nothing = oracle(trainer.model.eval(), batch, [None] * 16, state["vectors"][-1], state["references"][-1])
    assert not torch.allclose(recording.losses[0], nothing[0], rtol=1e-4)
