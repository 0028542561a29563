"""Every field of `TrainingArguments`, for both trainers: it works, is refused at once in one line, or said to wait."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_bf16_available
from transformers import TrainingArguments

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceLoRAConfig
from bt_hf.training.trainer_options import BOUNDS, NEEDED, REFUSED, VALUES, WAITING, WORKS
from tiny_models import build, red_pairs
from tiny_trainers import make

FIELDS = [field.name for field in dataclasses.fields(TrainingArguments)]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
CONFIGS = [BradleyTerryConfig, PreferenceLoRAConfig]
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
EVALUATE = {"eval_strategy": "steps", "eval_steps": 1}
SAVE = {"save_strategy": "steps", "save_steps": 1}
# Values of options that work: the option -> its value, and what it needs.
WORKING: dict[str, tuple[Any, dict[str, Any]]] = {
    "activation_checkpointing": (True, {}),
    "adam_beta1": (0.8, {}),
    "adam_beta2": (0.9, {}),
    "adam_epsilon": (1e-6, {}),
    "auto_find_batch_size": (True, {}),
    "bf16": (True, {}),
    "data_seed": (3, {}),
    "dataloader_num_workers": (1, {}),
    "dataloader_pin_memory": (True, {}),
    "debug": ("underflow_overflow", {}),
    "disable_tqdm": (True, {}),
    "enable_jit_checkpoint": (True, SAVE),
    "eval_accumulation_steps": (1, EVALUATE),
    "eval_on_start": (True, {}),
    "eval_strategy": ("epoch", {}),
    "gradient_accumulation_steps": (2, {}),
    "gradient_checkpointing": (True, {}),
    "hub_always_push": (True, {}),
    "hub_model_id": ("me/x", {}),
    "hub_private_repo": (True, {}),
    "hub_revision": ("main", {}),
    "hub_token": ("none", {}),
    "ignore_data_skip": (True, {}),
    "learning_rate": (1e-3, {}),
    "load_best_model_at_end": (True, EVALUATE | SAVE),
    "local_rank": (0, {}),
    "log_level": ("error", {}),
    "log_level_replica": ("error", {}),
    "log_on_each_node": (False, {}),
    "logging_first_step": (True, {}),
    "logging_nan_inf_filter": (True, {}),
    "logging_steps": (0.5, {}),
    "logging_strategy": ("epoch", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 1}, {"lr_scheduler_type": "cosine"}),
    "lr_scheduler_type": ("reduce_lr_on_plateau", EVALUATE),
    "max_grad_norm": (0.0, {}),
    "max_steps": (1, {}),
    "num_train_epochs": (1, {"max_steps": -1}),
    "optim": ("adafactor", {}),
    "optim_args": ("momentum=0.9", {"optim": "sgd"}),
    "output_dir": (None, {}),
    "per_device_eval_batch_size": (3, {}),
    "per_device_train_batch_size": (3, {}),
    "report_to": (["none"], {}),
    "restore_callback_states_from_checkpoint": (True, {}),
    "resume_from_checkpoint": ("false", {}),
    "save_on_each_node": (True, SAVE),
    "save_only_model": (True, SAVE),
    "save_strategy": ("epoch", {}),
    "save_total_limit": (1, SAVE),
    "seed": (7, {}),
    "torch_compile_backend": ("eager", {}),
    "torch_empty_cache_steps": (1, {}),
    "use_cpu": (True, {}),
    "warmup_steps": (0.5, {}),
    "weight_decay": (0.1, {}),
}
# Options that work where the tests don't run by themselves: several processes, a GPU, a Hub, minutes of compilation.
ELSEWHERE = {
    "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout",
    "deepspeed", "fsdp", "full_determinism", "push_to_hub", "skip_memory_metrics", "tf32", "torch_compile",
    "torch_compile_mode",
}  # fmt: skip
# Working options whose way through the second trainer is another.
DENOISERS_TOO = [
    "auto_find_batch_size",
    "bf16",
    "dataloader_num_workers",
    "eval_accumulation_steps",
    "eval_on_start",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "load_best_model_at_end",
    "lr_scheduler_type",
    "num_train_epochs",
    "output_dir",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
]
# Values that are refused, of options that have others.
BAD = [
    ("accelerator_config", {"split_batches": True}),
    ("accelerator_config", {"dispatch_batches": True}),
    ("accelerator_config", {"even_batches": False}),
    ("accelerator_config", {"even_batchs": True}),
    ("accelerator_config", '{"split_batches": true}'),
    ("adam_beta1", 1.5),
    ("adam_epsilon", float("nan")),
    ("data_seed", -1),
    ("dataloader_num_workers", -1),
    ("deepspeed", {"zero_optimization": {"stage": 0}}),
    ("eval_accumulation_steps", 0),
    ("eval_strategy", "step"),
    ("fp16", True),
    ("fsdp", "full_shard"),
    ("gradient_accumulation_steps", 0),
    ("hub_strategy", "nope"),
    ("learning_rate", "1e-4"),
    ("learning_rate", float("nan")),
    ("log_level", "loud"),
    ("logging_steps", -1),
    ("lr_scheduler_kwargs", "foo"),
    ("lr_scheduler_kwargs", "{foo"),
    ("lr_scheduler_kwargs", {"foo": 1}),
    ("lr_scheduler_type", "cosin"),
    ("lr_scheduler_type", "warmup_stable_decay"),
    ("lr_scheduler_type", "cosine_with_min_lr"),
    ("max_grad_norm", float("nan")),
    ("max_steps", 0),
    ("max_steps", -2),
    ("max_steps", 2.5),
    ("num_train_epochs", 0),
    ("num_train_epochs", float("nan")),
    ("optim", "adam"),
    ("optim", "adamw_bnb_8bit"),
    ("optim", "galore_adamw"),
    ("optim", "lomo"),
    ("optim", "schedule_free_adamw"),
    ("optim_args", "foo=1"),
    ("optim_args", "foo"),
    ("per_device_train_batch_size", 0),
    ("report_to", "wandbb"),
    ("report_to", "wandb"),
    ("save_strategy", "never"),
    ("save_total_limit", 0),
    ("seed", -1),
    ("seed", True),
    ("tf32", True),
    ("torch_empty_cache_steps", 0),
    ("train_sampling_strategy", "group_by_length"),
    ("train_sampling_strategy", "radom"),
    ("warmup_steps", -3),
    ("weight_decay", -1),
]
# A value for every option that is refused whatever it says, or that waits for another one.
ANY = {
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_prefetch_factor": 2,
    "ddp_backend": "gloo",
    "fsdp_config": {"min_num_params": 1},
    "eval_delay": 1,
    "eval_steps": 5,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "greater_is_better": True,
    "hub_strategy": "checkpoint",
    "include_for_metrics": ["loss"],
    "include_num_input_tokens_seen": "all",
    "label_names": ["x"],
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": ["x"],
    "remove_unused_columns": True,
    "save_steps": 5,
    "warmup_steps": 5,
}


def value_of(name: str) -> Any:
    """A value of an option other than its default."""
    default = TrainingArguments.__dataclass_fields__[name].default
    return ANY.get(name, not default if isinstance(default, bool) else "x")


def test_every_field_is_classified() -> None:
    tables = [set(WORKS), set(REFUSED), set(NEEDED), set(WAITING), set(VALUES)]
    names = [name for table in tables for name in table]
    assert sorted(names) == sorted(FIELDS), "a new option of transformers: say whether it works"
    assert (set(WORKING) | ELSEWHERE) - set(WAITING) == set(WORKS)
    assert set(BOUNDS) <= set(FIELDS)


def run(config: type, folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """Train a tiny model for two steps, and evaluate."""
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, **QUIET}
    held_out = red_pairs(4, seed=1)
    if config is PreferenceLoRAConfig:
        options = {"output_dir": str(folder / "out"), "num_eval_noise_samples": 1, **defaults, **options}
        trainer: Any = make(folder, evaluation=held_out, **{k: v for k, v in options.items() if k != "output_dir"})
    else:
        model, processor = build()
        args = BradleyTerryConfig(**{"output_dir": str(folder / "out"), **defaults, **options})
        trainer = BradleyTerryTrainer(
            model, args, train_dataset=red_pairs(8), eval_dataset=held_out, processing_class=processor
        )
    trainer.train()
    return trainer.evaluate()


@pytest.mark.parametrize("name", sorted(WORKING))
def test_working_options(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name not in FIELDS:
        pytest.skip(f"this transformers has no {name}")
    if name == "bf16" and not is_bf16_available():
        pytest.skip("no bfloat16 here")
    value, companions = WORKING[name]
    for config in CONFIGS if name in DENOISERS_TOO else CONFIGS[:1]:
        metrics = run(config, tmp_path, {**companions, name: value})
        assert 0 <= metrics["eval_accuracy"] <= 1


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", [*REFUSED, *NEEDED])
def test_options_that_are_refused(config: type, name: str, tmp_path: Path) -> None:
    if name not in FIELDS:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(ValueError, match=f"`{name}.*(is refused:|has no effect without)") as error:
        config(str(tmp_path), **QUIET, **{name: value_of(name)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}={value}" for name, value in BAD])
def test_values_that_are_refused(config: type, name: str, value: Any, tmp_path: Path) -> None:
    if name == "tf32" and torch.cuda.is_available():
        pytest.skip("a GPU may have it")
    with pytest.raises((ValueError, ImportError)) as error:
        config(str(tmp_path), **{**QUIET, name: value})
    message = str(error.value)
    assert "\n" not in message
    assert name.split("_")[0] in message


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", sorted(WAITING))
def test_options_that_wait_for_others_are_said(
    config: type, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if name not in FIELDS:
        pytest.skip(f"this transformers has no {name}")
    with caplog.at_level(logging.WARNING, "bt_hf"):
        config(str(tmp_path), **{**QUIET, "lr_scheduler_type": "constant", name: value_of(name)})
    assert [
        record.message for record in caplog.records if f"`{name}=" in record.message and "without" in record.message
    ]


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_say_nothing_and_are_copied(config: type, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = config(str(tmp_path), report_to="none")
    again = dataclasses.replace(args, learning_rate=0.5)
    assert again.learning_rate == 0.5
    assert not caplog.records


@pytest.mark.parametrize("config", CONFIGS)
def test_unknown_options_name_a_near_one(config: type, tmp_path: Path) -> None:
    for wrong, meant in {"learning_rat": "learning_rate", "lr": "learning_rate", "epochs": "num_train_epochs",
                         "warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy",
                         "group_by_length": "train_sampling_strategy", "rank": "lora_r"}.items():  # fmt: skip
        with pytest.raises(TypeError, match=f"unknown option {wrong} of {config.__name__}, did you mean {meant}"):
            config(str(tmp_path), **{wrong: 1})


def test_evaluation_at_the_start_needs_held_out_pairs(tmp_path: Path) -> None:
    model, processor = build()
    args = BradleyTerryConfig(str(tmp_path / "out"), eval_on_start=True, **QUIET)
    with pytest.raises(ValueError, match="`eval_on_start=True`.*`eval_dataset`"):
        BradleyTerryTrainer(model, args, train_dataset=red_pairs(4), processing_class=processor)
    with pytest.raises(ValueError, match="`eval_on_start=True`.*`eval_dataset`"):
        make(tmp_path, eval_on_start=True)


def test_a_smaller_batch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, sizes = BradleyTerryTrainer.compute_loss, []

    def crowded(self: Any, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            sizes.append(len(inputs["weight"]))
            if sizes[-1] > 4:
                raise RuntimeError("CUDA out of memory.")
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(BradleyTerryTrainer, "compute_loss", crowded)
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 2}
    run(BradleyTerryConfig, tmp_path, options)
    assert sizes[0] == 8
    assert max(sizes[-2:]) <= 4
