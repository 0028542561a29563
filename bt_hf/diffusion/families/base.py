"""Model families: what differs between Stable Diffusion, SDXL, SD3, FLUX and others, as a small class each.

The pipeline of diffusers already owns tokenizers, encoders, VAE, scheduler and `save_lora_weights`; a family says how
to call them. The trainer has no branch for any model: a further one is a further class, which overrides what differs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from bt_hf.diffusion.families.schedules import NoiseSchedule, find_schedule

Size = tuple[int, int]  # height and width of the image, in pixels
Conditions = Mapping[str, torch.Tensor]  # embeddings of N prompts, each (N, ...)


class Family(ABC):
    """Train the denoiser of a loaded pipeline.

    The class attributes are known without a pipeline, see `family_class`.

    Args:
        pipeline: A loaded `DiffusionPipeline`. Its encoders may be taken out of it once nothing is encoded any more.

    Attributes:
        name: Name in logs, cards and cache keys.
        denoiser: The pipeline's attribute that is trained: "unet" or "transformer".
        beta: Published beta of the Diffusion-DPO loss, with the 1/2 of `losses.denoising_margin`.
        target_modules: Default layers of the LoRA, as PEFT takes them.
        call_options: Further arguments of the pipeline's call with embedded prompts, with which it draws at exactly
            the size it is asked for.
        optional: Text encoders and tokenizers that the pipeline draws without. Default none.
        guidance_option: Name of the strength of guidance in the pipeline's call. Default "guidance_scale".
        task: Task on the Hub of what the pipeline draws. Default "text-to-image".
        frames: Frames of each clip that is trained on; 1 for images.
    """

    name: ClassVar[str]
    denoiser: ClassVar[str]
    beta: ClassVar[float]
    target_modules: ClassVar[str | list[str]]
    call_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    optional: ClassVar[frozenset[str]] = frozenset()
    guidance_option: ClassVar[str] = "guidance_scale"
    task: ClassVar[str] = "text-to-image"
    frames: int = 1

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline: Any = pipeline

    @property
    def module(self) -> Any:
        """The denoiser as it stands in the pipeline."""
        return getattr(self.pipeline, self.denoiser)

    # --- Sizes ---

    @property
    def stride(self) -> int:
        """Side, in pixels, of one latent pixel."""
        return self.pipeline.vae_scale_factor

    @property
    def pixels_per_token(self) -> int:
        """Side, in pixels, of what is one token to the denoiser. Default: one latent pixel."""
        return self.stride

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return self.pixels_per_token

    @property
    def default_size(self) -> Size:
        """Height and width that the model was made for."""
        sample = self.module.config.sample_size
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * self.stride, width * self.stride

    def train_on_clips(self, frames: int) -> None:
        """Set the frames of each clip; raise a `ValueError` if the pipeline draws images, or not that many frames."""
        if frames != 1:
            raise ValueError(
                f"`num_frames={frames}` is for a pipeline that draws videos, and {type(self.pipeline).__name__} draws "
                "images: leave it out."
            )

    # --- Noise, images and prompts ---

    def schedule(self, size: Size) -> NoiseSchedule:
        """Return the noise of training at this size."""
        height, width = (side // self.pixels_per_token for side in size)
        return find_schedule(self.pipeline.scheduler, height * width)

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the latents, as the denoiser takes them.

        Args:
            pixels: (N, 3, H, W) in [-1, 1]; of clips (N, 3, F, H, W).

        Returns:
            Both (N, C, h, w) float32. The frames of a clip stand beside its channels.
        """
        mean, std = encode_latents(self.pipeline.vae, pixels)
        config = self.pipeline.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        return (mean - shift) * config.scaling_factor, std * config.scaling_factor

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return tensors (N, ...), of the same shape for every prompt.

        `pipeline(**call_arguments(values))` draws from them.
        """

    def call_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Return the arguments with which the pipeline's call draws from embedded prompts. Default: as they are."""
        return dict(conditions)

    def encode_negative(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Encode negative prompts; "" gives what the pipeline takes where it is given none. As `encode_prompts`."""
        return self.encode_prompts(prompts)

    def longest_prompt(self) -> tuple[PreTrainedTokenizerBase, int]:
        """Return the tokenizer that reads prompts furthest, and the tokens that it reads, its own included."""
        return self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length

    def images_of(self, output: Any) -> list[Image.Image]:
        """Return the images of what the pipeline returns; of a clip its middle frame."""
        return output.images

    # --- The denoiser ---

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        """Predict the target of noisy latents.

        Args:
            denoiser: The pipeline's, which PEFT, DDP and `torch.compile` may have wrapped.
            noisy: (N, C, h, w).
            times: (N,), as the schedule gives them.
            conditions: Those of `encode_prompts`.
            size: Height and width of the images.

        Returns:
            (N, C, h, w) float32.
        """

    # --- Drawing with gradients: what the pipeline's call does around the denoiser ---

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (N, C, h, w), as the denoiser takes them, to (N, 3, H, W) float32, in [-1, 1] but for a rest.

        Gradients flow through it.
        """
        config = self.pipeline.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        return decode(self.pipeline.vae, latents / config.scaling_factor + shift)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Lay latents (N, C, h, w) out as the pipeline's scheduler steps them. Default: as they are."""
        return latents

    def unpack(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        """Undo `pack` for images of this size."""
        return latents

    def guides(self, scale: float) -> bool:
        """True if guidance of this strength needs a prediction for the negative prompt, too."""
        return scale > 1

    def guide(self, prediction: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Guide a prediction (N, ...), packed, away from that for the negative prompt, as the pipeline does."""
        return negative + scale * (prediction - negative)

    def with_guidance(self, conditions: Conditions, scale: float) -> Conditions:
        """Add the strength of guidance to the conditions of `predict`, for a denoiser that takes it as an input."""
        return conditions

    def advice_if_distilled(self) -> str | None:
        """Return what to train instead, if the config tells that the model was distilled to draw in few steps."""
        return None

    def interface_metadata(self) -> dict[str, str] | None:
        """Return metadata by which ComfyUI, A1111 and Forge sort LoRAs; `None` if none of them reads this family's.

        Names of architectures: `library/sai_model_spec.py` of https://github.com/kohya-ss/sd-scripts.
        """
        return None

    def save_lora(self, model: PeftModel, folder: str | Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, as `pipeline.load_lora_weights(folder)` reads it.

        The PEFT half of the folder is `model.save_pretrained(folder)`.

        Args:
            model: The denoiser with its LoRA.
            folder: Written to; made if it does not exist.

        Raises:
            ValueError: The adapter is not a LoRA, or trains whole modules beside it: diffusers could not load it.
        """
        check_adapter(model.peft_config[model.active_adapter])
        # The names stay PEFT's ("lora_A"): diffusers reads them from every family, whereas its own names for UNets
        # ("lora.down") leave convolutions as they are, and of such a mixture it would read one half.
        # `save_embedding_layers` would look for a config of the base on the Hub; a denoiser has no vocabulary.
        weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
        weights = {name.removeprefix("base_model.model."): value.contiguous() for name, value in weights.items()}
        # Without the config, loading would assume alpha = rank. What it says of the base would publish a local path.
        config = model.peft_config[model.active_adapter].to_dict()
        # diffusers puts the LoRA on in training mode, where a dropout would blur what is drawn.
        config |= {"base_model_name_or_path": None, "inference_mode": True, "lora_dropout": 0.0}
        self.pipeline.save_lora_weights(
            folder,
            **{f"{self.denoiser}_lora_layers": weights, f"{self.denoiser}_lora_adapter_metadata": config},
        )

    # --- Checks ---

    def check(self) -> None:
        """Raise a `ValueError` unless the pipeline can be trained: see `find_family`."""
        self._check_components()
        self._check_channels()
        self._check_distillation()

    def _check_components(self) -> None:
        readers = [name for name in self.pipeline.components if name.startswith(("text_encoder", "tokenizer"))]
        needed = [self.denoiser, "vae", "scheduler", *(name for name in readers if name not in self.optional)]
        missing = [name for name in needed if getattr(self.pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"This {type(self.pipeline).__name__} was loaded without {', '.join(missing)}, but training needs all "
                "of it to encode images and prompts and to denoise: load the whole pipeline."
            )

    @property
    def latent_channels(self) -> int:
        """Channels of what the denoiser takes: those of the VAE, four times over if patches of 2 x 2 are packed."""
        return self.pipeline.vae.config.latent_channels * (4 if hasattr(self.pipeline, "_pack_latents") else 1)

    def _check_channels(self) -> None:
        channels, latent = self.module.config.in_channels, self.latent_channels
        if channels != latent:
            raise ValueError(
                f"The {self.denoiser} of {type(self.pipeline).__name__} should take {latent} channels, those of its "
                f"noisy latents, but it takes {channels}. Models for inpainting, editing or control images are not "
                "supported: load the text-to-image model that it comes from."
            )

    def _check_distillation(self) -> None:
        if getattr(self.module.config, "time_cond_proj_dim", None) is not None:
            raise ValueError(
                f"The {self.denoiser} of {type(self.pipeline).__name__} was distilled to draw in few steps, with the "
                "guidance scale as one more input (LCM), and does not denoise as it was trained to. Train on the "
                "model that it was distilled from: the LoRA loads into both."
            )
        advice = self.advice_if_distilled()
        if advice:
            raise ValueError(
                f"This {type(self.pipeline).__name__} was distilled to draw in few steps, which training on the error "
                f"of denoising would undo. {advice}"
            )


# Ends of the names of tensors, as PEFT saves them and diffusers loads them.
_LORA_TENSORS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector")

# Class of the pipeline -> module and class of the family; by name, so that it is imported when a pipeline asks for it.
FAMILIES = {
    "StableDiffusionPipeline": "sd.StableDiffusion",
    "StableDiffusionXLPipeline": "sdxl.StableDiffusionXL",
    "StableDiffusion3Pipeline": "sd3.StableDiffusion3",
    "FluxPipeline": "flux.Flux",
    "Flux2KleinPipeline": "flux2.Flux2",
    "Flux2Pipeline": "flux2.Flux2",
    "QwenImagePipeline": "qwen.QwenImage",
    "SanaPipeline": "sana.Sana",
    "WanPipeline": "wan.Wan",
    "ZImagePipeline": "z_image.ZImage",
}


def family_class(pipeline_class_name: str) -> type[Family] | None:
    """Return the family of a class of pipelines by its name, `None` if it has none; nothing is loaded.

    Example:
        >>> from bt_hf.diffusion.families.base import family_class
        >>> family_class("StableDiffusionXLPipeline").beta
        5000.0
    """
    if pipeline_class_name not in FAMILIES:
        return None
    module, name = FAMILIES[pipeline_class_name].split(".")
    return getattr(import_module(f"bt_hf.diffusion.families.{module}"), name)


def find_family(pipeline: DiffusionPipeline) -> Family:
    """Wrap a loaded pipeline in its family; classes derived from a supported pipeline count as it.

    Raises:
        TypeError: No family fits the pipeline.
        ValueError: A component is missing, or the denoiser expects more than noisy latents, as those for inpainting
            do, or was distilled.
    """
    for cls in type(pipeline).__mro__:
        found = family_class(cls.__name__)
        if found is not None:
            family = found(pipeline)
            family.check()
            return family
    raise TypeError(
        f"{type(pipeline).__name__} is not supported: expected a text-to-image pipeline among {', '.join(FAMILIES)}. "
        "Load the model with one of these classes, or with `AutoPipelineForText2Image`."
    )


def check_adapter(config: PeftConfig) -> None:
    """Raise a `ValueError` unless diffusers can load an adapter of this config."""
    if type(config) is not LoraConfig:  # AdaLoRA is derived from it, but diffusers can't load it
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


def check_tensors(names: Iterable[str]) -> None:
    """Raise a `ValueError` if a saved tensor of an adapter is none that diffusers loads.

    Args:
        names: Names without PEFT's prefix.
    """
    unknown = next((name for name in names if not name.endswith(_LORA_TENSORS)), None)
    if unknown is not None:
        raise ValueError(
            f"Pipelines load LoRA weights alone, but this `peft_config` trains {unknown} too, which diffusers would "
            "leave out: choose a plain LoRA, with DoRA if you like."
        )


# --- Shared by the families ---


def unwrap(denoiser: nn.Module) -> Any:
    """Return the model of diffusers inside the wrappers of DDP, `torch.compile` and PEFT."""
    for name in ("module", "_orig_mod"):
        denoiser = getattr(denoiser, name, denoiser)
    return denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser


def cast(values: Mapping[str, torch.Tensor], denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """Move tensors to the denoiser's device, floating ones in its dtype."""
    model = unwrap(denoiser)
    # Some layers of some models stay in float32, whatever the others are in.
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    weight = next(
        value
        for name, value in model.named_parameters()
        if value.is_floating_point() and not any(part in name for part in kept)
    )
    # `model.dtype` would look through all of the model at every step; weights of 8 bits alone need it.
    device, dtype = weight.device, weight.dtype if weight.itemsize > 1 else model.dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in values.items()
    }


@torch.no_grad()
def encode_latents(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the latents as the VAE gives them, not yet scaled.

    Args:
        vae: An autoencoder of diffusers; one without a distribution has standard deviation 0.
        pixels: (N, 3, H, W) in [-1, 1].

    Returns:
        Both (N, C, h, w) float32.
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


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents as the VAE takes them, (N, C, h, w), to (N, 3, H, W) float32, with gradients."""
    return vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0].float()
