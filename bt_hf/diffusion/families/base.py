"""Model families: what differs between Stable Diffusion, SDXL, SD3, FLUX and others, as a few functions each.

The pipeline of diffusers already owns tokenizers, encoders, VAE, scheduler and `save_lora_weights`; a family says how
to call them. The trainer has no branch for any model: a further one is a further module with one `FAMILY`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from bt_hf.diffusion.families.schedules import NoiseSchedule

Size = tuple[int, int]  # height and width of the image, in pixels


@dataclass(frozen=True)
class Family:
    """How to train the denoiser of one family of pipelines.

    Attributes:
        name: Goes into logs, cards and cache keys.
        denoiser: The pipeline's attribute that is trained: "unet" or "transformer".
        beta: Published beta of the Diffusion-DPO loss, with the 1/2 of `losses.denoising_margin`: what the option
            `beta="family"` takes.
        target_modules: Default layers of the LoRA, as PEFT takes them.
        schedule: (pipeline, size) -> the noise of training.
        encode_images: (pipeline, pixels (N, 3, H, W) in [-1, 1]) -> mean and standard deviation of the latents, both
            (N, C, h, w) float32, shifted and scaled as the denoiser expects.
        encode_prompts: (pipeline, prompts) -> tensors (N, ...) of the same shape for every prompt. The keys are
            arguments of the pipeline's call, so that `pipeline(**values)` draws from them.
        longest_prompt: (pipeline) -> the tokenizer that reads prompts furthest, and how long one may be in its tokens,
            with those that it adds itself, so that nothing of it is cut off.
        predict: (denoiser, noisy (N, C, h, w), times (N,), conditions, size) -> prediction (N, C, h, w) float32. The
            denoiser may be wrapped by PEFT or DDP; the conditions are those of `encode_prompts`.
        multiple: (pipeline) -> height and width must be multiples of this many pixels.
        default_size: (pipeline) -> the size that the model was made for.
        encode_negative: As `encode_prompts`, for what the pipeline guides away from: given "", it returns what the
            pipeline takes where it is given no negative prompt. Default: `encode_prompts`.
        advice_if_distilled: (pipeline) -> sentences that say what to do instead, if the config tells that the model
            was distilled to draw in few steps; else `None`.
        call_options: Further arguments of the pipeline's call with embedded prompts, so that it draws at exactly the
            size it is asked for.
    """

    name: str
    denoiser: str
    beta: float
    target_modules: str | list[str]
    schedule: Callable[[Any, Size], NoiseSchedule]
    encode_images: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    encode_prompts: Callable[[Any, list[str]], dict[str, torch.Tensor]]
    longest_prompt: Callable[[Any], tuple[Any, int]]
    predict: Callable[[nn.Module, torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor], Size], torch.Tensor]
    multiple: Callable[[Any], int]
    default_size: Callable[[Any], Size]
    encode_negative: Callable[[Any, list[str]], dict[str, torch.Tensor]] | None = None
    advice_if_distilled: Callable[[Any], str | None] = lambda pipeline: None
    call_options: Mapping[str, Any] = field(default_factory=dict)


# Class of the pipeline -> module with its `FAMILY`; by name, so that a family is imported when a pipeline asks for it.
FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2",
    "Flux2Pipeline": "flux2",
    "SanaPipeline": "sana",
}


def find_family(pipeline: Any) -> Family:
    """The family of a loaded pipeline; classes derived from a supported pipeline count as it.

    Raises:
        TypeError: No family fits the pipeline.
        ValueError: A component is missing, or the denoiser expects more than noisy latents, as those for inpainting
            do, or was distilled.
    """
    for cls in type(pipeline).__mro__:
        if cls.__name__ in FAMILIES:
            family: Family = import_module(f"bt_hf.diffusion.families.{FAMILIES[cls.__name__]}").FAMILY
            _check_components(family, pipeline)
            _check_denoiser(family, pipeline)
            return family
    raise TypeError(
        f"{type(pipeline).__name__} is not supported: expected a text-to-image pipeline among {', '.join(FAMILIES)}. "
        "Load the model with one of these classes, or with `AutoPipelineForText2Image`."
    )


def _check_components(family: Family, pipeline: Any) -> None:
    """Raise a `ValueError` unless the pipeline has what every family needs; some go without a second text encoder."""
    needed = (family.denoiser, "vae", "scheduler", "tokenizer", "text_encoder")
    missing = [name for name in needed if getattr(pipeline, name, None) is None]
    if missing:
        raise ValueError(
            f"This {type(pipeline).__name__} was loaded without {', '.join(missing)}, but training needs all of it to "
            "encode images and prompts and to denoise: load the whole pipeline."
        )


def _check_denoiser(family: Family, pipeline: Any) -> None:
    """Raise a `ValueError` unless the denoiser takes noisy latents and nothing else, and is not known as distilled."""
    config = getattr(pipeline, family.denoiser).config
    # What is packed into 2x2 patches has four times the channels of the latents.
    latent = pipeline.vae.config.latent_channels * (4 if hasattr(pipeline, "_pack_latents") else 1)
    if config.in_channels != latent:
        raise ValueError(
            f"The {family.denoiser} of {type(pipeline).__name__} should take {latent} channels, those of its noisy "
            f"latents, but it takes {config.in_channels}. Models for inpainting, editing or control images are not "
            "supported: load the text-to-image model that it comes from."
        )
    if getattr(config, "time_cond_proj_dim", None) is not None:
        raise ValueError(
            f"The {family.denoiser} of {type(pipeline).__name__} was distilled to draw in few steps, with the "
            "guidance scale as one more input (LCM), and does not denoise as it was trained to. Train on the model "
            "that it was distilled from: the LoRA loads into both."
        )
    advice = family.advice_if_distilled(pipeline)
    if advice:
        raise ValueError(
            f"This {type(pipeline).__name__} was distilled to draw in few steps, which training on the error of "
            f"denoising would undo. {advice}"
        )


def find_tokenizers(pipeline: Any) -> dict[str, Any]:
    """The tokenizers by their names in the pipeline; that of FLUX.2-dev is inside a processor."""
    return {
        name: getattr(component, "tokenizer", component)
        for name, component in pipeline.components.items()
        if name.startswith("tokenizer") and component is not None
    }


def unwrap(denoiser: nn.Module) -> Any:
    """The model of diffusers inside what DDP, `torch.compile` and PEFT wrapped around it."""
    for name in ("module", "_orig_mod"):
        denoiser = getattr(denoiser, name, denoiser)
    return denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser


def cast(values: Mapping[str, torch.Tensor], denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """Floating tensors in the denoiser's dtype, everything on its device."""
    model = unwrap(denoiser)
    weight = next(value for value in model.parameters() if value.is_floating_point())
    # `model.dtype` would look through all of the model at every step; weights of 8 bits alone need it.
    device, dtype = weight.device, weight.dtype if weight.itemsize > 1 else model.dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in values.items()
    }


@torch.no_grad()
def encode_latents(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (N, C, h, w), float32, of the latents as the VAE gives them, not yet scaled.

    Args:
        vae: An autoencoder of diffusers; one without a distribution has standard deviation 0.
        pixels: (N, 3, H, W) in [-1, 1].
    """
    dtype = vae.dtype
    # SDXL's VAE overflows in float16 and says so.
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        if upcast:
            vae.to(torch.float32)
        output = vae.encode(pixels.to(vae.device, vae.dtype))
    finally:
        if upcast:
            vae.to(dtype)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mean.float(), output.latent_dist.std.float()
    mean = output[0].float()
    return mean, torch.zeros_like(mean)


def save_lora(family: Family, pipeline_class: Any, model: PeftModel, folder: str | Path) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` reads.

    The PEFT half of the folder is `model.save_pretrained(folder)`.

    Args:
        family: Family of the pipeline.
        pipeline_class: Class of the pipeline.
        model: The denoiser with its LoRA.
        folder: Written to; made if it does not exist.

    Raises:
        ValueError: The adapter is no LoRA, or trains whole modules beside it: diffusers could not load it.
    """
    check_adapter(model.peft_config[model.active_adapter])
    # The names stay PEFT's ("lora_A"): diffusers reads them from every family, whereas its own names for UNets
    # ("lora.down") leave convolutions as they are, and of such a mixture it would read one half.
    # `save_embedding_layers` would look for a config of the base on the Hub; a denoiser has no vocabulary.
    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    weights = {name.removeprefix("base_model.model."): value.contiguous() for name, value in weights.items()}
    # Without the config, loading would assume alpha = rank. What it says of the base would publish a local path.
    config = model.peft_config[model.active_adapter].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True}
    pipeline_class.save_lora_weights(
        folder,
        **{f"{family.denoiser}_lora_layers": weights, f"{family.denoiser}_lora_adapter_metadata": config},
    )


def check_adapter(config: Any) -> None:
    """Raise a `ValueError` unless diffusers can load an adapter of this config."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"Pipelines load LoRA adapters: expected a `LoraConfig`, but got {type(config).__name__}.")
    if config.modules_to_save:
        raise ValueError(
            f"Pipelines load LoRA weights alone, but `modules_to_save` asks for {config.modules_to_save}: leave it "
            "out, and name these modules in `target_modules`."
        )
    if config.bias != "none":
        raise ValueError(
            f"Pipelines load LoRA weights alone, but `bias={config.bias!r}` trains biases of the base too, which "
            "switching off the LoRA would not undo: pass `bias='none'`."
        )
