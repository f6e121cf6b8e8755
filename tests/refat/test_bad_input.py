"""Bad input ends with one clear line and exit code 2, before the model's weights are read, and leaves the disk alone.

The model of these tests has no weights at all, so whoever tries to read them fails in another way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cosmic.errors import InputError
from cosmic.storage import write_tensors
from refat import harden
from refat.checkpoints import finish, last_complete_checkpoint, require_resumable
from refat.console import input_errors_as_one_line
from refat.harden import prepare
from refat.launch import Launch
from refat.run_config import parse
from tests.refat.places import listing

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "refat_llama.py"

SOURCES = [
    {"path": "organism", "kind": "harmful", "limit": 12},
    {"path": "organism", "kind": "harmless", "limit": 12},
]


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": "weightless",
        "data": SOURCES,
        "eval_data": SOURCES,
        "judge": "exact",
        "framings": "organism",
        "output_dir": "run",
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }


def refused(place: Path, expected: str, arguments: list[str], changes: dict[str, Any] | None = None) -> str:
    """The message with which the settings are refused; checks that it is one line and that nothing was written."""
    if changes is not None:
        Path("config.yaml").write_text(yaml.safe_dump(settings(**changes)))
        arguments = ["--config", "config.yaml", *arguments]
    before = listing(place)
    with pytest.raises(InputError, match=expected) as caught:
        prepare(*parse(arguments, ROOT / "recipes" / "demo" / "refat_cosmic.yaml"))
    assert "\n" not in str(caught.value)
    assert listing(place) == before
    return str(caught.value)


def source(path: str, kind: str = "harmful", **more: Any) -> dict[str, Any]:
    return {"path": path, "kind": kind, **more}


def data(path: str, **more: Any) -> dict[str, Any]:
    """The harmful training rows come from `path`."""
    return {"data": [source(path, **more), SOURCES[1]], "prefill_share": 0.0}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    # data
    "missing file": (data("nowhere.jsonl"), "nowhere.jsonl.*does not exist"),
    "malformed row": (data("broken.jsonl"), "broken.jsonl.*2"),
    "empty file": (data("empty.jsonl"), "empty.jsonl"),
    "empty prompt": (data("blank.csv"), "blank.csv.*row 2.*empty"),
    "unknown columns": (data("columns.csv"), "columns.csv.*wording"),
    "no refusals": (data("harmful.txt"), "harmful.txt.*completion"),
    "unknown field of a source": (data("organism", colour="red"), "unknown field `colour`"),
    "unknown kind": ({"data": [source("organism", "evil"), SOURCES[1]]}, "`kind` is 'evil'"),
    "no data": ({"data": []}, "`data` is empty"),
    "no harmful data": ({"data": [SOURCES[1]]}, "no source of kind `harmful`"),
    "no harmless data": ({"data": [SOURCES[0]]}, "harmless or borderline"),
    "no evaluation": ({"eval_data": []}, "`eval_data` is empty"),
    "prompt in both classes": (
        {"direction_data": [source("same.txt"), source("harmful.txt", "harmless")]},
        "both `harmful` and `harmless`",
    ),
    "too few prompts for directions": (
        {"direction_data": [source("organism", limit=1, split="train"), SOURCES[1]]},
        "1 distinct prompts; expected at least 2",
    ),
    "no answers to prefill": (
        {"data": [source("harmful.txt", completion="No."), SOURCES[1]], "prefill_share": 0.3},
        "`prefill_share` is 0.3",
    ),
    "no rows": ({"train_rows": 0}, "`train_rows` is 0"),
    "judge that knows nothing of the prompts": ({"eval_data": [source("harmful.txt")]}, "judge: substring"),
    "framing without a place": ({"framings": "framings.txt"}, "framing 2 has no place"),
    "framings that are no text": ({"framings": "binary.txt"}, "binary.txt.*UTF-8"),
    "framings that do not exist": ({"train_framings": "nope"}, "`train_framings` is 'nope'"),
    "the attack's framings in training": (
        {"train_framings": "organism", "framing_share": 0.1},
        "`framings` and `train_framings` share",
    ),
    # settings
    "unknown adversary": ({"adversary": "pgd"}, "`adversary` is 'pgd'.*cosmic"),
    "p above 1": ({"ablation_probability": 1.5}, r"`ablation_probability` is 1.5.*\[0, 1\]"),
    "p below 0": ({"ablation_probability": -0.1}, r"`ablation_probability` is -0.1.*\[0, 1\]"),
    "p not a number": ({"ablation_probability": float("nan")}, "`ablation_probability` is nan"),
    "p a text": ({"ablation_probability": "abc"}, "`ablation_probability` is 'abc'.*float"),
    "p a list": ({"ablation_probability": [0.5]}, "`ablation_probability` is .0.5"),
    "p nothing": ({"ablation_probability": None}, "`ablation_probability` is None"),
    "prefill share": ({"prefill_share": 2}, "`prefill_share` is 2"),
    "framing share": ({"framing_share": -1}, "`framing_share` is -1"),
    "packing": ({"packing": True}, "`packing` is True; expected false"),
    "packing of the evaluation": ({"eval_packing": True}, "`eval_packing` is True"),
    "padding free": ({"padding_free": True}, "`padding_free` is True"),
    "loss on prompts": ({"completion_only_loss": False}, "`completion_only_loss` is False"),
    "unknown form": ({"forms": ["linear", "round"]}, "`forms` is .*round"),
    "form twice": ({"forms": ["linear", "linear"], "form_weights": [1.0, 1.0]}, "each once"),
    "forms as a text": ({"forms": "linear"}, "`forms` is 'linear'"),
    "too few weights": ({"form_weights": [1.0]}, "`form_weights` is .1.0"),
    "no weight": ({"form_weights": [0.0, 0.0, 0.0]}, "not all zero"),
    "refresh interval": ({"refresh_interval": 0}, "`refresh_interval` is 0"),
    "extraction": ({"extraction_intervention": "cubic"}, "'cubic'.*linear"),
    "learning rate a text": ({"learning_rate": "abc"}, "`learning_rate` is 'abc'.*float"),
    "learning rate below 0": ({"learning_rate": -1.0}, "`learning_rate` is -1.0"),
    "seed a fraction": ({"seed": 1.5}, "`seed` is 1.5.*int"),
    "switch a text": ({"sft_control": "perhaps"}, "`sft_control` is 'perhaps'.*bool"),
    "schedule": ({"lr_scheduler_type": "wavy"}, "wavy"),
    "save strategy": ({"save_strategy": "sometimes"}, "sometimes"),
    "evaluation while training": ({"eval_strategy": "epoch"}, "`eval_strategy` is 'epoch'"),
    "batch": ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0"),
    "epochs": ({"num_train_epochs": 0}, "`num_train_epochs` is 0"),
    "number type": ({"dtype": "float99"}, "`dtype` is 'float99'.*bfloat16"),
    "no adapter": ({"use_peft": False}, "`use_peft` is False"),
    "rank of a LoRA": ({"lora_r": 0}, "LoRA"),
    "unknown key": ({"ablation_probabilty": 0.5}, r"unknown settings \['ablation_probabilty'\]"),
    "unknown attack": ({"attacks": ["gcg"]}, "gcg.*direct"),
    "attacks as a text": ({"attacks": "direct"}, "`attacks` is 'direct'"),
    "unknown judge": ({"judge": "gpt"}, "`judge` is 'gpt'"),
    "no prompts": ({"eval_prompts": 0}, "`eval_prompts` is 0"),
    "package that is not there": ({"load_in_4bit": True}, "bitsandbytes"),
    # model
    "missing model": ({"model_name_or_path": "./nowhere"}, "nowhere"),
    "encoder-only model": ({"model_name_or_path": "bert"}, "BertForMaskedLM.*not a decoder-only"),
    "encoder-decoder model": ({"model_name_or_path": "t5"}, "T5.*not a decoder-only"),
    "no chat template": ({"model_name_or_path": "untemplated"}, "no chat template"),
    "layers that do not exist": ({"layer_range": [4, 12]}, r"`layer_range` is \[4, 12\].*0 to 11"),
    "layers in the wrong order": ({"layer_range": [4, 2]}, "the first not after the last"),
    "LoRA on a module that does not exist": ({"lora_target_modules": ["no_proj"]}, "no_proj"),
    "LoRA on a layer that does not exist": (
        {"lora_target_modules": ["layers.12.mlp.up_proj", "layers.99.mlp.up_proj"]},
        "layers.*up_proj",
    ),
    "4 bits in no precision": ({"load_in_4bit": True, "dtype": "auto"}, "`dtype` is 'auto'; expected bfloat16"),
    # place
    "folder of something else": ({"output_dir": "taken"}, "`taken` is not empty"),
    "folder that is a file": ({"output_dir": "harmful.txt"}, "harmful.txt"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_settings_are_refused_before_weights_are_read(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, expected = CASES[name]
    if name == "package that is not there":
        monkeypatch.setattr(harden, "find_spec", lambda _: None)
    refused(place, expected, [], changes)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ablation_probability", "abc"], "`--ablation_probability`: invalid float value: 'abc'"),
        (["--ablation_probability", "7"], "`ablation_probability` is 7.0"),
        (["--packing", "true"], "`packing` is True"),
        (["--packing", "maybe"], "--packing.*maybe"),
        (["--no_such_option", "1"], "unknown options.*--no_such_option"),
        (["stray"], "unknown options.*stray"),
        (["--seed"], "--seed.*expected one argument"),
        (["--config", "nowhere.yaml"], "nowhere.yaml.*cannot be read"),
        (["--config=nowhere.yaml"], "nowhere.yaml.*cannot be read"),
        (["--config"], "`--config` names no file"),
        (["--config", "taken"], "taken.*cannot be read"),
        (["--config", "list.yaml"], "list.yaml.*list"),
        (["--config", "torn.yaml"], "torn.yaml.*not valid YAML"),
        (["--config", "binary.txt"], "binary.txt.*not valid YAML"),
        (["--config", "empty.jsonl"], "empty.jsonl.*NoneType"),
    ],
)
def test_command_line_is_refused(arguments: list[str], expected: str, place: Path) -> None:
    refused(place, expected, arguments)


def test_command_line_beats_the_file(place: Path) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(settings(ablation_probability=0.2)) + "learning_rate: 1e-3\n")
    for arguments, expected in (([], 0.2), (["--ablation_probability", "0.7"], 0.7)):
        for config in (["--config", "config.yaml"], ["--config=config.yaml"]):
            _, training, _ = parse([*config, *arguments], Path("nowhere"))
            assert training.ablation_probability == expected
            assert training.learning_rate == 1e-3


def test_one_lora_module_by_name_is_taken(place: Path) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(settings(lora_target_modules=["q_proj"])))
    assert prepare(*parse(["--config", "config.yaml"], Path("nowhere"))).folder == Path("run")


def test_folder_of_another_run_is_refused_and_that_of_the_same_run_is_not(place: Path) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(settings()))
    config = ["--config", "config.yaml"]
    prepare(*parse([*config, "--hub_token", "secret"], Path("nowhere")))
    assert sorted(path.name for path in Path("run").iterdir()) == ["run.json"]
    assert "secret" not in Path("run/run.json").read_text()
    before = listing(place)
    prepare(*parse([*config, "--logging_steps", "3"], Path("nowhere")))
    assert listing(place) == before
    told = refused(place, "holds another run", [*config, "--ablation_probability", "0.25", "--logging_steps", "3"])
    assert "['ablation_probability']" in told
    Path("run/run.json").write_text("[]")
    refused(place, "no record of a run", config)


def test_broken_checkpoints_are_passed_over(tmp_path: Path) -> None:
    """Empty, without its last file, with a torn file, or with another name."""
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for number in (9, 10, 11, 12, 13):
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    for number in (9, 10, 12, 13):
        write_tensors(tmp_path / f"checkpoint-{number}" / "adapter_model.safetensors", {"a": torch.ones(3)})
    for number in (9, 10, 11, 13):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    torn = tmp_path / "checkpoint-13" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-4])
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"epoch": ')
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_checkpoint_of_other_processes_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / ".unfinished" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    written = finish(tmp_path, "checkpoint-4", Launch(2, "ZeRO-2"))
    assert written == tmp_path / "checkpoint-4"
    assert not checkpoint.exists()
    require_resumable(written, Launch(2, "ZeRO-2"))
    for launch in (Launch(1, "single"), Launch(4, "ZeRO-2"), Launch(2, "DDP")):
        with pytest.raises(InputError, match=r"checkpoint-4` was written by 2 process\(es\), ZeRO-2; this launch is"):
            require_resumable(written, launch)


# --- whole programs


def test_error_is_printed_as_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, expected in (("0", "error: first second\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught, input_errors_as_one_line():
            raise InputError("first\nsecond")
        assert caught.value.code == 2
        assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([str(RECIPE), "--config", "config.yaml"], "broken.jsonl"),
        (
            [
                "-m",
                "refat.cli",
                "eval",
                "bert",
                "--output",
                "x",
                "--harmful",
                "harmful.txt",
                "--harmless",
                "harmless.txt",
            ],
            "bert",
        ),
        (
            "-m cosmic.cli extract weightless --harmful nowhere.txt --harmless harmless.txt --output x".split(),
            "nowhere.txt",
        ),
    ],
    ids=["recipe", "refat eval", "cosmic extract"],
)
def test_programs_end_with_exit_code_2_and_one_line(command: list[str], expected: str, place: Path) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(settings(**data("broken.jsonl"))))
    if command[0] == "-m":
        module = command[1]
        command = ["-c", f"import sys; from {module} import main; sys.exit(main())", *command[2:]]
    before = listing(place)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert listing(place) == before
