"""Pretrain the tiny Stable Diffusion pipeline of the emoji domain from scratch.

    python examples/emoji/pretrain_diffusion.py --stage vae    # trains the autoencoder of examples/emoji/diffusion
    python examples/emoji/pretrain_diffusion.py --stage unet   # trains the denoiser on its latents
    python examples/emoji/pretrain_diffusion.py --stage sample # draws a sheet with what is there

Only training concepts are used, in all five styles alike. The text encoder is the text tower of `clip/` without its
last layer, as Stable Diffusion 2 takes it, and stays frozen. Captions are bare ("red apple", or its tags), name the
style ("red apple, twemoji"), or are empty, which classifier-free guidance needs. The denoiser predicts v on a schedule
with zero terminal SNR (https://arxiv.org/abs/2305.08891): drawings on white need to begin from pure noise.
Two processes of one thread each bear other work on the machine better than one of two:

    OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 examples/emoji/pretrain_diffusion.py \
        --stage unet --batch_size 32
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, get_cosine_schedule_with_warmup, set_seed

from emoji import CLIP_FOLDER, DIFFUSION_FOLDER, STYLE_NAMES, STYLES, fast_precision, load_emoji
from pretrain_clip import EmojiCorpus, augment

LATENT_CHANNELS = 8
SNR_GAMMA = 5.0  # https://arxiv.org/abs/2303.09556


def build_vae() -> AutoencoderKL:
    channels = (32, 64, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(96, 144),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


def build_text_encoder() -> CLIPTextModel:
    """Return the text tower of the neutral CLIP without its last layer."""
    clip = CLIPModel.from_pretrained(CLIP_FOLDER, dtype=torch.float32)
    config = clip.config.text_config
    config.num_hidden_layers -= 1
    encoder = CLIPTextModel(config)
    weights = clip.text_model.state_dict()
    missing = encoder.load_state_dict(
        {name: weights[name.removeprefix("text_model.")] for name in encoder.state_dict()}, strict=False
    )
    assert not missing.missing_keys, missing
    return encoder.eval().requires_grad_(False)


def optimizer_of(model: torch.nn.Module, learning_rate: float, steps: int):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)


def edges(images: torch.Tensor) -> torch.Tensor:
    """Return the differences between neighbouring pixels in both directions."""
    return torch.cat([images.diff(dim=2).flatten(1), images.diff(dim=3).flatten(1)], 1)


def pretrain_vae(
    model: AutoencoderKL, corpus: EmojiCorpus, steps: int, batch_size: int, learning_rate: float
) -> AutoencoderKL:
    model = model.to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer, schedule = optimizer_of(model, learning_rate, steps)
    pixels = corpus.pixels.flatten(0, 1)
    progress = tqdm(range(steps), desc="autoencoder", mininterval=10)
    for step in progress:
        batch = augment(pixels[torch.randint(len(pixels), (batch_size,))].float() / 255) * 2 - 1
        batch = batch.contiguous(memory_format=torch.channels_last)
        with fast_precision():
            posterior = model.encode(batch).latent_dist
            decoded = model.decode(posterior.sample()).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        # Outlines, and the colour of each latent pixel's patch, are learnt late from single pixels alone.
        loss = F.l1_loss(decoded, batch) + F.l1_loss(edges(decoded), edges(batch)) + 1e-3 * kl
        loss = loss + F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(batch, 8))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 50 == 49:
            progress.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}")
    return average.module


@torch.no_grad()
def encode_corpus(vae: AutoencoderKL, corpus: EmojiCorpus, copies: int) -> torch.Tensor:
    """Encode every drawing, as it is and a little moved: (copies, concepts * styles, C, 8, 8), mean and logvar."""
    pixels = corpus.pixels.flatten(0, 1)
    latents = []
    for copy in range(copies):
        moved = []
        for chunk in pixels.split(256):
            images = chunk.float() / 255
            images = images if copy == 0 else augment(images)
            with fast_precision():
                moved.append(vae.encode(images * 2 - 1).latent_dist.parameters.float())
        latents.append(torch.cat(moved))
    return torch.stack(latents)


def caption(corpus: EmojiCorpus, concept: int, style: int) -> str:
    kind = random.random()
    if kind < 0.1:
        return ""
    if kind < 0.6:
        return corpus.bare_caption(concept)
    return corpus.styled_caption(concept, style) if kind < 0.95 else STYLE_NAMES[STYLES[style]]


def pretrain_unet(
    corpus: EmojiCorpus, vae: AutoencoderKL, args: argparse.Namespace
) -> tuple[UNet2DConditionModel, float]:
    encoder, tokenizer = build_text_encoder(), CLIPTokenizer.from_pretrained(CLIP_FOLDER)
    scheduler = build_scheduler()
    parameters = encode_corpus(vae, corpus, args.copies)
    scale = 1 / parameters[:, :, :LATENT_CHANNELS].std().item()
    start = UNet2DConditionModel.from_pretrained(args.output_dir / "unet").float() if args.go_on else build_unet()
    model = start.to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer, schedule = optimizer_of(model, args.learning_rate, args.steps)
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(model)
    set_seed(args.seed + accelerator.process_index)  # each process draws its own batches
    progress = tqdm(range(args.steps), desc="denoiser", mininterval=10, disable=not accelerator.is_main_process)
    began, running = time.perf_counter(), 0.0
    for step in progress:
        drawn = torch.randint(parameters.shape[1], (args.batch_size,))
        copies = torch.randint(parameters.shape[0], (args.batch_size,))
        mean, logvar = parameters[copies, drawn].chunk(2, dim=1)
        latents = scale * (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean))
        texts = [caption(corpus, index // len(STYLES), index % len(STYLES)) for index in drawn.tolist()]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        # Draw a timestep in each of B equal slices: less noise in the gradient than independent draws.
        timesteps = ((torch.arange(args.batch_size) + torch.rand(args.batch_size)) / args.batch_size * 1000).long()
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(latents, noise, timesteps)
        with torch.no_grad():
            states = encoder(tokens).last_hidden_state
        predicted = wrapped(noisy, timesteps, states).sample  # bfloat16 is slower than float32 at this size
        snr = compute_snr(scheduler, timesteps)
        weight = snr.clamp(max=SNR_GAMMA) / (snr + 1) + 0.1  # the last steps, of almost no signal, count a little
        loss = (weight * F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 49:
            progress.set_postfix(loss=f"{running:.4f}", minutes=f"{(time.perf_counter() - began) / 60:.0f}")
        if step % args.save_steps == args.save_steps - 1 and accelerator.is_main_process:
            save_pipeline(args.output_dir, vae, average.module, scale)
    return average.module, scale


def save_pipeline(folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, scale: float) -> None:
    vae.register_to_config(scaling_factor=round(scale, 4))
    pipeline = StableDiffusionPipeline(
        vae,
        build_text_encoder(),
        CLIPTokenizer.from_pretrained(CLIP_FOLDER),
        unet,
        build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for name in ("vae", "unet", "text_encoder"):
        module = getattr(pipeline, name)
        if name == "text_encoder":
            copy = type(module)(module.config)
        else:  # without the note of the folder that it was loaded from
            copy = type(module).from_config({key: value for key, value in module.config.items() if key[0] != "_"})
        copy.load_state_dict(module.state_dict())
        setattr(pipeline, name, copy.half())
    pipeline.save_pretrained(folder)


@torch.no_grad()
def sample_sheet(folder: Path, path: Path, guidance_scale: float = 3.0) -> None:
    """Draw a row for each caption: the bare caption four times, then one of each style by name."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    captions = [*load_emoji("train")["caption"][7::605][:11], *load_emoji("held_out")["caption"][7::110][:11]]
    prompts = [
        text for name in captions for text in [name] * 4 + [f"{name}, {STYLE_NAMES[style]}" for style in STYLES]
    ]
    images = []
    for start in range(0, len(prompts), 33):
        generator = torch.Generator().manual_seed(start)
        with fast_precision():
            images += pipeline(
                prompts[start : start + 33],
                num_inference_steps=25,
                guidance_scale=guidance_scale,
                generator=generator,
                height=64,
                width=64,
            ).images
    sheet = Image.new("RGB", (9 * 66, len(captions) * 66), "grey")
    for index, image in enumerate(images):
        sheet.paste(image, (index % 9 * 66, index // 9 * 66))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)
    print(captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["vae", "unet", "sample"], required=True)
    parser.add_argument("--output_dir", type=Path, default=DIFFUSION_FOLDER)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=64, help="of each process")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--copies", type=int, default=4, help="how often each drawing is encoded, each time moved")
    parser.add_argument("--go_on", action="store_true", help="begin with the weights in --output_dir")
    parser.add_argument("--save_steps", type=int, default=1000)
    parser.add_argument("--sheet", type=Path, default=Path("samples.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    if args.stage == "sample":
        sample_sheet(args.output_dir, args.sheet)
        return
    corpus = EmojiCorpus("train")
    if args.stage == "vae":
        start = AutoencoderKL.from_pretrained(args.output_dir / "vae").float() if args.go_on else build_vae()
        model = pretrain_vae(start, corpus, args.steps, args.batch_size, args.learning_rate)
        model.half().save_pretrained(args.output_dir / "vae")
    else:
        vae = AutoencoderKL.from_pretrained(args.output_dir / "vae", dtype=torch.float32)
        unet, scale = pretrain_unet(corpus, vae, args)
        if PartialState().is_main_process:
            save_pipeline(args.output_dir, vae, unet, scale)


if __name__ == "__main__":
    main()
