"""Measure what a step of reward-guided fine-tuning costs beyond the same forwards and backward in a bare loop.

    python examples/benchmarks/guided_step.py

Compared are, on the emoji pipeline with the emoji CLIP as the reward, 8 drawings of 10 denoising steps with guidance:

- trainer: `RewardLoRATrainer.train`, from the end of one step to the end of the next;
- bare: 5 steps of the scheduler without a gradient, the last 5 with the LoRA and with the base, the VAE, the CLIP, one
  backward, and the optimizer's step, with embeddings that lie in memory.

They take turns of a few steps, so that a noisy machine is noisy for all; medians are compared. The table is written to
`docs/results/guided_step.json`.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import timing
from bt_hf import PreferenceScorer, RewardLoRAConfig, RewardLoRATrainer
from emoji import CLIP_FOLDER, DIFFUSION_FOLDER
from lora_step import RANK, RATE, network
from results import Report, make_parser
from timing import DEVICE, Turn

BATCH, STEPS, LAST, GUIDANCE = 8, 10, 5, 3.0  # drawings, their denoising steps, those with a gradient
TURN, ROUNDS = 4, 4  # steps in a turn, of which the first is not counted; turns of each
PROMPTS = ["red apple", "house", "dog", "cat", "sailboat", "car", "tree", "star"]


def train(scorer: PreferenceScorer, scratch: Path) -> timing.Training:
    """Make a trainer; a turn is a few of its steps."""
    args = RewardLoRAConfig(
        str(scratch / "lora"),
        per_device_train_batch_size=BATCH,
        max_steps=TURN,
        num_inference_steps=STEPS,
        gradient_steps=LAST,
        guidance_scale=GUIDANCE,
        reward_samples=2,
        learning_rate=RATE,
        lora_r=RANK,
        cache_dir=str(scratch / "cache"),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu",
    )
    return timing.Training(RewardLoRATrainer(str(DIFFUSION_FOLDER), args, scorer, PROMPTS))


def bare(scorer: PreferenceScorer) -> Turn:
    """Return a turn of the same steps, written down."""
    pipeline, denoiser, optimizer = network(DIFFUSION_FOLDER)
    scheduler, config = pipeline.scheduler, denoiser.config
    processor = scorer.processor.image_processor
    mean, std = (
        torch.tensor(value, device=DEVICE).view(1, 3, 1, 1) for value in (processor.image_mean, processor.image_std)
    )
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(PROMPTS, DEVICE, 1, True)
        both = torch.cat([negative, embeds])
    shape = (BATCH, config.in_channels, config.sample_size, config.sample_size)

    def predict(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        twice = torch.cat([latents, latents]).contiguous(memory_format=torch.channels_last)
        without, prediction = denoiser(twice, time, both).sample.chunk(2)
        return without + GUIDANCE * (prediction - without)

    def step() -> None:
        scheduler.set_timesteps(STEPS)
        latents = torch.randn(shape, device=DEVICE)
        with torch.no_grad():
            for time in scheduler.timesteps[:-LAST]:
                latents = scheduler.step(predict(latents, time), time, latents).prev_sample
        distance = latents.new_zeros(())
        for time in scheduler.timesteps[-LAST:]:
            denoiser.base_model.disable_adapter_layers()
            with torch.no_grad():
                base = predict(latents, time)
            denoiser.base_model.enable_adapter_layers()
            predicted = predict(latents, time)
            distance = distance + (predicted - base).square().mean()
            latents = scheduler.step(predicted, time, latents).prev_sample
        images = (pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        rewards = scorer.reward((images - mean) / std, PROMPTS)  # drawn at the size that the CLIP sees
        (distance - rewards.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return timing.repeat(step, TURN)


def main() -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args()
    timing.quiet()
    scorer = PreferenceScorer.from_pretrained(CLIP_FOLDER, device=DEVICE)
    scorer.model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch, Report.of_script(__file__, parser, args) as report:
        seconds = timing.compare({"trainer": train(scorer, Path(scratch)), "bare": bare(scorer)}, ROUNDS)
        over = seconds["trainer"] / seconds["bare"] - 1
        rows = [("trainer", seconds["trainer"], over), ("bare", seconds["bare"], None)]
        title = f"fp32, {BATCH} drawings of {STEPS} denoising steps"
        report.table("fp32", title, ["seconds a step", "over bare"], rows, [".4f", "+.1%"])


if __name__ == "__main__":
    main()
