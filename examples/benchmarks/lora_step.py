"""Measure what a training step of a preference LoRA costs beyond its network, and what the cache saves.

    python examples/benchmarks/lora_step.py            # seconds a step, side by side in one run
    python examples/benchmarks/lora_step.py --memory   # peak memory with and without the cache

Compared are, on the emoji pipeline with batches of 16 pairs:

- trainer: `PreferenceLoRATrainer.train`, from the end of one step to the end of the next; images and prompts are
  encoded beforehand;
- trainer, errors of the base computed once: the same with fixed noise, and those errors known beforehand;
- straight loop: the paper's formula written down below, which encodes images and prompts at every step;
- bare: forwards without and with the LoRA, one backward, and the optimizer's step, on one batch that lies in memory;
- bare, base known: the same without the base's forward, as is due with fixed noise.

They take turns of a few steps, so that a noisy machine is noisy for all; medians are compared. The tables are written
to `docs/results/lora_step_time.json` and `lora_step_memory.json`.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import AutoencoderKL, PNDMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import timing
from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer
from bt_hf.diffusion.families.sd import UNET_LAYERS
from emoji import CLIP_FOLDER, DIFFUSION_FOLDER
from results import Report, make_parser
from taste import preference_pairs
from timing import DEVICE, Turn

BATCH, STEPS, ROUNDS = 16, 5, 10  # pairs; steps in a turn, of which the first is not counted; turns of each
# A rate at which hardly anything moves: a saturated loss has gradients of denormal numbers, which are slow.
BETA, RATE, RANK = 2000.0, 1e-6, 8
KNOWN = "trainer, errors of the base computed once"


# --- The trainer ---


def train(model: Path, pairs: Dataset, scratch: Path, **options) -> timing.Training:
    """Make a trainer; a turn is a few of its steps."""
    defaults = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "beta": BETA,
        "lora_r": RANK,
        "cache_dir": str(scratch / "cache"),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,  # as long as a row does not ask for it
        "use_cpu": DEVICE.type == "cpu",  # the Trainer allows bf16 on a CPU only when told so
    }
    args = PreferenceLoRAConfig(str(scratch / "lora"), **defaults | options)
    return timing.Training(PreferenceLoRATrainer(str(model), args, train_dataset=pairs))


# --- Without the trainer ---


def network(
    model: Path, channels_last: bool = True
) -> tuple[StableDiffusionPipeline, PeftModel, torch.optim.Optimizer]:
    """Load the pipeline, its denoiser with a LoRA as the trainer makes it, and the Trainer's optimizer."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(DEVICE)
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        module.eval().requires_grad_(False)
    denoiser = get_peft_model(pipeline.unet, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=UNET_LAYERS))
    denoiser.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    return pipeline, denoiser, torch.optim.AdamW(weights, lr=RATE, fused=True)


@dataclass
class Batch:
    """Inputs and targets of the denoiser.

    Attributes:
        inputs: Noisy latents (2B, C, h, w), timesteps (2B,), and embeddings of the prompts (2B, L, D).
        target: (2B, C, h, w).
        base: (2B,) errors of the base, if they are known.
    """

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    target: torch.Tensor
    base: torch.Tensor | None = None


def errors(denoiser: PeftModel, batch: Batch, bf16: bool) -> torch.Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        predicted = denoiser(*batch.inputs).sample
    return (predicted.float() - batch.target).square().mean((1, 2, 3))  # (2B,)


def update(denoiser: PeftModel, optimizer: torch.optim.Optimizer, batch: Batch, bf16: bool) -> None:
    """Take one step of Diffusion-DPO: https://arxiv.org/abs/2311.12908, equation 14."""
    base = batch.base
    if base is None:
        denoiser.base_model.disable_adapter_layers()
        with torch.no_grad():
            base = errors(denoiser, batch, bf16)
        denoiser.base_model.enable_adapter_layers()
    chosen, rejected = (errors(denoiser, batch, bf16) - base).chunk(2)
    loss = -F.logsigmoid(-BETA / 2 * (chosen - rejected)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def straight_loop(
    model: Path, pairs: Dataset, bf16: bool, batch: int = BATCH, size: int = 64, channels_last: bool = True
) -> Turn:
    """Return a turn that encodes images and prompts when a step needs them, in float32."""
    pipeline, denoiser, optimizer = network(model, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    scheduler, generator = pipeline.scheduler, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def encode(rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        drawings = [image for name in ("chosen", "rejected") for image in rows[name]]
        images = [np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)) for image in drawings]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipeline.vae.encode(pixels.to(DEVICE)).latent_dist.mean * pipeline.vae.config.scaling_factor
        ids = pipeline.tokenizer(list(rows["prompt"]), padding="max_length", truncation=True, return_tensors="pt")
        return latents, pipeline.text_encoder(ids.input_ids.to(DEVICE)).last_hidden_state.repeat(2, 1, 1)

    def step() -> None:
        latents, embeds = encode(pairs.select(torch.randperm(len(pairs), generator=generator)[:batch].tolist()))
        noise = torch.randn(batch, *latents.shape[1:], generator=generator).repeat(2, 1, 1, 1).to(DEVICE)
        times = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).repeat(2).to(DEVICE)
        noisy = scheduler.add_noise(latents, noise, times).contiguous(memory_format=memory_format)
        target = scheduler.get_velocity(latents, noise, times)
        update(denoiser, optimizer, Batch((noisy, times, embeds), target), bf16)

    return timing.repeat(step, STEPS)


def bare(model: Path, bf16: bool, base_known: bool, pairs: int = BATCH, channels_last: bool = True) -> Turn:
    """Return a turn of forwards, backward and optimizer's step on one batch of `pairs` pairs, made once."""
    pipeline, denoiser, optimizer = network(model, channels_last)
    config, length = denoiser.config, pipeline.tokenizer.model_max_length
    noisy = torch.randn(2 * pairs, config.in_channels, config.sample_size, config.sample_size, device=DEVICE)
    embeds = torch.randn(2 * pairs, length, config.cross_attention_dim, device=DEVICE)
    times = torch.randint(pipeline.scheduler.config.num_train_timesteps, (2 * pairs,), device=DEVICE)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    batch = Batch((noisy.contiguous(memory_format=memory_format), times, embeds), torch.randn_like(noisy))
    if base_known:
        with torch.no_grad():
            batch.base = errors(denoiser, batch, bf16)  # a fresh LoRA changes nothing
    return timing.repeat(partial(update, denoiser, optimizer, batch, bf16), STEPS)


def compare(report: Report, model: Path, bf16: bool) -> None:
    """Print a table of one precision."""
    torch.manual_seed(0)
    pairs = preference_pairs("fluent", 4 * BATCH)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        began = time.perf_counter()
        cached = train(model, pairs, scratch, bf16=bf16)
        filling = time.perf_counter() - began
        known = train(model, pairs, scratch, bf16=bf16, num_noise_samples=1)  # a step costs the same with more
        turns = {
            "trainer": cached,
            KNOWN: known,
            "straight loop": straight_loop(model, pairs, bf16),
            "bare": bare(model, bf16, base_known=False),
            "bare, base known": bare(model, bf16, base_known=True),
        }
        seconds = timing.compare(turns, ROUNDS)
    precision = "bf16" if bf16 else "fp32"
    network = {"trainer": "bare", KNOWN: "bare, base known"}  # without the trainer
    rows = [
        (name, value, value / seconds["bare"], value / seconds[network[name]] - 1 if name in network else None)
        for name, value in seconds.items()
    ]
    columns = ["seconds a step", "of bare", "over the same network, bare"]
    report.table(precision, f"{precision}, {BATCH} pairs a step", columns, rows, [".4f", ".2f", "+.1%"])
    print(f"\nloading the pipeline and encoding {len(pairs)} pairs once: {filling:.1f} s", flush=True)


# --- Memory ---


def save_sd15(folder: Path) -> None:
    """Save a random pipeline of the shape of Stable Diffusion 1.5."""
    save_random(
        folder,
        text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        vae={"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512},
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),  # its other defaults are those of 1.x
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
    )


def save_random(
    folder: Path,
    text: dict[str, Any],
    vae: dict[str, Any],
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
) -> None:
    """Save a random pipeline with the emoji tokenizer, and print its size.

    Args:
        folder: Where it goes.
        text: Options of its `CLIPTextConfig`.
        vae: Options of its `AutoencoderKL` of stride 8.
        unet: Its denoiser.
        scheduler: Its scheduler.
    """
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_FOLDER, model_max_length=77)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**blocks, **vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, **special)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for name in ("unet", "vae", "text_encoder"):
        count = sum(weight.numel() for weight in getattr(pipeline, name).parameters())
        print(f"{name}: {count / 1e6:.0f} M parameters", flush=True)


def measure(model: Path, cached: bool, batch: int, size: int, checkpointing: bool) -> None:
    """Print the memory that this process held, in GB."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        turn = train(
            model,
            preference_pairs("fluent", 2 * batch),
            Path(scratch),
            per_device_train_batch_size=batch,
            max_steps=2,
            resolution=size,
            cache_latents=cached,
            gradient_checkpointing=checkpointing,
        )
        found = {"before": peak_memory(), "tensors": tensor_memory()}
        training = Watch()
        turn()
        print(json.dumps(found | {"training": training.stop(), "peak": peak_memory()}))


def peak_memory() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def tensor_memory() -> float:
    """Sum the tensors that live (GB); a process may hold more, as an allocator keeps freed memory to use it again."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / 1e9


class Watch(threading.Thread):
    """Watch the largest memory of this process from now on: `peak_memory` never falls, so it tells of the loading.

    Args:
        mapped: Count pages of memory-mapped files, too, which the system takes back when it needs them.
    """

    def __init__(self, mapped: bool = True) -> None:
        super().__init__(daemon=True)
        self.mapped = mapped
        self.peak = 0.0
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        process = psutil.Process()
        while True:
            held = process.memory_info()
            files = 0 if self.mapped else getattr(held, "shared", 0)  # Linux only
            self.peak = max(self.peak, (held.rss - files) / 1e9)
            if self._stopped.wait(0.02):
                return

    def stop(self) -> float:
        self._stopped.set()
        self.join()
        return self.peak


def compare_memory(report: Report, model: Path) -> None:
    """Print a table of memory; each case has a process of its own, as a peak never falls."""

    def child(*arguments: object) -> str:
        command = [sys.executable, __file__, "--child", *map(str, arguments)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        print(child("save_sd15", folder))
        names = {
            "before": "peak of loading and encoding",
            "tensors": "tensors that are left",
            "training": "peak of the steps",
            "peak": "peak in all",
        }
        rows: list[list[str | float]] = []
        title = "Two steps in float32: GB of memory"
        cases = (
            (f"emoji, 64 px, {BATCH} pairs a step", model, BATCH, 64),
            ("Stable Diffusion 1.5's shape, 256 px, 1 pair a step", Path(folder), 1, 256),
        )
        settings = (("no", False, False), ("yes", True, False), ("yes, gradient_checkpointing", True, True))
        for name, path, batch, size in cases:
            for setting, cached, checkpointing in settings:
                printed = child("measure", path, int(cached), batch, size, int(checkpointing))
                found = json.loads(printed.splitlines()[-1])
                rows.append([name, setting, *(found[key] for key in names)])
                report.table("peaks", title, ["cache", *names.values()], rows, ".2f")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--memory", action="store_true", help="compare memory instead of time")
    parser.add_argument("--model", type=Path, default=DIFFUSION_FOLDER, help="pipeline folder, for steps of 64 px")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    timing.quiet()
    if options.child and options.child[0] == "save_sd15":
        save_sd15(Path(options.child[1]))
    elif options.child:
        _, model, cached, batch, size, checkpointing = options.child
        measure(Path(model), cached == "1", int(batch), int(size), checkpointing == "1")
    else:
        name = "lora_step_memory" if options.memory else "lora_step_time"
        with Report.of_script(__file__, parser, options, name=name) as report:
            if options.memory:
                compare_memory(report, options.model)
            else:
                for bf16 in (False, True) if timing.BF16 else (False,):
                    compare(report, options.model, bf16)


if __name__ == "__main__":
    main()
