"""Options of `transformers.TrainingArguments`: those that both trainers honour, and those that they refuse or ignore.

Every field stands in exactly one of the tables, which a test compares with the installed transformers.
"""

import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig

from bt_hf.training.option_checks import check_bounds, check_types, did_you_mean, is_given

logger = logging.getLogger(__name__)

WORKS = frozenset(
    [
        "activation_checkpointing",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "auto_find_batch_size",
        "bf16",
        "data_seed",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "debug",
        "deepspeed",
        "disable_tqdm",
        "enable_jit_checkpoint",
        "eval_accumulation_steps",
        "eval_on_start",
        "eval_strategy",
        "fsdp",
        "full_determinism",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_token",
        "ignore_data_skip",
        "learning_rate",
        "load_best_model_at_end",
        "local_rank",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_steps",
        "num_train_epochs",
        "optim",
        "optim_args",
        "output_dir",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "push_to_hub",
        "report_to",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
        "save_on_each_node",
        "save_only_model",
        "save_strategy",
        "save_total_limit",
        "seed",
        "skip_memory_metrics",
        "tf32",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "use_cpu",
        "weight_decay",
    ]
)

_LANGUAGE = "it is made for language models: leave it out"
_ALL_PAIRS = "figures are taken over all held-out pairs at once: leave it out"
REFUSED = {
    "average_tokens_across_devices": "losses are divided by the weights of all processes' pairs, always: leave it out",
    "batch_eval_metrics": _ALL_PAIRS,
    "bf16_full_eval": "it would round the adapter for good: pass `bf16=True`, which evaluates in bfloat16 as well",
    "dataloader_drop_last": "each pair counts, and held-out ones would be dropped too: leave it out",
    "dataloader_in_order": "rows are matched with their noise and their process by their order: leave it out",
    "eval_do_concat_batches": _ALL_PAIRS,
    "eval_use_gather_object": _ALL_PAIRS,
    "fp16_full_eval": "it would round the adapter for good: pass `fp16=True`, which evaluates in float16 as well",
    "include_for_metrics": "metrics are given margins, preferences and weights: leave it out",
    "include_num_input_tokens_seen": _LANGUAGE,
    "label_names": "labels are `preference` and `weight`: leave it out",
    "label_smoothing_factor": "it smooths classes: pass `label_smoothing`, the share of clicks that are slips",
    "length_column_name": "rows are not grouped by length: leave it out",
    "liger_kernel_config": _LANGUAGE,
    "neftune_noise_alpha": _LANGUAGE,
    "parallelism_config": "a model is trained whole, or sharded by FSDP or DeepSpeed: leave it out",
    "prediction_loss_only": "the verdict is about margins, not about the loss: leave it out",
    "remove_unused_columns": "it should stay off: the collator reads prompts, images and labels",
    "use_cache": _LANGUAGE,
    "use_liger_kernel": _LANGUAGE,
}
_OFF = {"include_num_input_tokens_seen": False}  # as the command line spells "no"

Condition = Callable[[Any], bool]


def _tracks(name: str) -> Condition:
    return lambda args: name in args.report_to or "all" in args.report_to


def _evaluates(args: Any) -> bool:
    return str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"


def _has_workers(args: Any) -> bool:
    return args.dataloader_num_workers > 0


def _is_distributed(args: Any) -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _checkpoints(args: Any) -> bool:
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def _picks_the_best(args: Any) -> bool:
    watching = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    return bool(args.load_best_model_at_end or args.save_strategy == "best" or watching)


_PROJECTS = (lambda args: args.optim.startswith(("galore", "apollo")), "an `optim` of GaLore or APOLLO")
# Options that fail late, or mean nothing, without others: refused.
NEEDED: Mapping[str, tuple[Condition, str]] = {
    "dataloader_multiprocessing_context": (_has_workers, "`dataloader_num_workers` of at least 1"),
    "dataloader_persistent_workers": (_has_workers, "`dataloader_num_workers` of at least 1"),
    "dataloader_prefetch_factor": (_has_workers, "`dataloader_num_workers` of at least 1"),
    "ddp_backend": (_is_distributed, "several processes, as `accelerate launch` starts them"),
    "optim_target_modules": _PROJECTS,
}
# Options that wait for others, which a script may set later: said in a warning.
WAITING: Mapping[str, tuple[Condition, str]] = {
    "activation_checkpointing_kwargs": (_checkpoints, "`activation_checkpointing=True`"),
    "gradient_checkpointing_kwargs": (_checkpoints, "`gradient_checkpointing=True`"),
    "eval_delay": (_evaluates, "`eval_strategy`"),
    "eval_steps": (lambda args: args.eval_strategy == "steps", "`eval_strategy='steps'`"),
    "fsdp_config": (lambda args: bool(args.fsdp), "`fsdp`"),
    "greater_is_better": (_picks_the_best, "`load_best_model_at_end=True` or `save_strategy='best'`"),
    "metric_for_best_model": (_picks_the_best, "`load_best_model_at_end=True` or `save_strategy='best'`"),
    "hub_strategy": (lambda args: args.push_to_hub, "`push_to_hub=True`"),
    "project": (_tracks("trackio"), "trackio in `report_to`"),
    "run_name": (lambda args: args.report_to not in ("none", [], ["none"]), "a tracker in `report_to`"),
    "save_steps": (lambda args: args.save_strategy == "steps", "`save_strategy='steps'`"),
    "trackio_bucket_id": (_tracks("trackio"), "trackio in `report_to`"),
    "trackio_space_id": (_tracks("trackio"), "trackio in `report_to`"),
    "trackio_static_space_id": (_tracks("trackio"), "trackio in `report_to`"),
    "warmup_steps": (
        lambda args: args.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau", "greedy"),
        "a schedule that warms up, such as `lr_scheduler_type='constant_with_warmup'`",
    ),
    "do_eval": (_evaluates, "`eval_strategy`: call `evaluate()`"),
    "do_predict": (lambda args: False, "a script that reads it: call `predict()`"),
    "do_train": (lambda args: False, "a script that reads it: call `train()`"),
}
# Options of which one value is refused.
VALUES = frozenset({"accelerator_config", "fp16", "train_sampling_strategy"})
_SEED = (0, 2**32 - 1, "a whole number from 0 to 4294967295")
_COUNT = (1, 10**9, "a whole number of at least 1")
_SHARE = (0, 1 - 1e-12, "at least 0 and below 1")
_AMOUNT = (0, 1e300, "a finite number of at least 0")
BOUNDS = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _AMOUNT,
    "data_seed": _SEED,
    "dataloader_num_workers": (0, 10**6, "a whole number of at least 0"),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "eval_delay": _AMOUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _AMOUNT,
    "logging_steps": _AMOUNT,
    "max_grad_norm": (0, 1e300, "a finite number of at least 0, where 0 sets no limit"),
    "num_train_epochs": (1e-9, 1e9, "a finite number above 0"),
    "per_device_eval_batch_size": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "save_steps": _AMOUNT,
    "save_total_limit": _COUNT,
    "seed": _SEED,
    "torch_empty_cache_steps": _COUNT,
    "warmup_steps": _AMOUNT,
    "weight_decay": _AMOUNT,
}


def check_trainer_options(args: Any) -> None:
    """Refuse options of `TrainingArguments` that fail late or change what is meant; warn of those without effect.

    Args:
        args: Config of a trainer, with the values that were given.

    Raises:
        ImportError: An optimizer, a tracker or DeepSpeed is not installed.
        ValueError: Names the option and the way out.
    """
    for name, reason in REFUSED.items():
        if is_given(args, name) and getattr(args, name) != _OFF.get(name, args):
            raise ValueError(f"`{name}={getattr(args, name)!r}` is refused: {reason}.")
    check_types(args)
    check_bounds(args, BOUNDS)
    if args.max_steps < 1 and args.max_steps != -1:
        raise ValueError(
            f"`max_steps` should be at least 1, or -1 to train `num_train_epochs`, but got {args.max_steps}."
        )
    for name, (has_effect, needed) in NEEDED.items():
        if is_given(args, name) and not has_effect(args):
            raise ValueError(f"`{name}={getattr(args, name)!r}` has no effect without {needed}: leave it out.")
    for name, (has_effect, needed) in WAITING.items():
        if is_given(args, name) and not has_effect(args):
            logger.warning("`%s=%r` has no effect without %s.", name, getattr(args, name), needed)
    if getattr(args, "train_sampling_strategy", "random") not in ("random", "sequential"):
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` is refused: pairs have no lengths, so take "
            "'random' or 'sequential'."
        )
    _check_accelerator(args.accelerator_config)
    _check_trackers(args.report_to)
    if args.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ImportError("`deepspeed` needs DeepSpeed, which is not installed: run `pip install deepspeed`.")
    if args.fsdp and not _is_distributed(args):
        raise ValueError("`fsdp` shards among processes, but there is one: start several with `accelerate launch`.")
    if args.fp16 and not _has_gpu(args):
        raise ValueError("`fp16=True` has no effect on a CPU: pass `bf16=True`, or leave it out.")


def check_run(args: TrainingArguments, eval_dataset: Any, optimizer: Any) -> None:
    """Refuse options that need held-out pairs where there are none; warn of those that a ready optimizer replaces.

    Args:
        args: Config of a trainer.
        eval_dataset: Its held-out pairs, or `None`.
        optimizer: A ready optimizer, or `None`.

    Raises:
        ValueError: Names the option.
    """
    if args.eval_on_start and eval_dataset is None:
        raise ValueError("`eval_on_start=True` needs held-out pairs: pass `eval_dataset`, or leave it out.")
    names = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    ignored = [f"`{name}`" for name in names if optimizer is not None and is_given(args, name)]
    if ignored:
        logger.warning("%s: no effect beside the optimizer that was passed.", ", ".join(ignored))


def _has_gpu(args: Any) -> bool:
    return torch.accelerator.is_available() and not args.use_cpu


def _check_accelerator(config: Any) -> None:
    if isinstance(config, str) and config.startswith("{"):
        config = json.loads(config)
    if isinstance(config, Mapping):
        known = [field.name for field in dataclasses.fields(AcceleratorConfig)]
        for name in config:
            if name not in known:
                raise ValueError(f"`accelerator_config` has an unknown key {name}{did_you_mean(name, known) or '.'}")
        config = AcceleratorConfig(**config)
    if not isinstance(config, AcceleratorConfig):  # none, or a file, which is checked when transformers has read it
        return
    for name, value in {"split_batches": True, "dispatch_batches": True, "even_batches": False}.items():
        if getattr(config, name) is value:
            raise ValueError(
                f"`accelerator_config` with `{name}={value}` is refused: rows are dealt to processes one batch each; "
                "leave it out."
            )


def _check_trackers(report_to: Any) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name in ("none", "all"):
            continue
        known = sorted(INTEGRATION_TO_CALLBACK)
        if name not in known:
            raise ValueError(
                f"`report_to` should name trackers among {', '.join(known)}, or all or none, but got "
                f"{name!r}{did_you_mean(name, known) or '.'}"
            )
        if name not in get_available_reporting_integrations():
            raise ImportError(f"`report_to={name!r}` needs {name}, which is not installed: run `pip install {name}`.")
