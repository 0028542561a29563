"""Options of `RewardLoRATrainer`."""

from dataclasses import dataclass, field

from bt_hf.diffusion.pipeline_config import PipelineConfig, check_positive
from bt_hf.training.option_checks import check_bounds

_POSITIVE = (
    "num_inference_steps",
    "gradient_steps",
    "jump_steps",
    "renoisings",
    "reward_samples",
    "reward_clip",
    "max_anchor",
)


@dataclass
class RewardLoRAConfig(PipelineConfig):
    """Options of `RewardLoRATrainer`: those of `transformers.TrainingArguments`, with defaults for short trainings.

    Images are drawn with the pipeline's own scheduler and guidance. The last `gradient_steps` denoising steps and the
    VAE are differentiated, as in DRaFT-K (https://arxiv.org/abs/2309.17400) and AlignProp
    (https://arxiv.org/abs/2310.03739), and the loss is the mean over images of

        -min((reward - reward_base) / spread, reward_clip) + anchor_weight * anchor

    where reward_base is the mean reward of the base's drawings, spread the standard deviation of their rewards within
    a prompt, and anchor half the mean squared difference of the noise that adapted and base denoiser see in these
    steps: the KL divergence between the images that the two predict, noised as the step's input is, in nats for each
    value of the latents. It means the same for every model, and so does a learning rate for every reward.

    Example:
        >>> from bt_hf import RewardLoRAConfig
        >>> RewardLoRAConfig(output_dir="my-guided-lora", report_to="none").gradient_steps
        5
    """

    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of AdamW; the default is that of AlignProp in TRL."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Images drawn in a step on each device."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps over which the learning rate rises."})
    weight_decay: float = field(default=1e-2, metadata={"help": "Weight decay of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps of a drawing in training."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance of a drawing in training; by default the pipeline's."}
    )
    gradient_steps: int | None = field(
        default=None,
        metadata={
            "help": "Last denoising steps that the gradient flows through (K of DRaFT-K); by default half of them. "
            "Fewer take less memory, down to 1, and teach less in a step."
        },
    )
    jump_steps: int | None = field(
        default=None,
        metadata={
            "help": "Instead, stop before a random one of so many last steps, differentiate it alone, and jump to the "
            "image that it predicts (ReFL, arXiv 2304.05977)."
        },
    )
    renoisings: int = field(
        default=1,
        metadata={
            "help": "Noise samples of the last step for each drawing, more than 1 for a steadier gradient (n of "
            "DRaFT-LV, with one gradient step)."
        },
    )
    anchor_weight: float = field(
        default=10.0, metadata={"help": "Weight of the distance from the base; 0 lets nothing but the reward count."}
    )
    max_anchor: float | None = field(
        default=0.3, metadata={"help": "Stop once the mean distance from the base is larger, with `guards`."}
    )
    # Chosen on training prompts of the emoji domain: up to three spreads captions mostly stay, at five all is alike.
    reward_clip: float | None = field(
        default=3.0,
        metadata={"help": "Spreads above the base's mean reward from which on more reward counts for nothing."},
    )
    reward_samples: int = field(
        default=32, metadata={"help": "Drawings of the base that set the mean and the spread of rewards."}
    )
    guards: bool = field(
        default=True,
        metadata={
            "help": "Watch for reward hacking: stop where the distance from the base runs off, say when images become "
            "all alike."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, _POSITIVE)
        amount = (0, 1e300, "a finite number of at least 0")
        check_bounds(self, {"anchor_weight": amount, "guidance_scale": amount})
        if self.reward_samples < 2:
            raise ValueError("`reward_samples` should be at least 2: the spread is that of two drawings of a prompt.")
        self.refuse_without_effect(
            {
                "gradient_steps": (not self.jump_steps, "`jump_steps=None`"),
                "label_smoothing": (False, "pairs: it is for `PreferenceLoRATrainer`"),
                "max_anchor": (self.guards, "`guards=True`"),
                "renoisings": (self.gradient_steps == 1, "`gradient_steps=1`"),
            }
        )
        if self.gradient_steps is None:
            self.gradient_steps = 1 if self.jump_steps else max(1, self.num_inference_steps // 2)
        for name, steps in {"gradient_steps": self.gradient_steps, "jump_steps": self.jump_steps}.items():
            if steps is not None and steps >= self.num_inference_steps:
                raise ValueError(
                    f"`{name}={steps}` should be below `num_inference_steps={self.num_inference_steps}`: the first "
                    "step of a drawing has no gradient."
                )
