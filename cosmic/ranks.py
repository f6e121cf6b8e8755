"""One computation on several processes ("ranks"): who works on what, and how the parts come together.

Without `torch.distributed` there is one rank and every function here is trivial. With it, all ranks call the same functions in
the same order, and `share` gives all of them equally many items: where weights are sharded (DeepSpeed ZeRO-3, FSDP) every
forward pass is a meeting of all ranks, and one pass more on one of them would wait for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def rank_count() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@dataclass(frozen=True)
class Share:
    """What one rank works on.

    Attributes:
        indices: numbers of items; as many on every rank, so the last may be one that another rank counts.
        counted: how many of `indices`, from the first, this rank's results count for.
        total: items of all ranks together.
    """

    indices: list[int]
    counted: int
    total: int

    def of(self, items: Sequence[T]) -> list[T]:
        """This rank's items."""
        return [items[index] for index in self.indices]

    def joined(self, results: Sequence[T]) -> list[T]:
        """All ranks' results in the order of the items, on every rank.

        Args:
            results: one for each of `indices`; must be picklable.
        """
        found = dict(zip(self.indices[: self.counted], results[: self.counted], strict=True))
        for part in from_all(found):
            found |= part
        return [found[index] for index in range(self.total)]


def share(total: int) -> Share:
    """This rank's share of `total` items: every n-th, and then repeats until all ranks have as many."""
    ranks = rank_count()
    own = list(range(rank(), total, ranks))
    missing = -(-total // ranks) - len(own)
    return Share(own + [index % total for index in range(missing)], len(own), total)


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks in float64, bit for bit the same on each of them."""
    if rank_count() == 1:
        return values
    total = values.detach().to(_meeting_place(), torch.float64, copy=True)
    distributed.all_reduce(total)
    return total.to(values.device)


def require_same(tensors: Sequence[torch.Tensor], what: str) -> None:
    """Compare the tensors' checksums over all ranks.

    Raises:
        RuntimeError: ranks have different ones; going on would train each of them against another adversary.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found = from_all(digest.hexdigest()[:12])
    if len(set(found)) > 1:
        raise RuntimeError(f"{what} differ between processes (checksums {found}); this is a defect, please report it.")


def from_all(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks."""
    if rank_count() == 1:
        return [value]
    values: list[Any] = [None] * rank_count()
    distributed.all_gather_object(values, value)
    return values


def _meeting_place() -> torch.device:
    """Where tensors have to be for the process group's backend."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "gloo" in distributed.get_backend():
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are spread over ranks (ZeRO-3, FSDP2) at this moment, so that a forward pass is a meeting of all."""
    return any(isinstance(weight, DTensor) or _is_apart(weight) for weight in model.parameters())


def _is_apart(weight: torch.Tensor) -> bool:
    """Whether DeepSpeed has taken the weight apart."""
    return hasattr(weight, "ds_id") and weight.numel() != weight.ds_numel  # type: ignore[attr-defined]


def input_device(embedding: nn.Module) -> torch.device:
    """Where token ids have to be for a model with this embedding; a sharded weight may rest elsewhere than it is used."""
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(weight, DTensor):
        kind = weight.device_mesh.device_type
        return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device("cpu")
    return _meeting_place() if _is_apart(weight) else weight.device
