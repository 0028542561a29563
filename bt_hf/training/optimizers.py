"""Check options of the optimizer and the schedule, by building them for one number."""

from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from bt_hf.training.option_checks import is_given


def check_optimizer(args: TrainingArguments) -> None:
    """Build the optimizer and the schedule of one number, so that a bad option shows before the training.

    Args:
        args: Config of a trainer, after `TrainingArguments` has converted it.

    Raises:
        ImportError: The optimizer is not installed.
        ValueError: An option is refused by the optimizer or the schedule, or has no effect on it.
    """
    number = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([number], lr=0.1)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if not args.optim.startswith(("galore", "apollo", "lomo", "adalomo")):  # these need the model
            optimizer = optimizer_class([number], **options)
            _check_optimizer_options(args, options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`optim={args.optim.value!r}`, `optim_args={args.optim_args!r}`: {error}") from None
    kwargs, schedule = args.lr_scheduler_kwargs or {}, args.lr_scheduler_type
    try:
        if kwargs and schedule in ("constant", "constant_with_warmup"):
            raise ValueError("it takes none")
        if schedule != "greedy":  # this one needs the model and its metrics
            get_scheduler(schedule, optimizer, 1, 10, kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_type={schedule.value!r}` does not go with `lr_scheduler_kwargs={kwargs!r}`: {error}."
        ) from None


def _check_optimizer_options(args: TrainingArguments, options: dict[str, Any]) -> None:
    """Raise a `ValueError` for an option whose default would give the optimizer the same options."""
    words = (args.optim_args or "").replace(" ", "").split(",")
    fewer = {word: ",".join(other for other in words if other != word) or None for word in words if word}
    tried = [("optim_args", word, value) for word, value in fewer.items()]
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if is_given(args, name):
            tried.append((name, name, type(args).__dataclass_fields__[name].default))
    for name, said, other in tried:
        if _optimizer_options(args, name, other) == options:
            raise ValueError(f"{said} has no effect on this optimizer: leave it out")


def _optimizer_options(args: TrainingArguments, name: str, value: Any) -> dict[str, Any]:
    """Return the options of the optimizer with another value of an option."""
    own = getattr(args, name)
    setattr(args, name, value)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)[1]
    finally:
        setattr(args, name, own)
