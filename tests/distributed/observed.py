"""The recipe under observation: `observed.py NOTES CONFIG...` runs it once per settings file and writes `NOTES/rank-N.json`.

What may be asked of it by the environment:

* `FAULT=kind:rank:n` - the n-th time that this rank comes to such a place, the process kills itself: `step` (between forward
  and backward), `checkpoint` (its first files are written), `extraction` (among the candidates of a re-identification).
* `PAUSE=path` - after its second step the main process creates this file, and every step takes a second longer.
* `FOUR_BITS=1` - weights in 4 bits are used.
* `FORCE_FSDP=1` - Accelerate leaves FSDP out on CPU; telling it that the processes are GPU ones makes it shard all the same.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not os.environ.get("FOUR_BITS"):  # PEFT imports it where it is found, which takes seconds
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]

from refat.console import input_errors_as_one_line

RANK = int(os.environ.get("RANK", "0"))
RECIPE = Path(__file__).parents[2] / "recipes" / "refat_llama.py"


def force_fsdp() -> None:
    """Make Accelerate see GPU processes, which is all that it looks at when it decides about FSDP."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from refat import launch

    check = launch.check

    def forced(*args: Any) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        check(*args)

    launch.check = forced


def killing(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, before whose n-th call this process dies, if it is asked to."""
    wanted, rank, count = (os.environ.get("FAULT") or "none:0:0").split(":")
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if (wanted, int(rank), int(count)) == (kind, RANK, calls):
            print(f"killed in {kind}, call {calls}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def local_sizes(model: Any) -> tuple[int, int]:
    """How many elements of the blocks' frozen weights are on this process, and in all."""
    local = whole = 0
    for name, weight in model.named_parameters():
        if "layers" in name and not weight.requires_grad:
            local += weight.to_local().numel() if hasattr(weight, "to_local") else weight.data.numel()
            whole += getattr(weight, "ds_numel", weight.numel())
    return local, whole


def observe(notes: list[dict[str, Any]]) -> None:
    """Put the observer into `RefatTrainer`."""
    from accelerate import Accelerator

    import cosmic.stream
    from refat.trainer import RefatTrainer

    step, train, draw = RefatTrainer.training_step, RefatTrainer.train, RefatTrainer._draw_rows

    def observed_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        kinds = inputs["kind"].tolist()
        before = local_sizes(self.model)
        loss = step(self, model, inputs, *args, **kwargs)
        note = notes[-1]
        note["micro_steps"].append({"step": self.state.global_step, "loss": float(loss), "kinds": kinds})
        if len(note["micro_steps"]) == 1:
            layer = self.blocks.layers[0]
            checkpointing = getattr(layer, "_gradient_checkpointing_func", None)
            note |= {
                "processes": self.accelerator.num_processes,
                "wrapper": type(self.model_wrapped).__name__,
                "sizes": before,
                "checkpointing": bool(getattr(layer, "gradient_checkpointing", False)),
                "reentrant": bool(checkpointing and checkpointing.keywords.get("use_reentrant")),
                "dtype": str(self.accelerator.mixed_precision),
            }
        if os.environ.get("PAUSE") and self.state.global_step >= 1:
            if RANK == 0:
                Path(os.environ["PAUSE"]).touch()
            time.sleep(1)
        return loss

    def observed_draw(self: Any, *args: Any) -> torch.Tensor:
        rows = draw(self, *args)
        notes[-1].setdefault("draws", []).append(rows.tolist())
        return rows

    def observed_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        notes.append({"adversary": self.refat_args.adversary, "micro_steps": []})
        output = train(self, *args, **kwargs)
        notes[-1]["log"] = self.state.log_history
        return output

    RefatTrainer.training_step = observed_step  # type: ignore[method-assign]
    RefatTrainer.train = observed_train  # type: ignore[method-assign]
    RefatTrainer._draw_rows = observed_draw  # type: ignore[method-assign]
    RefatTrainer._save_rng_state = killing("checkpoint", RefatTrainer._save_rng_state)  # type: ignore[method-assign]
    Accelerator.backward = killing("step", Accelerator.backward)  # type: ignore[method-assign]
    cosmic.stream.forward = killing("extraction", cosmic.stream.forward)  # type: ignore[attr-defined]


def report_switch() -> Callable[[bool], None]:
    """Switches the report on and off: drawing it takes as long as a small run, and one per launch is enough."""
    from refat import harden

    show = harden.show

    def switch(on: bool) -> None:
        harden.show = show if on else lambda *_: None

    return switch


def main(folder: Path, configs: list[str]) -> None:
    """Run the recipe with each of `configs`."""
    torch.set_num_threads(1)
    if os.environ.get("FORCE_FSDP"):
        force_fsdp()
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    assert spec
    assert spec.loader
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    found: dict[str, list[dict[str, Any]]] = {}
    notes: list[dict[str, Any]] = []
    observe(notes)
    report = report_switch()
    for number, config in enumerate(configs):
        report(number == 0)
        notes.clear()
        sys.argv = [str(RECIPE), "--config", config]
        recipe.main()
        found[Path(config).stem] = list(notes)
        (folder / f"rank-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with input_errors_as_one_line():
        main(Path(sys.argv[1]), sys.argv[2:])
