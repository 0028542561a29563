"""The configs of `examples/accelerate/`: accelerate reads each, and the example scripts run as two CPU processes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from peft import PeftModel

from launching import CONFIGS, launch
from tiny_models import build as build_clip
from tiny_models import red_pairs
from tiny_pipelines import SIZE
from tiny_pipelines import build as build_pipeline
from tiny_pipelines import save as save_pipeline

EXAMPLES = CONFIGS.parent
# Kind of launch of each config, and its number of processes.
EXPECTED = {
    "two_cpu_processes": ("multi_gpu", 2),
    "one_gpu": (None, 1),
    "multi_gpu": ("multi_gpu", 4),
    "several_nodes": ("multi_gpu", 16),
    "fsdp2": ("use_fsdp", 4),
    "deepspeed_zero2": ("use_deepspeed", 4),
    "deepspeed_zero3": ("use_deepspeed", 4),
}


def test_every_config_is_expected_and_documented() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)
    readme = (CONFIGS / "README.md").read_text()
    assert all(f"{name}.yaml" in readme for name in EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_config(name: str) -> None:
    path = str(CONFIGS / f"{name}.yaml")
    assert isinstance(load_config_from_file(path), ClusterConfig)  # raises on keys that it does not know
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "train.py"]))
    how, processes = EXPECTED[name]
    ways = ("multi_gpu", "use_fsdp", "use_deepspeed")
    assert [way for way in ways if getattr(args, way)] == ([how] if how else [])
    assert args.num_processes == processes
    if how == "use_fsdp":
        assert (args.fsdp_version, args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    if how == "use_deepspeed":
        assert args.zero_stage == int(name[-1])


@pytest.mark.parametrize("name", [name for name, (how, _) in EXPECTED.items() if how == "use_deepspeed"])
def test_deepspeed_and_the_arguments_agree(name: str, tmp_path: Path) -> None:
    """Run transformers' part before it calls DeepSpeed, which only needs to be importable."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").touch()
    (tmp_path / "deepspeed-1.0.dist-info").mkdir()
    (tmp_path / "deepspeed-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 1.0\n"
    )
    options = ["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(args)
    code = """
        from types import SimpleNamespace
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, propagate_args_to_deepspeed
        from bt_hf import BradleyTerryConfig
        args = BradleyTerryConfig("unused", report_to="none", use_cpu=True)
        assert not is_deepspeed_zero3_enabled()  # so that models are loaded whole
        accelerator = SimpleNamespace(state=args)  # both hold the plugin
        propagate_args_to_deepspeed(accelerator, args)
        config = args.deepspeed_plugin.hf_ds_config
        config.trainer_config_finalize(args, None, 10)  # raises where they disagree
        assert args.bf16 and config.is_true("bf16.enabled")
        """
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(EXAMPLES.parent), environment["PYTHONPATH"]])
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for shard in range(2):
        red_pairs(4, seed=shard).to_parquet(folder / f"part-{shard}.parquet")
    return folder


OPTIONS = ["--streaming", "--max_steps", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no"]
OPTIONS += ["--report_to", "none", "--disable_tqdm", "true", "--output_dir"]


def test_train_reward_runs_as_two_processes(pairs: Path, tmp_path: Path) -> None:
    model, processor = build_clip()
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    arguments = ["--model", tmp_path / "clip", "--dataset", pairs, *OPTIONS, tmp_path / "out"]
    printed = launch(EXAMPLES / "train_reward.py", *arguments)
    assert printed.count("Processes: 2 on cpu") == 1  # and the second one does not say that it is the only one
    assert "Processes: 1" not in printed
    PeftModel.from_pretrained(model, tmp_path / "out")


def test_train_preference_lora_runs_as_two_processes(pairs: Path, tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base", "sd")
    arguments = ["--model", base, "--dataset", pairs, "--resolution", SIZE[0], *OPTIONS, tmp_path / "out"]
    printed = launch(EXAMPLES / "train_preference_lora.py", *arguments)
    assert printed.count("Processes: 2 on cpu") == 1
    assert "Processes: 1" not in printed
    build_pipeline("sd").load_lora_weights(tmp_path / "out")
