"""What does extraction cost beside the published algorithm, and does it find the same?

    python benchmarks/extraction.py --models organism llama24 --interventions linear affine --json extraction.json

The published algorithm makes three whole passes over the validation prompts for every candidate, in batches of 32
(`benchmarks/naive_extraction.py`). Both run in one process on the same weights, prompts and precision; scores and choice
are compared. The breakdown is arithmetic on token counts (tokens times blocks), checked against what really passed.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent))
import naive_extraction

from cosmic.config import ExtractionConfig
from cosmic.extraction import Extraction, extract
from cosmic.loading import load_model, load_tokenizer
from cosmic.prompt_split import split_prompts
from cosmic.prompts import PromptEncoder
from cosmic.scores import Scores
from cosmic.selection import select, too_deep
from cosmic.storage import write_json
from cosmic.stream import common_prefix
from refat.data.organism import direction_prompts

SYSTEM_PROMPT = " ".join(["You are a helpful assistant. Answer in one short sentence."] * 2)
"""What makes the prompts of the random models begin with the same 34 tokens, in the embedded tokenizer."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama24": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "initializer_range": 0.06,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def build(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """The model, its tokenizer and the system prompt that makes its prefix."""
    tokenizer = load_tokenizer("organism")
    if name == "organism":
        return load_model("organism"), tokenizer, None
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **{"vocab_size": len(tokenizer), "max_position_embeddings": 512, **SHAPES[name]}
    )
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    return model.eval(), tokenizer, SYSTEM_PROMPT


class Meter:
    """Seconds, tokens times blocks, and bytes above what was there before."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.seconds = 0.0
        self.token_blocks = 0
        self.bytes = 0

    @contextmanager
    def running(self) -> Any:
        """Measure what runs within."""
        handles = [
            block.mlp.register_forward_pre_hook(lambda _, args: self._count(args[0]))
            for block in self.model.get_decoder().layers
        ]
        before = _reset_peak()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds = time.perf_counter() - started
            self.bytes = _peak() - before
            for handle in handles:
                handle.remove()

    def _count(self, hidden: torch.Tensor) -> None:
        self.token_blocks += hidden.shape[0] * hidden.shape[1]


def _reset_peak() -> int:
    """Forget the peak so far; the bytes in use now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(name: str, intervention: str, train: int, validation: int, positions: int | None) -> dict[str, Any]:
    """One row: the published algorithm and ours on one model."""
    model, tokenizer, system_prompt = build(name)
    config = ExtractionConfig(
        intervention=intervention,  # type: ignore[arg-type]
        train_prompts=train,
        validation_prompts=validation,
        system_prompt=system_prompt,
        system_prompt_on="both",
        positions=positions,
    )
    prompts = direction_prompts(train + validation)
    extract(model, tokenizer, *(part[:4] for part in prompts), config)  # the first pass of a process is slow
    ours = Meter(model)
    with ours.running():
        found = extract(model, tokenizer, *prompts, config)
    full = extract(model, tokenizer, *prompts, dataclasses.replace(config, full_map=True))
    encoder = PromptEncoder(tokenizer, system_prompt)
    parts = split_prompts(*prompts, config)
    harmful, harmless = (
        [encoder.encode(one) for one in parts[f"validation_{kind}"]] for kind in ("harmful", "harmless")
    )
    task = naive_extraction.Task(
        found.vectors.double(),
        found.references.double(),
        harmful,
        harmless,
        found.evaluation_layers,
        intervention == "affine",
    )
    naive = Meter(model)
    with naive.running():
        maps = naive_extraction.score(model, task)
    choice = select(Scores(**maps), found.positions, found.vectors.double().norm(dim=-1), config)
    differences = {f"max_{score}_difference": float((maps[score] - full.scores[score]).abs().max()) for score in maps}
    return {
        "model": name,
        "intervention": intervention,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(model.get_decoder().layers),
        "positions": len(found.positions),
        "train_prompts": train,
        "validation_prompts": validation,
        "prefix_tokens": len(common_prefix([*harmful, *harmless])),
        "mean_tokens": sum(map(len, [*harmful, *harmless])) / (2 * validation),
        "evaluation_layers": found.evaluation_layers,
        "chosen": [found.direction.position, found.direction.layer],
        "same_choice": choice.chosen == found.selection.chosen and choice.relaxed == found.selection.relaxed,
        "max_score_difference": max(differences.values()),
        **differences,
        "naive_seconds": naive.seconds,
        "seconds": ours.seconds,
        "ratio": naive.seconds / ours.seconds,
        "naive_token_blocks": naive.token_blocks,
        "token_blocks": ours.token_blocks,
        "token_block_ratio": naive.token_blocks / ours.token_blocks,
        "memory_ratio": ours.bytes / max(naive.bytes, 1),
        "naive_bytes": naive.bytes,
        "bytes": ours.bytes,
        "breakdown": breakdown(found, config, harmful, harmless),
    }


def breakdown(
    found: Extraction, config: ExtractionConfig, harmful: Sequence[Sequence[int]], harmless: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Tokens times blocks after each technique in turn, from prompts' lengths alone, beginning with the published way."""
    positions, depth = found.vectors.shape[:2]
    cells = [(row, layer) for row in range(positions) for layer in range(depth)]
    shallow = [cell for cell in cells if not too_deep(cell[1], depth, config) and found.vectors[cell].any()]
    measured = int(found.scores["kl"].isfinite().sum())
    last = max(found.evaluation_layers)
    prefix = len(common_prefix([*harmful, *harmless]))

    def tokens(prompts: Sequence[Sequence[int]], drop: int, batch: int | None) -> int:
        lengths = [len(ids) - drop for ids in prompts]
        if batch is None:
            return sum(lengths)
        groups = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
        return sum(len(group) * max(group) for group in groups)

    def later(chosen: Sequence[tuple[int, int]]) -> int:
        return sum(max(0, last + 1 - layer) for _, layer in chosen)

    def total(chosen: Sequence[tuple[int, int]], kl: int, parts: bool, drop: int, batch: int | None) -> int:
        b, a = tokens(harmful, drop, batch) + drop, tokens(harmless, drop, batch) + drop
        ablation = (later(chosen) if config.intervention == "affine" else len(chosen) * (last + 1)) if parts else 0
        addition = later(chosen) if parts else len(chosen) * depth
        return b * (ablation or len(chosen) * depth) + a * addition + a * kl * depth

    batch = naive_extraction.BATCH
    steps: list[tuple[str, int]] = [
        ("three whole passes", total(cells, len(cells), False, 0, batch)),
        ("last layers left out", total(shallow, len(shallow), False, 0, batch)),
        ("KL from the best down", total(shallow, measured, False, 0, batch)),
        ("only the blocks that change", total(shallow, measured, True, 0, batch)),
        ("shared prefix once", total(shallow, measured, True, prefix, batch)),
        ("no padding", total(shallow, measured, True, prefix, None)),
    ]
    before = [steps[0][1], *(count for _, count in steps)]
    return [
        {"technique": name, "token_blocks": count, "factor": previous / count}
        for (name, count), previous in zip(steps, before, strict=False)
    ]


def show(rows: Sequence[dict[str, Any]], print_: Callable[[Any], None]) -> None:
    """The tables."""
    table = Table(
        "model",
        "edit",
        "naive, s",
        "ours, s",
        "ratio",
        "tokens × blocks",
        "same choice",
        "largest difference",
        "memory",
    )
    for row in rows:
        table.add_row(
            row["model"],
            row["intervention"],
            f"{row['naive_seconds']:.1f}",
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['naive_token_blocks']:.3g} / {row['token_blocks']:.3g} = {row['token_block_ratio']:.1f}",
            "yes" if row["same_choice"] else "NO",
            f"{row['max_score_difference']:.1e}",
            f"{row['memory_ratio']:.2f}",
        )
    print_(table)
    for row in rows:
        parts = Table(f"{row['model']}, {row['intervention']}", "tokens × blocks", "factor")
        for step in row["breakdown"]:
            parts.add_row(step["technique"], f"{step['token_blocks']:.4g}", f"{step['factor']:.2f}")
        parts.add_row("passed in all, means and trial included", f"{row['token_blocks']:.4g}", "")
        print_(parts)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=["organism", *SHAPES], default=["organism", "llama24"])
    parser.add_argument("--interventions", nargs="+", choices=["linear", "affine"], default=["linear", "affine"])
    parser.add_argument("--train", type=int, default=180, help="prompts per class that make candidates")
    parser.add_argument("--validation", type=int, default=100, help="prompts per class that score them")
    parser.add_argument("--positions", type=int, help="how many of the last template tokens; all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if "llama3-8b" in arguments.models and not torch.cuda.is_available():
        parser.error(
            "`--models llama3-8b` needs a GPU: its weights and the published algorithm are too much for a CPU"
        )
    rows = []
    for name in arguments.models:
        for intervention in arguments.interventions:
            rows.append(measure(name, intervention, arguments.train, arguments.validation, arguments.positions))
            if arguments.json:
                write_json(arguments.json, rows)
    show(rows, Console(width=160).print)


if __name__ == "__main__":
    main()
