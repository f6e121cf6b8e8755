"""What does a hardening step cost beside a plain SFT step? Paired and interleaved on the same batches.

    python benchmarks/training.py --model organism --adversaries cosmic layerwise static --json training.json

Each pair times one step of `RefatTrainer` and one of `trl.SFTTrainer`, in alternating order: forward, backward and refresh
of the directions, without the optimizer; medians and the median ratio are printed. Re-identification is timed apart.
"""

import argparse
import ctypes
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from trl import SFTTrainer

from cosmic.extraction import extract
from cosmic.loading import load_model, load_tokenizer
from cosmic.storage import write_json
from refat.config import RefatConfig
from refat.data.organism import direction_prompts, organism_rows
from refat.data.schema import to_dataset
from refat.trainer import RefatTrainer


def trainers(model: str, adversary: str, batch_size: int, folder: str) -> tuple[RefatTrainer, SFTTrainer]:
    """A hardening trainer and a plain one, ready to step, on equal models and rows."""
    tokenizer, rows = load_tokenizer(model), to_dataset(organism_rows(0, 40 * batch_size))
    harmful, harmless = direction_prompts(256)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size,
        "extraction_train_prompts": 96,
        "extraction_validation_prompts": 32,
        "max_length": 96,
    }
    hardening = RefatTrainer(
        load_model(model),
        RefatConfig(adversary=adversary, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        harmful=harmful,
        harmless=harmless,
        peft_config=lora,
    )
    config = RefatConfig(adversary="none", **settings)
    plain = SFTTrainer(load_model(model), config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    return hardening, plain


def measure(model: str, adversary: str, batch_size: int, pairs: int) -> dict[str, Any]:
    """Seconds of paired steps; the row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        hardening, plain = trainers(model, adversary, batch_size, folder)
        started = time.perf_counter()
        prompts = direction_prompts(256)
        found = extract(hardening.model, hardening.processing_class, *prompts, hardening.refat_args.extraction())
        extraction = time.perf_counter() - started
        hardening.reselect(found)
        batches = [iter(trainer.get_train_dataloader()) for trainer in (hardening, plain)]
        seconds: list[list[float]] = [[], []]
        for pair in range(pairs + 3):
            for which in ((0, 1), (1, 0))[pair % 2]:
                trainer = (hardening, plain)[which]
                inputs = next(batches[which])
                trainer.model.train()
                trainer.state.global_step = pair
                trainer.current_gradient_accumulation_steps = 1
                started = time.perf_counter()
                trainer.training_step(trainer.model, inputs, None)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[which].append(time.perf_counter() - started)
                trainer.model.zero_grad()
        ours, theirs = seconds[0][3:], seconds[1][3:]
    # The mean carries the refreshes, which a median of single steps would hide.
    ratio = statistics.fmean(ours) / statistics.fmean(theirs)
    return {
        "model": model,
        "adversary": adversary,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "pairs": pairs,
        "step_seconds": statistics.median(ours),
        "sft_step_seconds": statistics.median(theirs),
        "step_ratio": ratio,
        "median_ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "extraction_seconds": extraction,
    }


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed, as it does by itself once large blocks have come and gone.

    Otherwise a step's time depends on how much memory was needed at once before it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc
        libc.mallopt(trim, 2**30)
        libc.mallopt(mmap, 2**27)


def main() -> None:
    """Measure, print, write."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="organism")
    parser.add_argument("--adversaries", nargs="+", default=["cosmic", "layerwise", "static"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=30, help="at most 37")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(arguments.model, name, arguments.batch_size, arguments.pairs) for name in arguments.adversaries]
    table = Table("adversary", "step, s", "SFT step, s", "ratio of means", "median ratio", "re-identification, s")
    for row in rows:
        numbers = ("step_seconds", "sft_step_seconds", "step_ratio", "median_ratio", "extraction_seconds")
        table.add_row(row["adversary"], *(f"{row[name]:.3f}" for name in numbers))
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
