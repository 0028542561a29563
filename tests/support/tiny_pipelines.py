"""Tiny random pipelines of every supported family of diffusers.

Real classes at the smallest configurations that still have every kind of layer; vocabularies are those of
`tiny_models`, so nothing is downloaded. Every pipeline draws 32 x 32 images, with a VAE of stride 4.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from bt_hf.diffusion.collator import DiffusionCollator
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.families.base import find_family
from tiny_models import CONTEXT, clip_images, clip_tokenizer, gemma_tokenizer, qwen_tokenizer, t5_tokenizer

SIZE = (32, 32)
# Language models of today, as they encode prompts.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
DECODER = {"hidden_size": 16, "intermediate_size": 32, **HEADS}


# --- Components ---


def clip_text(cls: type = CLIPTextModel, **kwargs: Any) -> nn.Module:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kwargs,
    )
    return cls(config)


def t5(width: int = 32) -> nn.Module:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config)


def vae(channels: int = 4, cls: type = AutoencoderKL, **kwargs: Any) -> Any:
    return cls(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE[0],
        **kwargs,
    )


def unet(**kwargs: Any) -> UNet2DConditionModel:
    """With a shortcut convolution, attention at both levels, and every kind of layer that the LoRA trains."""
    config = {
        "sample_size": SIZE[0] // 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**config | kwargs)


# --- Pipelines ---


def make_sd(scheduler: Any = None, **kwargs: Any) -> DiffusionPipeline:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return StableDiffusionPipeline(
        vae=vae(scaling_factor=0.3),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(**kwargs),
        scheduler=scheduler or PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sd2() -> DiffusionPipeline:
    """Predicts v, to the end of the noise; transformer blocks with linear projections, as in Stable Diffusion 2."""
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    return make_sd(scheduler, use_linear_projection=True)


def make_sdxl() -> DiffusionPipeline:
    denoiser = unet(
        cross_attention_dim=32,
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.2, force_upcast=True),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=denoiser,
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        add_watermarker=False,
    )


def make_sd3() -> DiffusionPipeline:
    denoiser = SD3Transformer2DModel(
        sample_size=SIZE[0] // 4,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(8, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def make_flux(guidance_embeds: bool = True) -> DiffusionPipeline:
    denoiser = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(4, scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=denoiser,
    )


def flux2_parts(text_width: int, guidance_embeds: bool) -> dict[str, Any]:
    """Parts that klein and dev have in common."""
    autoencoder = vae(4, AutoencoderKLFlux2)
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    denoiser = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * text_width,  # three layers of the text encoder side by side
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 4, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": autoencoder, "transformer": denoiser, "scheduler": scheduler}


def make_flux2(is_distilled: bool = False) -> DiffusionPipeline:
    """FLUX.2 klein."""
    tokenizer = qwen_tokenizer()
    # The pipeline reads layers 9, 18 and 27.
    text = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=27, **DECODER)
    parts = flux2_parts(text.hidden_size, guidance_embeds=False)
    encoder = Qwen3ForCausalLM(text)
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, is_distilled=is_distilled, **parts)


def make_flux2_dev() -> DiffusionPipeline:
    """FLUX.2 dev, whose tokenizer is inside a processor, here LLaVA's: Pixtral's can't be made without torchvision."""
    tokenizer = qwen_tokenizer()
    template = "[{{ messages[1].content[0].text }}]"  # the system's message would be 500 letters
    processor = LlavaProcessor(clip_images(), tokenizer, chat_template=template)
    text = MistralConfig(vocab_size=len(tokenizer), num_hidden_layers=30, **DECODER)  # layers 10, 20 and 30
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    parts = flux2_parts(text.hidden_size, guidance_embeds=True)
    return Flux2Pipeline(text_encoder=encoder, tokenizer=processor, **parts)


def make_sana() -> DiffusionPipeline:
    tokenizer = gemma_tokenizer()
    text = Gemma2Config(vocab_size=len(tokenizer), num_hidden_layers=2, **DECODER)
    denoiser = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=SIZE[0] // 4,
    )
    autoencoder = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (5,), (5,)),
        decoder_qkv_multiscales=((), (5,), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text),
        vae=autoencoder,
        transformer=denoiser,
        # DPM-Solver, which some checkpoints bring, converts tensors in a way that NumPy 2 warns of.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def make_qwen() -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, **DECODER}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    vision = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 2.0, 1.0],
    )
    denoiser = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=denoiser,
    )


def make_z_image() -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    denoiser = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(4, scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=2, **DECODER)),
        tokenizer=tokenizer,
        transformer=denoiser,
    )


def make_wan(expand_timesteps: bool = False, **kwargs: Any) -> DiffusionPipeline:
    """Wan 2.1; with `expand_timesteps` the build of Wan 2.2 TI2V-5B."""
    tokenizer = t5_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    # The VAE of 2.2 packs patches of 2 x 2 pixels, and so has twice the stride.
    patched = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True} if expand_timesteps else {}
    autoencoder = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],  # both read four frames at a time
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 2.0, 1.0],
        scale_factor_temporal=4,
        scale_factor_spatial=8 if expand_timesteps else 4,
        **patched,
    )
    denoiser = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=autoencoder,
        transformer=denoiser,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        expand_timesteps=expand_timesteps,
        **kwargs,
    )


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": make_sd,
    "sd2": make_sd2,
    "sdxl": make_sdxl,
    "sd3": make_sd3,
    "flux": make_flux,
    "flux2": make_flux2,
    "flux2_dev": make_flux2_dev,
    "sana": make_sana,
    "qwen": make_qwen,
    "z_image": make_z_image,
    "wan": make_wan,
    "wan22": lambda: make_wan(expand_timesteps=True),
}


def build(name: str | Callable = "sd", seed: int = 0) -> DiffusionPipeline:
    """A random pipeline, the same for the same seed, that draws without a progress bar."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = (PIPELINES[name] if isinstance(name, str) else name)()
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                # The usual initialisation is made for wide layers, and zero for what should start as an identity:
                # at this width prompts would hardly matter.
                for parameter in module.parameters():
                    if parameter.ndim > 1:
                        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(folder: Path, name: str = "sd", seed: int = 0) -> str:
    """A pipeline folder as the Hub has it."""
    build(name, seed).save_pretrained(folder)
    return str(folder)


def draw(pipeline: DiffusionPipeline, prompt: str | list[str] | None = "a red apple", **kwargs: Any) -> torch.Tensor:
    """The first image (3, H, W) in [0, 1], or clip (F, 3, H, W), after two steps, always from the same noise."""
    height, width = SIZE
    options = {"height": height, "width": width, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    if isinstance(pipeline, SanaPipeline):
        options["use_resolution_binning"] = False
    if isinstance(pipeline, QwenImagePipeline):
        options["true_cfg_scale"] = options.pop("guidance_scale")  # the other name is for distilled models
    if isinstance(pipeline, ZImagePipeline):
        options["guidance_scale"] = 0.0  # its 1 is everybody else's 2
    if isinstance(pipeline, WanPipeline):
        clip = pipeline(
            prompt=prompt, generator=torch.Generator().manual_seed(0), **{"num_frames": 1, **options, **kwargs}
        ).frames[0]
        return clip[0] if len(clip) == 1 else clip
    prompt = list(prompt) if isinstance(prompt, list) else prompt  # Z-Image writes its chat into the list
    return pipeline(prompt=prompt, generator=torch.Generator().manual_seed(0), **options | kwargs).images[0]


def encoder(sample: bool = False, name: str = "sd") -> PairEncoder:
    return PairEncoder(find_family(build(name)), DiffusionCollator(SIZE), sample, torch.device("cpu"))
