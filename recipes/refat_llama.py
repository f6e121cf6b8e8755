"""Harden a chat model so that it still refuses when its refusal direction is deleted, and prove it.

    accelerate launch recipes/refat_llama.py                                              # the embedded demo, on any machine
    accelerate launch recipes/refat_llama.py --config recipes/llama3_8b/refat_cosmic.yaml # Llama-3.1-8B-Instruct

Any setting of the YAML file can be given on the command line too, e.g. `--learning_rate 1e-4`. A stopped run goes on from
its last checkpoint when the same command is given again.
"""

import sys
import warnings
from pathlib import Path

from refat.console import input_errors_as_one_line

# TRL, PEFT and DeepSpeed still use names that transformers and torch have deprecated; their users can do nothing about it.
for name in ("is deprecated and will be removed in v6", "`torch.distributed.* is deprecated"):
    warnings.filterwarnings("ignore", category=FutureWarning, message=f".*{name}.*")


def main() -> None:
    # 1. Read the settings, and refuse whatever is wrong with them before anything heavy starts.
    from refat import harden
    from refat.run_config import parse

    settings = parse(sys.argv[1:], default=Path(__file__).parent / "demo" / "refat_cosmic.yaml")
    run = harden.prepare(*settings)

    with harden.resumable(run):
        # 2. Train the adapter while an adversary deletes refusal directions; find them again after every epoch.
        adapters = {"refat": harden.train_hardened(run)}

        # 3. Train the control: the same rows, steps and LoRA, nothing deleted.
        if run.config.sft_control:
            adapters = {"sft": harden.train_control(run), **adapters}

        # 4. Attack the base model, the control and the hardened model on prompts that none of them has seen.
        results = harden.evaluate(run, adapters)

        # 5. Write the report, print the table and the places of everything.
        harden.show(run, results, adapters)


if __name__ == "__main__":
    with input_errors_as_one_line():
        main()
