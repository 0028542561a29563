"""LoRA options of both trainers, named as in PEFT and TRL."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

DEFAULT_RANK = 8


@dataclass
class LoraOptions:
    """Options of a fresh LoRA. A `peft_config` given to the trainer takes their place.

    Example:
        >>> options = LoraOptions(lora_r=4, lora_target_modules=["q_proj", "v_proj"])
        >>> config = options.lora_config(options.lora_target_modules)
        >>> (config.r, config.lora_alpha)
        (4, 4)
    """

    lora_r: int | None = field(default=None, metadata={"help": f"Rank of the LoRA; {DEFAULT_RANK} by default."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Alpha of the LoRA; its rank by default."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the LoRA's input, in [0, 1)."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get a LoRA, or one regular expression, or all-linear. By default the last linear "
            "layer of both towers of a dual encoder; attention, feed-forward and convolution layers of a denoiser."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, str):  # from YAML
            self.lora_target_modules = [self.lora_target_modules]
        for name in ("lora_r", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` should be a whole number of at least 1, but got {value!r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` should be in [0, 1), but got {self.lora_dropout!r}.")
        if self.lora_target_modules == []:
            raise ValueError("`lora_target_modules` should name at least one module, but it is empty.")
        # Mixed into `TrainingArguments`, which have their own.
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()

    def given_lora_options(self) -> list[str]:
        """Return the names of the options that differ from their defaults."""
        return [option.name for option in fields(LoraOptions) if getattr(self, option.name) != option.default]

    def lora_config(self, target_modules: str | Sequence[str]) -> LoraConfig:
        """Return the LoRA on `target_modules`: names of modules, a regular expression, or "all-linear".

        A list with one entry may hold either of the latter two. A plain name is matched with the ends of the modules'
        names, alone as among others.
        """
        rank = self.lora_r or DEFAULT_RANK
        if not isinstance(target_modules, str):
            is_pattern = len(target_modules) == 1 and not re.fullmatch(r"[\w.]+", target_modules[0])
            target_modules = target_modules[0] if is_pattern else list(target_modules)
        return LoraConfig(
            r=rank,
            lora_alpha=self.lora_alpha or rank,
            lora_dropout=self.lora_dropout,
            target_modules=target_modules,
        )


def check_adapter_options(
    model: nn.Module, options: LoraOptions, peft_config: PeftConfig | None, full_finetuning: bool = False
) -> None:
    """Raise a `ValueError` if an option says how to adapt a model, but would have no effect.

    Args:
        model: The model to train, which may have an adapter already.
        options: LoRA options of the trainer.
        peft_config: The `peft_config` given to the trainer.
        full_finetuning: Train all weights.
    """
    asked = ["full_finetuning"] if full_finetuning else []
    asked += ["peft_config"] if peft_config is not None else []
    given = options.given_lora_options()
    if isinstance(model, PeftModel) and asked + given:
        raise ValueError(
            f"`model` already has an adapter, so training goes on from it: leave out {_quote(asked + given)}, or "
            "merge the adapter first (`model.merge_and_unload()`)."
        )
    if len(asked) == 2:
        raise ValueError("`full_finetuning` and `peft_config` exclude each other: leave one of them out.")
    if asked and given:
        raise ValueError(f"`{asked[0]}` excludes {_quote(given)}: leave out one or the other.")


def _quote(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
