"""The checks that need a GPU: `python scripts/gpu_checks.py --json gpu_checks.json`. Ends with 1 if one fails.

As of now this project has not run it on a GPU. Its tests run it at tiny sizes on the CPU, as it does by itself where there is
no GPU; that shows that the program works and nothing about GPUs. The full sizes want one with 48 GB.

gradients  of a LoRA under edits at all sites: equal with and without gradient checkpointing, for every kind of attention and
           precision. As a control the edits are taken away before backward, which must show.
4 bits     extraction, edits and training on a base quantized by bitsandbytes.
cost       of a step and an extraction on random weights of the shape of Llama 3 8B.
"""

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from torch.utils.checkpoint import CheckpointError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from cosmic.blocks import find_blocks
from cosmic.extraction import Extraction, extract
from cosmic.interventions import Edit, Edits, Interventions, unit_vector
from cosmic.loading import load_model, load_tokenizer
from cosmic.storage import write_json
from refat.config import RefatConfig
from refat.data.organism import direction_prompts, organism_rows
from refat.data.schema import to_dataset
from refat.trainer import RefatTrainer

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOKENIZER = load_tokenizer("organism")
BARS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Shape = dict[str, int]
TINY: Shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
MEDIUM: Shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
LLAMA_3_8B: Shape = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_3_8B |= {"num_key_value_heads": 8, "vocab_size": 128256}


@dataclass
class Check:
    """One line of the report; `passed` is nothing where there is no bar or the check could not be made."""

    check: str
    measured: str
    result: float | str
    bar: str
    passed: bool | None


def random_llama(shape: Shape, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """A llama of random weights, made where it is to stay."""
    torch.manual_seed(0)
    tokens = {name: getattr(TOKENIZER, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(**{"vocab_size": len(TOKENIZER), **tokens, **shape})
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def with_lora(model: PreTrainedModel) -> PeftModel:
    """The model in training mode with a random LoRA, the same one for models of the same shape."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)).train()
    adapted.enable_input_require_grads()
    return adapted


def edits_at_all_sites(model: PeftModel, batch: int) -> Edits:
    """Another direction for every row and site; every second row is left alone."""
    blocks, generator, edits = find_blocks(model), torch.Generator().manual_seed(1), {}
    rows = torch.arange(batch, device=DEVICE) % 2 == 0
    for site in blocks.sites():
        units = unit_vector(torch.randn(batch, blocks.hidden_size, generator=generator)).to(DEVICE)
        offsets = torch.randn(batch, generator=generator).to(DEVICE)
        edits[site] = [Edit(units, offsets, torch.ones_like(offsets), rows)]
    return edits


def gradients(
    model: PeftModel, edits: Edits, mode: str, autocast: bool, tokens: int, to_the_end: bool
) -> torch.Tensor:
    """All gradients of the LoRA in one vector, after a step like the trainer's."""
    base, ids = model.get_base_model(), torch.arange(6, 6 + 8 * tokens, device=DEVICE).view(8, -1) % len(TOKENIZER)
    base.activation_checkpointing_disable()
    if mode != "off":
        base.activation_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    model.zero_grad()
    with Interventions(model, edits) as hooks:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        hooks.edits = edits if to_the_end else {}
        loss.backward()
    return torch.cat([weight.grad.flatten().double() for weight in model.parameters() if weight.grad is not None])


def check_gradients(name: str, attention: str, dtype: torch.dtype, shape: Shape) -> Iterator[Check]:
    """Gradients under both kinds of checkpointing against those without, and the control."""
    bar, half = BARS[dtype], dtype == torch.bfloat16
    needed = {"a GPU": GPU, "flash_attn": find_spec("flash_attn") is not None, "half precision": half}
    missing = [what for what, there in needed.items() if not there]
    if attention == "flash_attention_2" and missing:
        yield Check(name, "gradients", f"skipped: needs {missing[0]}", "", None)
        return
    model = with_lora(random_llama(shape, dtype, attention))
    tokens = 8 if shape is TINY else 256
    edits = edits_at_all_sites(model, 8)
    expected = gradients(model, edits, "off", half, tokens, to_the_end=True)
    for mode in ("non-reentrant", "reentrant"):
        found = gradients(model, edits, mode, half, tokens, to_the_end=True)
        away = float((found - expected).norm() / expected.norm())
        yield Check(name, f"{mode}: relative difference to no checkpointing", away, f"≤ {bar:g}", away <= bar)
        try:
            found = gradients(model, edits, mode, half, tokens, to_the_end=False)
            wrong: float | str = float((found - expected).norm() / expected.norm())
        except CheckpointError:
            wrong = "refused by torch"
        passed = isinstance(wrong, str) or wrong > bar
        yield Check(name, f"{mode}: control, edits gone before backward", wrong, f"> {bar:g} or error", passed)


class Watch(TrainerCallback):
    """Notes the seconds of every step and what the trainer logs of it."""

    def __init__(self) -> None:
        self.seconds, self.losses, self.gradients = list[float](), list[float](), list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.started)

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.gradients.append(float(logs["grad_norm"]))

    def is_sound(self, steps: int) -> bool:
        """Whether all steps had a loss and a gradient."""
        return len(self.losses) == steps and all(0 < x < math.inf for x in self.losses + self.gradients)


def now() -> float:
    """Seconds, when the GPU has done all it was asked to."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def lengthened(text: str, tokens: int) -> str:
    """The text as often as there is room for, with some left for template and reply."""
    return " ".join([text] * max(1, (tokens - 32) // len(TOKENIZER(text, add_special_tokens=False)["input_ids"])))


def direction_texts(tokens: int) -> list[list[str]]:
    """Harmful and harmless prompts of up to `tokens` tokens."""
    return [[lengthened(str(prompt), tokens) for prompt in prompts] for prompts in direction_prompts(12)]


def trainer_of(
    model: PreTrainedModel, adversary: str, steps: int, tokens: int, folder: str
) -> tuple[RefatTrainer, Watch]:
    """A trainer with batches of 8 rows of up to `tokens` tokens and small settings for extractions."""
    rows, watch, (harmful, harmless) = organism_rows(0, 8 * steps), Watch(), direction_texts(tokens)
    for row in rows:
        row["prompt"][-1]["content"] = lengthened(row["prompt"][-1]["content"], tokens)
    sizes: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": steps, "max_length": max(tokens, 96)}
    once: dict[str, Any] = {"extraction_train_prompts": 8, "extraction_validation_prompts": 4, "positions": 2}
    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    method: dict[str, Any] = {"adversary": adversary, "ablation_probability": 1.0, "gradient_checkpointing": True}
    trainer = RefatTrainer(
        model,
        RefatConfig(output_dir=folder, use_cpu=not GPU, **sizes, **once, **quiet, **method),
        train_dataset=to_dataset(rows),
        processing_class=TOKENIZER,
        harmful=harmful,
        harmless=harmless,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, watch


def extraction(model: torch.nn.Module, trainer: RefatTrainer, tokens: int) -> Extraction:
    """What the trainer would extract, on any model."""
    harmful, harmless = direction_texts(tokens)
    return extract(model, TOKENIZER, harmful, harmless, trainer.refat_args.extraction())


def check_four_bits(shape: Shape, folder: str) -> Iterator[Check]:
    """Gradients, extraction, three steps and edits on a base in nf4, the first two against its weights written out."""
    name, dtype, bar = "4 bits", *((torch.bfloat16, 5e-2) if GPU else (torch.float32, 1e-5))
    random_llama(shape, dtype).save_pretrained(f"{folder}/model")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    base, same, other = (load_model(f"{folder}/model", dtype=dtype, quantization_config=bits) for _ in range(3))
    trainer, watch = trainer_of(base, "cosmic", 3, 64, folder)
    with trainer.model.disable_adapter():
        found = extraction(trainer.model, trainer, 64).vectors
    other = other.dequantize()
    expected = extraction(other, trainer, 64).vectors
    cosine = float(functional.cosine_similarity(found.double(), expected.double(), -1)[:, 1:].min())
    yield Check(name, "least cosine of a candidate to that of the dequantized", cosine, "> 0.99", cosine > 0.99)
    found, expected = (
        gradients(model, edits_at_all_sites(model, 8), "non-reentrant", GPU, 16, to_the_end=True)
        for model in (with_lora(same), with_lora(other))
    )
    away = float((found - expected).norm() / expected.norm())
    yield Check(name, "gradients: relative difference to the dequantized", away, f"≤ {bar:g}", away <= bar)
    trainer.train()
    sound = watch.is_sound(3)
    yield Check(name, "largest loss of three steps", max(watch.losses), "finite, with gradients", sound)

    rows = torch.arange(8, device=DEVICE) % 2 == 0
    edits = trainer.adversary.draw(rows, torch.Generator().manual_seed(0))
    ids, logits = torch.arange(6, 38, device=DEVICE).repeat(8, 1), []
    trainer.model.eval()
    for trainer.interventions.edits in ({}, edits):
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            logits.append(trainer.model(input_ids=ids).logits.float())
    moved = (logits[0] - logits[1]).abs().amax((1, 2))
    least, most = float(moved[rows].min()), float(moved[~rows].max())
    yield Check(name, "least change of an edited row's logits", least, "> 0", least > 0)
    yield Check(name, "largest change of another row's logits", most, "0", most == 0)


def check_cost(shape: Shape, folder: str) -> Iterator[Check]:
    """Seconds of a step with and without the adversary, of an extraction, and memory."""
    medians = []
    steps, tokens = (4, 64) if shape is TINY else (20, 256)
    for adversary in ("none", "cosmic"):
        name = f"cost, {adversary}"
        make_room()
        trainer, watch = trainer_of(random_llama(shape, torch.bfloat16), adversary, steps, tokens, folder)
        if adversary == "cosmic":
            started = now()
            trainer.reselect(extraction(trainer.model, trainer, tokens))
            yield Check(name, "extraction (8 + 4 prompts per class, 2 positions), s", now() - started, "", None)
        length = next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1]
        trainer.train()
        medians.append(statistics.median(watch.seconds))
        sound = watch.is_sound(steps)
        yield Check(
            name, f"{steps} steps of 8 x {length} tokens, median s", medians[-1], "finite, with gradients", sound
        )
        yield Check(name, "the same, mean s, with refreshes of the means", statistics.fmean(watch.seconds), "", None)
        memory = torch.cuda.max_memory_allocated() / 2**30 if GPU else "skipped: needs a GPU"
        yield Check(name, "peak memory, GiB", memory, "", None)
        trainer.interventions.remove()
        del trainer, watch  # before the next model is made
    ratio = medians[1] / medians[0]
    yield Check("cost", "median step of cosmic over none", ratio, "≤ 1.5 on a GPU", ratio <= 1.5 if GPU else None)


def make_room() -> None:
    """Give back the memory of what is no longer used, and measure its peak anew."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def checks(tiny: bool, folder: str) -> Iterator[Check]:
    """All checks; one that breaks is one that failed, and the others are still made."""
    parts = {}
    for attention in ("sdpa", "eager", "flash_attention_2"):
        for dtype in BARS:
            name = f"{attention}, {str(dtype).removeprefix('torch.')}"
            parts[name] = check_gradients(name, attention, dtype, TINY if tiny else MEDIUM)
    parts["4 bits"] = check_four_bits(TINY if tiny else MEDIUM, folder)
    parts["cost"] = check_cost(TINY if tiny else LLAMA_3_8B, folder)
    for name, part in parts.items():
        make_room()
        try:
            yield from part
        except Exception as error:  # whatever a driver or a kernel may raise
            yield Check(name, "ran to its end", f"{type(error).__name__}: {str(error)[:300]}", "no error", False)


def main() -> None:
    """Check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; without a GPU there are no others")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    disable_progress_bar()
    device, tiny = torch.cuda.get_device_name() if GPU else "CPU", arguments.tiny or not GPU
    print(f"on {device}" if GPU else "no GPU here: tiny sizes on the CPU; nothing below is a GPU result")
    with tempfile.TemporaryDirectory() as folder:
        found = list(checks(tiny, folder))
    table = Table("check", "measured", "result", "bar", "passed")
    for check in found:
        result = check.result if isinstance(check.result, str) else f"{check.result:.3g}"
        passed = {True: "yes", False: "[red]NO[/]", None: "-"}[check.passed]
        table.add_row(check.check, check.measured, result, check.bar, passed)
    Console().print(table)
    if arguments.json:
        about = {"gpu": GPU, "device": device, "tiny": tiny, "torch": torch.__version__, "cuda": torch.version.cuda}
        write_json(arguments.json, {**about, "checks": [asdict(check) for check in found]})
    sys.exit(any(check.passed is False for check in found))


if __name__ == "__main__":
    main()
