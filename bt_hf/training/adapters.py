"""Adapters on a base: put on so that switching them off gives the base back, and saved under the base's names."""

import copy
import logging
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

ADAPTER = "default"  # the one name whose weights PEFT saves into the folder itself, and not into one below it
_WRAPPERS = (OptimizedModule, DistributedDataParallel, nn.DataParallel)
# Parts of a PEFT layer that are the base's own.
_OF_BASE = {"base_layer", "original_module"}
_SAFE_INITS = (True, False, "gaussian")  # leave the base alone; all others are measured
_HALF = (torch.float16, torch.bfloat16)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of `torch.compile`, DDP and `nn.DataParallel`, also those of modules in it.

    Weights in a wrapper have other names, under which nobody would find them in the saved folder.
    """
    found = _inner(model)
    kinds = {type(model).__name__} if found is not model else set()
    while inside := next((name for name, child in found.named_modules() if isinstance(child, _WRAPPERS)), None):
        kinds.add(type(found.get_submodule(inside)).__name__)
        found.set_submodule(inside, _inner(found.get_submodule(inside)))
    if kinds:
        logger.warning(
            "The model is trained without its wrapper (%s), since the names of its weights would differ: pass "
            "`torch_compile=True` to compile the training, and start several processes for several devices.",
            ", ".join(sorted(kinds)),
        )
    return found


def _inner(module: nn.Module) -> nn.Module:
    while isinstance(module, _WRAPPERS):
        module = module._orig_mod if isinstance(module, OptimizedModule) else module.module
    return module


class Untouched:
    """State of a base before an adapter is put on, to compare with and to go back to.

    Args:
        base: Model without an adapter.
        weights: Keep a copy of the weights too.
    """

    def __init__(self, base: nn.Module, weights: bool = False) -> None:
        self.base = base
        self.modules = dict(base.named_modules())
        self.grads = {name: value.requires_grad for name, value in base.named_parameters()}
        tensors = [*base.named_parameters(), *base.named_buffers()] if weights else []
        self.weights = {name: (value, value.detach().clone()) for name, value in tensors}

    def changed(self) -> str | None:
        """Return the name of a weight that has another value now; None if all are as they were."""
        return next((name for name, (now, then) in self.weights.items() if not _same(now, then)), None)

    @torch.no_grad()
    def restore(self) -> nn.Module:
        """Take every adapter off, and return the base as it was."""
        for name, module in self.modules.items():  # parents come before their children
            if name and self.base.get_submodule(name) is not module:
                self.base.set_submodule(name, module)
        for now, then in self.weights.values():
            now.data = then
        for name, trained in self.grads.items():
            self.base.get_parameter(name).requires_grad_(trained)
        vars(self.base).pop("peft_config", None)
        return self.base


def _same(now: torch.Tensor, then: torch.Tensor) -> bool:
    return now.dtype == then.dtype and torch.equal(now, then)


def put_on(base: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap `base` with a fresh adapter that leaves the base's weights alone; the base is frozen.

    Raises:
        ValueError: There is an adapter already, PEFT can't put it on this model, it needs data to begin with, or the
            base would be lost: its weights change, or it trains what can't be switched off. `base` is then as it was.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError(
            "`model` has an adapter loaded already, which switching off ours would switch off as well: merge it or "
            "take it off, or pass the adapter's folder to train on from it."
        )
    init = getattr(config, "init_lora_weights", True)
    if init in ("eva", "lora_ga"):
        raise ValueError(
            f"`init_lora_weights={init!r}` takes its first weights from data, which the trainer doesn't show it: make "
            "the adapter with PEFT as its documentation says, and pass the `PeftModel`, or take another one."
        )
    plain = type(config) is LoraConfig and init in _SAFE_INITS
    before = Untouched(base, weights=not plain)
    try:
        model = get_peft_model(base, copy.deepcopy(config))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        before.restore()
        raise ValueError(
            f"PEFT can't put the adapter of this {type(config).__name__} on {type(base).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    try:
        if changed := before.changed():
            raise ValueError(
                f"`peft_config` changes the base itself (`init_lora_weights={init!r}` rewrites {changed}), so that "
                "switching the adapter off would not give it back to compare with: leave `init_lora_weights` out."
            )
        check_switchable(model)
        check_names(model)
    except ValueError:
        before.restore()
        raise
    if isinstance(init, str):  # it has begun: whoever loads it must not begin again, on other weights
        model.peft_config[ADAPTER].init_lora_weights = True
    return model


def take_over(model: PeftModel) -> None:
    """Check an adapter that is already on a model, and make it trainable if it was loaded for use alone.

    Raises:
        ValueError: It has another name than "default", is one of several, is merged, has changed its base, or trains
            what can't be switched off.
    """
    names = list(model.peft_config)
    if len(names) > 1:
        raise ValueError(
            f"`model` has several adapters ({', '.join(names)}), but one is trained against the base: remove the "
            "others by `model.delete_adapter(name)`, or merge what should count as the base."
        )
    if names != [ADAPTER]:
        raise ValueError(
            f"The adapter of `model` is named {names[0]!r}, and PEFT would save it where nobody looks for it: load or "
            f"make it without `adapter_name`, so that it is named {ADAPTER!r}."
        )
    config = model.peft_config[ADAPTER]
    init = getattr(config, "init_lora_weights", True)
    # Its base is not at hand any more to be compared with.
    if isinstance(init, str) and init not in (*_SAFE_INITS, "eva", "lora_ga", "mica", "orthogonal"):
        raise ValueError(
            f"The adapter of `model` was made with `init_lora_weights={init!r}`, which rewrites the base, so that "
            "switching it off does not give the base back: convert it to a plain LoRA first "
            "(`path_initial_model_for_weight_conversion` of PEFT's `save_pretrained`), or begin with a fresh one."
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter of `model` is merged into the base: undo it by `model.unmerge_adapter()`.")
    if not any(value.requires_grad for value in model.parameters()):
        model.set_adapter(ADAPTER)
        config.inference_mode = False
    check_switchable(model)
    check_names(model)


def check_switchable(model: PeftModel) -> None:
    """Raise a `ValueError` if `model` trains a weight that stays when its adapter is switched off, or trains none."""
    ours = {
        id(value)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name, value in module.named_parameters()
        if not _OF_BASE.intersection(name.split("."))
    }
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    kept = next((name for name, value in trained.items() if id(value) not in ours), None)
    kind = model.active_peft_config.peft_type.value
    if kept is not None:
        raise ValueError(
            f"The {kind} adapter trains {_plain(kept)}, which stays when the adapter is switched off, so that the "
            "base would be lost: pass `bias='none'`, name whole modules in `modules_to_save`, or choose a LoRA."
        )
    if not trained:
        raise ValueError(f"The {kind} adapter has no weights that can be trained: choose another `peft_config`.")


def check_names(model: nn.Module) -> None:
    """Raise a `ValueError` if an unmodified base would not find the adapter's weights by their names.

    Args:
        model: Model with or without an adapter; without one, all of its weights are looked for.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    known = _fresh_names(base)
    if known is None:
        return
    if isinstance(model, PeftModel):
        homes = [
            name.removeprefix("base_model.model.")
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
            and not {"token_adapter", *_OF_BASE}.intersection(name.split("."))
        ]
    else:
        homes = [name for name, _ in base.named_modules()]
    unknown = next((name for name in homes if name not in known), None)
    if unknown is not None:
        raise ValueError(
            f"A fresh {type(base).__name__} has no module {unknown!r}, so that whoever loads the adapter would not "
            "find its place: pass the model as it was loaded, without a wrapper around it or its modules."
        )


def _fresh_names(base: Any) -> set[str] | None:
    """Return the modules' names of a new model with the config of `base`; None if none can be made."""
    cls = type(base)
    try:
        with torch.device("meta"):
            config = copy.deepcopy(base.config)
            fresh = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    except Exception:  # a class of the user's own, made in another way
        return None
    return {name for name, _ in fresh.named_modules()}


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def train_in_float32(model: nn.Module) -> None:
    """Cast what is trained in half precision to float32, where small steps are not rounded away.

    Of an adapter its own weights, which PEFT's layers compute with beside a base in half precision; of full
    fine-tuning the whole model. Mixed precision (`bf16=True`) then works with float32 masters.
    """
    half = [name for name, value in model.named_parameters() if value.requires_grad and value.dtype in _HALF]
    if not half:
        return
    if not isinstance(model, PeftModel):
        logger.warning(
            "The model is in half precision, in which steps of training are rounded away: all of it is trained and "
            "saved in float32. Pass `bf16=True` to compute in bfloat16 all the same."
        )
        model.float()
        return
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name, value in module.named_parameters():
                if value.requires_grad and value.dtype in _HALF and not _OF_BASE.intersection(name.split(".")):
                    value.data = value.data.float()
    left = next((name for name, value in model.named_parameters() if value.requires_grad and value.dtype in _HALF), "")
    if left:
        logger.warning(
            "%s is trained in half precision, in which small steps are rounded away: load the base in float32 "
            "(`dtype=torch.float32`), and pass `bf16=True` to compute in bfloat16.",
            _plain(left),
        )


def saved_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapter's tensors, by the names under which PEFT saves them."""
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def saved_names(model: PeftModel) -> list[str]:
    """Return the names of the adapter's tensors as they are saved, without PEFT's prefix."""
    return [name.removeprefix("base_model.model.") for name in saved_shapes(model)]
