"""Launch files, the SLURM script and the page about them: what they say can be done as it stands there."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ROOT = Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
ON_CPU = [name for name in FILES if name.endswith("_cpu")]
ON_GPUS = [name for name in FILES if name not in ON_CPU and name != "single"]
PARTS = ("optimizer", "param")
SCRIPT = "scripts/slurm/refat_multi_node.sbatch"
PAGE = (ROOT / "docs" / "distributed.md").read_text()


def place(name: str) -> str:
    return f"accelerate_configs/{name}.yaml"


def loaded(name: str) -> ClusterConfig:
    return load_config_from_file(str(ROOT / place(name)))


def header_commands(name: str) -> list[list[str]]:
    """The command lines in the file's comments, which stand three spaces in."""
    lines = (ROOT / place(name)).read_text().splitlines()
    return [shlex.split(line[4:]) for line in lines if line.startswith("#   ")]


def page_commands() -> list[list[str]]:
    """The command lines on the page; variables set before a command and what stands behind it in the shell are left out."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    starts = (re.search(r"(?:accelerate launch|sbatch) .*", line) for block in blocks for line in block.splitlines())
    return [shlex.split(found[0].removesuffix(" &")) for found in starts if found]


def understood(command: list[str]) -> argparse.Namespace:
    """The options of `accelerate launch` as Accelerate makes them out of a command line and its launch file."""
    assert command[:2] == ["accelerate", "launch"]
    arguments = launch_command_parser().parse_args(command[2:])
    return _validate_launch_command(arguments)[0]


def environment_of(name: str, *options: str) -> dict[str, str]:
    """What Accelerate tells the processes that it starts with the file."""
    arguments = understood(["accelerate", "launch", "--config_file", place(name), *options, "recipes/refat_llama.py"])
    if not arguments.use_deepspeed:
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(arguments)[1]


def sharding(name: str) -> dict[str, Any]:
    """What is spread and where it is kept."""
    config = loaded(name)
    zero = dict(config.deepspeed_config)
    if "deepspeed_config_file" in zero:
        found = json.loads((ROOT / zero["deepspeed_config_file"]).read_text())["zero_optimization"]
        zero["zero_stage"] = found["stage"]
        zero["zero3_save_16bit_model"] = found["stage3_gather_16bit_weights_on_model_save"]
        for part in PARTS:
            zero[f"offload_{part}_device"] = found.get(f"offload_{part}", {}).get("device", "none")
    names = ("zero_stage", "zero3_init_flag", "zero3_save_16bit_model", *(f"offload_{part}_device" for part in PARTS))
    return {"kind": config.distributed_type, **{key: zero.get(key) for key in names}, **config.fsdp_config}


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("ACCELERATE_CONFIG_FILE", raising=False)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_knows_every_setting(name: str) -> None:
    config = loaded(name)
    options = vars(launch_command_parser().parse_args(["script.py"]))
    for part in (config.deepspeed_config, config.fsdp_config):
        assert set(part) <= set(options), "Accelerate would pass over the others in silence"
    if "deepspeed_config_file" in config.deepspeed_config:
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize("name", FILES)
def test_command_in_the_header_works_as_it_stands(name: str) -> None:
    commands = header_commands(name)
    assert commands
    for command in commands:
        if command[0] == "accelerate":
            check_launch(command)
            assert understood(command).config_file == place(name)
        elif command[0] == "sbatch":
            check_launch(command)
            assert f"LAUNCH_FILE:-{place(name)}" in (ROOT / command[1]).read_text()
        else:
            assert command[:3] == ["python", "-m", "pytest"]
            assert list((ROOT / command[3]).glob("test_*.py"))
            assert name in "".join(path.read_text() for path in (ROOT / command[3]).glob("test_*.py"))


def check_launch(command: list[str]) -> None:
    """Files named in a command are there, and it runs the recipe."""
    if command[0] == "sbatch":
        assert (ROOT / command[1]).is_file()
        arguments = command[2:]
    else:
        options = understood(command)
        assert options.training_script == "recipes/refat_llama.py"
        assert (ROOT / options.config_file).is_file()
        arguments = options.training_script_args
    assert (ROOT / "recipes" / "refat_llama.py").is_file()
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert (ROOT / given.get("--config", "recipes/demo/refat_cosmic.yaml")).is_file()


@pytest.mark.parametrize("name", ON_GPUS)
def test_files_for_gpus_use_whole_nodes_in_bf16(name: str) -> None:
    config = loaded(name)
    assert config.mixed_precision == "bf16"
    assert config.num_processes == 8 * config.num_machines
    assert not config.use_cpu
    if config.num_machines == 1:
        assert config.main_process_port == 0, "two launches on one node must not meet on a port"


@pytest.mark.parametrize("name", ON_CPU)
def test_cpu_twin_spreads_what_the_file_for_gpus_spreads(name: str) -> None:
    twin = "multi_gpu" if name == "multi_cpu" else name.removesuffix("_cpu")
    assert sharding(name) == sharding(twin)
    config = loaded(name)
    assert (config.num_processes, config.num_machines, config.main_process_port) == (2, 1, 0)
    assert config.distributed_type != DistributedType.MULTI_CPU, "which starts a single process"


def test_fsdp_as_accelerate_passes_it_on() -> None:
    told = environment_of("fsdp2")
    assert told["ACCELERATE_USE_FSDP"] == "true"
    assert told["FSDP_VERSION"] == "2"
    assert told["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT", "with another one no adapter is written"
    assert told["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false", "which is not the launcher's default"
    assert told["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert told["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert told["FSDP_ACTIVATION_CHECKPOINTING"] == "false"


@pytest.mark.parametrize(("name", "device"), [("deepspeed_zero3", "none"), ("deepspeed_zero3_offload", "cpu")])
def test_zero3_as_accelerate_passes_it_on(name: str, device: str) -> None:
    told = {key.removeprefix("ACCELERATE_DEEPSPEED_"): value for key, value in environment_of(name).items()}
    assert (told["ZERO_STAGE"], told["ZERO3_INIT"], told["ZERO3_SAVE_16BIT_MODEL"]) == ("3", "true", "true")
    assert (told["OFFLOAD_OPTIMIZER_DEVICE"], told["OFFLOAD_PARAM_DEVICE"]) == (device, device)


def test_page_names_every_file_and_its_commands_work() -> None:
    for path in (ROOT / "accelerate_configs").iterdir():
        assert f"`{path.name}`" in PAGE, path.name
    for found in re.findall(r"`(\w+\.yaml)`", PAGE):
        assert (ROOT / "accelerate_configs" / found).is_file(), found
    for found in re.findall(r"`((?:scripts|tests|recipes|docs)/[\w./]+)`", PAGE):
        assert (ROOT / found).exists(), found
    commands = page_commands()
    assert len(commands) >= 8
    for command in commands:
        check_launch(command)


# The SLURM script, with stand-ins for the three programs that it calls

STANDINS = {
    "scontrol": """[[ "$*" == "show hostnames gpu[07-08]" ]] && printf 'gpu07\\ngpu08\\n'""",
    "srun": """while [[ $1 == -* ]]; do echo "srun $1"; shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" || exit; done""",
    "accelerate": """printf '%q ' accelerate "$@"; echo; exit "${ENDS_WITH:-0}\"""",
}
JOB = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
}
GIVEN = ["--config", "recipes/llama3_8b/refat_cosmic.yaml", "--output_dir", "runs/with a space"]


def submitted(tmp_path: Path, arguments: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the script as SLURM would on the first of two nodes."""
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**JOB, "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}", **changes}
    command = ["bash", str(ROOT / SCRIPT), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def launches(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if line.startswith("accelerate")]


def test_slurm_starts_one_launcher_per_node_with_its_own_rank(tmp_path: Path) -> None:
    ended = submitted(tmp_path, GIVEN)
    assert ended.returncode == 0, ended.stderr
    first, second = launches(ended.stdout)
    assert first == [
        *("accelerate", "launch", "--config_file", "accelerate_configs/multi_node.yaml"),
        *("--num_machines", "2", "--num_processes", "16", "--machine_rank", "0"),
        *("--main_process_ip", "gpu07", "--main_process_port", "24567", "--rdzv_backend", "c10d"),
        *("recipes/refat_llama.py", *GIVEN),
    ]
    rank = first.index("--machine_rank") + 1
    assert second == [*first[:rank], "1", *first[rank + 1 :]]
    assert "srun --ntasks-per-node=1" in ended.stdout
    assert "srun --cpus-per-task=64" in ended.stdout
    for number, command in enumerate((first, second)):
        check_launch(command)
        check_node(understood(command), number)


def test_slurm_with_another_strategy(tmp_path: Path) -> None:
    ended = submitted(tmp_path, GIVEN, LAUNCH_FILE=place("deepspeed_zero3"))
    assert len(launches(ended.stdout)) == 2
    for number, command in enumerate(launches(ended.stdout)):
        options = understood(command)
        assert options.config_file == place("deepspeed_zero3")
        assert options.use_deepspeed
        check_node(options, number)


def check_node(options: argparse.Namespace, number: int) -> None:
    """Accelerate starts 8 processes as node `number` of 2, which meet at the first node."""
    assert options.main_process_port == 24567
    options.main_process_port = 0  # else it would be refused where somebody uses that port
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ""
        assert prepare_deepspeed_cmd_env(options)[0] is None, "DeepSpeed's own launcher would need ssh"
    else:
        prepare_multi_gpu_env(options)
    assert (options.nnodes, options.nproc_per_node, options.node_rank) == ("2", "8", number)
    assert options.rdzv_backend == "c10d"
    assert options.rdzv_endpoint.startswith("gpu07:")


@pytest.mark.parametrize(
    ("arguments", "changes", "code", "message"),
    [
        ([], {}, 2, "no options for the recipe"),
        (GIVEN, {"SLURM_SUBMIT_DIR": "/"}, 2, "`recipes/refat_llama.py` is not in `/`"),
        (GIVEN, {"LAUNCH_FILE": "accelerate_configs/none.yaml"}, 2, "`accelerate_configs/none.yaml` is not in"),
        (GIVEN, {"SLURM_JOB_NODELIST": "unknown"}, 1, "nodes"),
        (GIVEN, {"ENDS_WITH": "143"}, 143, ""),
    ],
    ids=["no options", "elsewhere", "no such strategy", "no nodes", "told to end"],
)
def test_slurm_script_fails_when_it_should(
    arguments: list[str], changes: dict[str, str], code: int, message: str, tmp_path: Path
) -> None:
    ended = submitted(tmp_path, arguments, **changes)
    assert ended.returncode == code, ended.stderr
    assert message in ended.stderr
    assert len(launches(ended.stdout)) == (code == 143)


def test_slurm_asks_for_what_the_launch_file_expects() -> None:
    text = (ROOT / SCRIPT).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, flags=re.MULTILINE))
    config = loaded("multi_node")
    assert int(asked["nodes"]) == config.num_machines
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == config.num_processes
    assert asked["ntasks-per-node"] == "1"
    assert {"requeue", "open-mode"} <= set(asked)
    assert re.fullmatch(r"TERM@\d+", asked["signal"]), "to the processes, not to the script alone"
    assert text.index("#SBATCH") < text.index("set -euo pipefail"), "SLURM reads no directive behind a command"
    assert not subprocess.run(["bash", "-n", str(ROOT / SCRIPT)], check=False).returncode
