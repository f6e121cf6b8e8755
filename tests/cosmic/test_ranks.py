"""Dividing work among processes: every item once, every process as many, all with the same sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, multiprocessing

from cosmic import ranks

WORLD = 3


@given(total=st.integers(1, 40), world=st.integers(1, 9))
def test_every_item_counts_once_and_every_rank_has_as_many(total: int, world: int) -> None:
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "rank_count", lambda: world)
        for rank in range(world):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            shares.append(ranks.share(total))
    assert {len(share.indices) for share in shares} == {-(-total // world)}
    counted = [index for share in shares for index in share.indices[: share.counted]]
    assert sorted(counted) == list(range(total))
    assert all(0 <= index < total for share in shares for index in share.indices)


def test_alone_nothing_is_shared() -> None:
    share = ranks.share(5)
    assert (share.indices, share.counted) == ([0, 1, 2, 3, 4], 5)
    assert share.joined(["a", "b", "c", "d", "e"]) == ["a", "b", "c", "d", "e"]
    values = torch.rand(3)
    assert ranks.summed(values) is values
    ranks.require_same([values], "values")


def _process(rank: int, store: str, found: Any) -> None:
    """One of several processes; what it finds goes to `found`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    generator = torch.Generator().manual_seed(rank)
    values = torch.rand(1000, generator=generator).half()
    share = ranks.share(7)
    joined = share.joined([f"{index} by {rank}" for index in share.indices])
    same = torch.arange(4.0)
    ranks.require_same([same, same > 1], "directions")
    message = ""
    try:
        ranks.require_same([same, same + (1e-7 if rank == 2 else 0)], "directions")
    except RuntimeError as error:
        message = str(error)
    found[rank] = (ranks.summed(values), values, joined, message)
    distributed.destroy_process_group()


def test_sums_and_joined_results_are_the_same_everywhere(tmp_path: Path) -> None:
    with multiprocessing.Manager() as manager:
        shared = manager.dict()
        multiprocessing.spawn(_process, (str(tmp_path / "store"), shared), nprocs=WORLD)
        found = dict(shared)
    parts = [found[rank][1] for rank in range(WORLD)]
    total = found[0][0]
    assert total.dtype == torch.float64
    assert torch.equal(total, torch.stack(parts).double().sum(0))  # halves have exact sums in float64
    for rank in range(WORLD):
        assert torch.equal(found[rank][0], total)
        assert found[rank][2] == [f"{index} by {index % WORLD}" for index in range(7)]
        assert found[rank][3].startswith("directions differ between processes (checksums [")
