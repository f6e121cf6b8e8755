"""Editing the residual stream while a model runs.

Every intervention of the literature is one edit of a hidden state x along a unit vector r̂,

    x  +  (c - k r̂ᵀx) r̂                                       k = 1 replaces the component, k = 0 adds to it

* linear ablation (LCE):       k = 1, c = 0              at every site of every block
* addition:                    k = 0, c = α‖r‖           at the input of one block
* affine editing (ACE):        k = 1, c = r̂ᵀr⁻ + α‖r‖    at the input of one block
* layerwise ablation (RFA):    k = 1, c = r̂ₗᵀr⁻ₗ         at the input of each of the last blocks, r̂ₗ per layer

All tokens are edited, out of place and in float32 at least. Vector, c and k may differ from row to row of the batch,
and a mask may leave rows bit-identical; this is how a training batch holds edited and clean rows side by side.
Hooks do nothing while no edit is set for their site, hold no state between calls and draw nothing at random, so they
are right under gradient checkpointing as long as the edits stay set until backward has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cosmic.blocks import PLACES, Site, find_blocks, hidden_states, replace_hidden_states
from cosmic.errors import InputError


@dataclass(frozen=True)
class Edit:
    """One edit x + (offset - remove r̂ᵀx) r̂.

    Attributes:
        unit: r̂, of shape `[d_model]`, or `[batch, d_model]` for one direction per row; length 1 (or 0 for no edit).
        offset: c, a scalar tensor or `[batch]`.
        remove: k, a scalar tensor or `[batch]`.
        rows: which rows are edited, `[batch]` bool, or which tokens, `[batch, seq]` bool; `None` edits all.
    """

    unit: torch.Tensor
    offset: torch.Tensor
    remove: torch.Tensor
    rows: torch.Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Edit:
        """The same edit where the hidden states are."""
        rows = None if self.rows is None else self.rows.to(device)
        return Edit(self.unit.to(device, dtype), self.offset.to(device, dtype), self.remove.to(device, dtype), rows)


Edits = Mapping[Site, Sequence[Edit]]


def apply_edit(hidden: torch.Tensor, edit: Edit) -> torch.Tensor:
    """`hidden` (`[batch, seq, d_model]`) edited, in its own dtype; rows outside `edit.rows` come back bit for bit."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    edit = edit.to(hidden.device, dtype)
    edited = _edited(hidden.to(dtype), edit).to(hidden.dtype)
    if edit.rows is None:
        return edited
    chosen = edit.rows[:, None] if edit.rows.dim() == 1 else edit.rows
    return torch.where(chosen[..., None], edited, hidden)


def _edited(x: torch.Tensor, edit: Edit) -> torch.Tensor:
    """All of `x` edited; one edit for all rows is two passes over memory, a product with r̂ and an outer product added.

    Autocast would make both of these products in half precision.
    """
    one = edit.unit.dim() == 1 and edit.offset.dim() == edit.remove.dim() == 0
    if one and not torch.is_autocast_enabled(x.device.type):
        flat = x.reshape(-1, x.shape[-1])
        return torch.addr(flat, edit.offset - edit.remove * (flat @ edit.unit), edit.unit).view_as(x)
    unit = edit.unit if edit.unit.dim() == 1 else edit.unit[:, None, :]
    component = (x * unit).sum(-1, keepdim=True)
    return torch.addcmul(x, edit.offset[..., None, None] - edit.remove[..., None, None] * component, unit)


class Interventions:
    """Hooks on a model that apply whatever edits are set at the moment.

    As a context manager it puts the hooks on when entered and takes them off when left, and may be entered again.

    Args:
        model: any causal LM, wrapped or not.
        edits: the edits to start with.
        sites: where to put hooks; all sites by default.
        attach: put the hooks on at once, to stay until `remove`.

    Raises:
        InputError: the model has no such site.
    """

    def __init__(
        self, model: nn.Module, edits: Edits | None = None, sites: Iterable[Site] | None = None, attach: bool = True
    ) -> None:
        self._blocks = find_blocks(model)
        self._sites = self._blocks.sites() if sites is None else list(sites)
        missing = sorted(set(self._sites) - set(self._blocks.sites()))
        if missing:
            raise InputError(
                f"`{missing[0].place}` of layer {missing[0].layer} is no site of this model, which has layers 0 to "
                f"{len(self._blocks) - 1} with {', '.join(PLACES)} where they exist."
            )
        self._handles: list[RemovableHandle] = []
        self.edits = edits or {}
        if attach:
            self._attach()

    @property
    def edits(self) -> Edits:
        """The edits in force."""
        return self._edits

    @edits.setter
    def edits(self, edits: Edits) -> None:
        self._edits = edits
        self._placed: dict[tuple[Site, torch.device, torch.dtype], list[Edit]] = {}

    def _attach(self) -> None:
        if not self._handles:
            self._handles = [self._register(site) for site in self._sites]

    def _register(self, site: Site) -> RemovableHandle:
        if site.place == "block_input":
            block = self._blocks.layers[site.layer]
            return block.register_forward_pre_hook(lambda _, args: self._edited(site, args), prepend=True)
        writer = self._blocks.writer(site)
        return writer.register_forward_hook(lambda _, __, output: self._edited(site, output), prepend=True)

    def _edited(self, site: Site, value: object) -> object:
        if not self._edits.get(site):
            return None
        hidden = hidden_states(value)
        for edit in self._edits_beside(site, hidden):
            hidden = apply_edit(hidden, edit)
        return replace_hidden_states(value, hidden)

    def _edits_beside(self, site: Site, hidden: torch.Tensor) -> list[Edit]:
        """The site's edits on the device of `hidden`, moved there once and not at every call."""
        key = (site, hidden.device, torch.promote_types(hidden.dtype, torch.float32))
        if key not in self._placed:
            self._placed[key] = [edit.to(*key[1:]) for edit in self._edits[site]]
        return self._placed[key]

    def remove(self) -> None:
        """Take the hooks off; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        self._attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def intervene(model: nn.Module, edits: Edits) -> Interventions:
    """A context manager under which `model` runs with `edits`; hooks sit only where an edit is."""
    return Interventions(model, edits, sites=edits.keys(), attach=False)


def unit_vector(vector: torch.Tensor) -> torch.Tensor:
    """r̂ = r / ‖r‖ in float64; the zero vector stays zero, so that its edits do nothing."""
    vector = vector.double()
    norm = vector.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, vector / norm.clamp_min(torch.finfo(torch.float64).tiny), vector)


def _scalar(value: float | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def ablation(vector: torch.Tensor, sites: Iterable[Site]) -> dict[Site, list[Edit]]:
    """LCE: x - r̂r̂ᵀx at every one of `sites` (COSMIC §3; Arditi et al. eq. 4)."""
    edit = Edit(unit_vector(vector), _scalar(0), _scalar(1))
    return {site: [edit] for site in sites}


def addition(vector: torch.Tensor, layer: int, alpha: float = 1.0) -> dict[Site, list[Edit]]:
    """x + αr at the input of block `layer` (COSMIC §3; Arditi et al. eq. 3)."""
    offset = alpha * vector.double().norm()
    return {Site(layer, "block_input"): [Edit(unit_vector(vector), offset, _scalar(0))]}


def affine(vector: torch.Tensor, reference: torch.Tensor, layer: int, alpha: float = 0.0) -> dict[Site, list[Edit]]:
    """ACE: x - proj(x) + proj(r⁻) + αr at the input of block `layer` (COSMIC §3; Marshall et al.)."""
    unit = unit_vector(vector)
    offset = unit @ reference.double() + alpha * vector.double().norm()
    return {Site(layer, "block_input"): [Edit(unit, offset, _scalar(1))]}


def layerwise(vectors: torch.Tensor, references: torch.Tensor | None, first_layer: int) -> dict[Site, list[Edit]]:
    """RFA: x - r̂ₗr̂ₗᵀx + r̂ₗr̂ₗᵀr⁻ₗ at the input of each block from `first_layer` on (ReFAT eq. 3).

    Args:
        vectors: `[L, d_model]`, one direction per layer.
        references: `[L, d_model]`, the harmless means; `None` re-centres on zero.
        first_layer: the first edited block; the paper edits the last 75 %.
    """
    edits = {}
    for layer in range(first_layer, len(vectors)):
        unit = unit_vector(vectors[layer])
        offset = _scalar(0) if references is None else unit @ references[layer].double()
        edits[Site(layer, "block_input")] = [Edit(unit, offset, _scalar(1))]
    return edits


def stacked(parts: Sequence[Edits], rows_each: int) -> Edits:
    """Interventions at the same sites on one batch, whose first `rows_each` rows belong to the first, and so on."""
    if len(parts) == 1:
        return parts[0]
    return {
        site: [_stacked([part[site][place] for part in parts], rows_each) for place in range(len(edits))]
        for site, edits in parts[0].items()
    }


def _stacked(edits: Sequence[Edit], rows_each: int) -> Edit:
    if any(edit.rows is not None for edit in edits):
        raise ValueError("edits of some rows only cannot be put on one batch with others")
    unit, offset, remove = (
        torch.stack([getattr(edit, name) for edit in edits]).repeat_interleave(rows_each, dim=0)
        for name in ("unit", "offset", "remove")
    )
    return Edit(unit, offset, remove)


def combined(*parts: Edits) -> dict[Site, list[Edit]]:
    """Several interventions at once; at a shared site they apply in the given order."""
    merged: dict[Site, list[Edit]] = {}
    for part in parts:
        for site, edits in part.items():
            merged.setdefault(site, []).extend(edits)
    return merged
