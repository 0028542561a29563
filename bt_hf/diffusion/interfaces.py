"""File of a preference LoRA for ComfyUI, A1111 and Forge, beside those for diffusers and PEFT."""

import logging
from functools import lru_cache
from pathlib import Path

from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from bt_hf.data.atomic import write_file
from bt_hf.diffusion.families.base import Family
from bt_hf.hub.contract import hub_id
from bt_hf.hub.interfaces import interface_file, interface_name, interface_tensors, is_plain

logger = logging.getLogger(__name__)


def find_interface_name(family: Family, model: PeftModel, run: str) -> str | None:
    """Return the name of the file, or `None` if ComfyUI, A1111 and Forge can't read such a LoRA.

    Args:
        family: Family of the pipeline; none of the three reads LoRAs for Sana, nor those for Wan by these names.
        model: The denoiser with its LoRA; DoRA and biases are not read by all of them, or not alike.
        run: Name of the run, that of its folder.
    """
    config = model.peft_config[model.active_adapter].to_dict()
    plain = is_plain({**config, "peft_type": str(getattr(config["peft_type"], "value", config["peft_type"]))})
    return interface_name(run) if plain and family.interface_metadata() is not None else None


def save_for_interfaces(family: Family, model: PeftModel, folder: str | Path, run: str, base: str | None) -> None:
    """Write "<run>_comfyui.safetensors"; without such a file, log why, once.

    Args:
        family: Family of the pipeline.
        model: The denoiser with its LoRA.
        folder: Written to; made if it does not exist.
        run: Name of the run, that of its folder.
        base: Hub id or path of the base; a path is not written.
    """
    name = find_interface_name(family, model, run)
    if name is None:
        why = (
            "no DoRA or biases"
            if family.interface_metadata() is not None
            else f"no LoRA for {family.name} by the names of diffusers"
        )
        _log_once(f"There is no file for ComfyUI, A1111 and Forge beside the LoRA: they read {why}.")
        return
    config = model.peft_config[model.active_adapter].to_dict()
    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    weights = {key: value.detach().cpu() for key, value in weights.items()}
    tensors = interface_tensors(weights, config, family.denoiser)
    base = hub_id(base) if base else None
    content = interface_file(tensors, config, run, base, family.interface_metadata() or {})
    write_file(Path(folder) / name, content)


@lru_cache(maxsize=16)
def _log_once(message: str) -> None:
    logger.warning(message)
