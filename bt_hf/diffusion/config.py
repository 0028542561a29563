"""Options of `PreferenceLoRATrainer`."""

from dataclasses import dataclass, field
from typing import Literal

from bt_hf.diffusion.pipeline_config import PipelineConfig, check_positive, positive
from bt_hf.training.config import PreferenceConfig
from bt_hf.training.option_checks import check_bounds

_POSITIVE = (
    "num_frames",
    "num_noise_samples",
    "num_eval_noise_samples",
    "snr_gamma",
    "desirable_weight",
    "undesirable_weight",
)
# Chosen on training prompts of the emoji domain: a larger one keeps more of the captions, and learns less of a style.
RPO_ALPHA = 0.5


@dataclass
class PreferenceLoRAConfig(PipelineConfig):
    """Options of `PreferenceLoRATrainer`: those of `transformers.TrainingArguments`, with defaults for few pairs.

    With dpo, the default, the loss is the mean over pairs of

        bradley_terry_loss(-beta / 2 [(err(chosen) - err_ref(chosen)) - (err(rejected) - err_ref(rejected))])

    where err is the mean squared error of the denoiser with the LoRA on and err_ref with it off, at the same noise and
    the same timestep for both images (Diffusion-DPO, https://arxiv.org/abs/2311.12908, eq. 14).

    Noise and timestep of a pair depend on the seed, the pair and how often it was seen, and on nothing else: neither
    resuming nor another number of processes changes them.

    Example:
        >>> from bt_hf import PreferenceLoRAConfig
        >>> PreferenceLoRAConfig(output_dir="my-taste-lora", report_to="none").loss_type
        'dpo'
    """

    # None only stands for an option that is not given: `__post_init__` replaces it.
    learning_rate: float = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Peak learning rate of AdamW. By default it begins at 1e-4 and finds itself, see `adapt_rate`."
        },
    )
    adapt_rate: bool | None = field(
        default=None,
        metadata={
            "help": "Steer the learning rate by the margins of the training pairs, up to ten times up or down: it "
            "rises while they lag behind a plan that reaches 10 at the last step, and falls where they lead. By "
            "default with dpo and AdamW, if no `learning_rate` is given."
        },
    )
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Pairs in a batch on each device; the denoiser sees twice as many images."}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Pairs in a batch of evaluation."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps over which the learning rate rises."})
    weight_decay: float = field(default=1e-2, metadata={"help": "Weight decay of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    loss_type: Literal["dpo", "ipo", "hinge", "bt", "mapo", "sft", "kto"] = field(
        default="dpo",
        metadata={
            "help": "dpo, ipo and hinge compare errors against the base's, bt, mapo and sft do without it, kto takes "
            "unpaired rows (prompt, completion, label), as TRL's unpair_preference_dataset makes them."
        },
    )
    # None only stands here so that the command line reads a word as well as a number.
    beta: float | str | None = field(
        default="auto",
        metadata={
            "help": "How much a difference of errors counts. auto: by the spread of the base's error differences, so "
            "that it means the same for every model. published: the published one for the kind of model, 2000 for "
            "Stable Diffusion, 5000 for SDXL, 100 for flow models (all others). Or a number, with the 1/2 of the "
            "formula: scripts without it, such as those of diffusers, mean twice as much by theirs."
        },
    )
    rpo_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the supervised term, which keeps captions: the logarithm of the factor by which the "
            "preferred image's error has risen, as TRL's option of this name adds its likelihood (RPO, arXiv "
            f"2405.16436). By default {RPO_ALPHA:g} with dpo, and 0, which is off, with the other losses."
        },
    )
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of liked images in the kto loss, to make up for unequal numbers."}
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of disliked images in the kto loss, to make up for unequal numbers."}
    )
    safeguard: bool = field(
        default=False,
        metadata={
            "help": "Scale the rejected image's gradient down where it would raise the chosen one's error "
            "(Diffusion-SDPO, arXiv 2511.03317)."
        },
    )
    safeguard_mu: float = field(
        default=0.0, metadata={"help": "mu of Diffusion-SDPO in [0, 1]: the larger, the safer for the chosen image."}
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Min-SNR-gamma weights of the timesteps (arXiv 2303.09556), such as 5."}
    )
    num_noise_samples: int | None = field(
        default=None,
        metadata={
            "help": "Fix that many samples of noise and timestep for each pair. With more epochs than samples they "
            "come again, so that the base's errors are computed once: a forward pass less at each step. By default "
            "every epoch has new ones."
        },
    )
    num_eval_noise_samples: int = field(
        default=8,
        metadata={"help": "Samples of noise and timestep for each held-out pair, the same at every evaluation."},
    )
    num_frames: int = field(
        default=1,
        metadata={
            "help": "Frames of each clip, for a pipeline that draws videos: the first of an animated GIF, WebP, AVIF "
            "or PNG. 1 trains on images."
        },
    )
    sample_latents: bool = field(
        default=False, metadata={"help": "Sample latents from the VAE's posterior instead of taking its mean."}
    )
    cache_latents: bool = field(
        default=True,
        metadata={
            "help": "Encode each distinct image and prompt once, into a memory-mapped file that later runs find; "
            "VAE and text encoders then leave memory. Off for streams."
        },
    )
    guards: bool = field(
        default=True,
        metadata={
            "help": "Watch for the usual failures of few pairs: the chosen images' error rises, held-out accuracy "
            "falls while training accuracy is near 1 (stops, and goes back to the best), images become all alike."
        },
    )

    def __post_init__(self) -> None:
        given = self.learning_rate is not None
        if not given:
            self.learning_rate = PreferenceConfig.learning_rate
        super().__post_init__()
        if self.adapt_rate is None:
            self.adapt_rate = not given and self._can_adapt_rate()
        if self.rpo_alpha is None:
            self.rpo_alpha = RPO_ALPHA if self.loss_type == "dpo" else 0.0
        if self.beta not in ("auto", "published"):
            self.beta = positive("beta", self.beta, ", 'auto' or 'published'")
        check_positive(self, _POSITIVE)
        amount = (0, 1e300, "a finite number of at least 0")
        check_bounds(self, {"safeguard_mu": (0, 1, "in [0, 1]"), "rpo_alpha": amount})
        self._check_effects()

    def _can_adapt_rate(self) -> bool:
        """True if margins mean what `MarginRate` takes them for, and the rate can be changed on the way."""
        schedule = self.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy")
        return self.loss_type == "dpo" and self.optim.value.startswith("adamw") and schedule and not self.deepspeed

    def _check_effects(self) -> None:
        """Raise a `ValueError` for an option that would have no effect beside the others."""
        kto = (self.loss_type == "kto", "`loss_type='kto'`")
        adaptable = "`loss_type='dpo'`, AdamW without DeepSpeed, and a schedule that is constant or falls"
        self.refuse_without_effect(
            {
                "adapt_rate": (not self.adapt_rate or self._can_adapt_rate(), adaptable),
                "beta": (self.loss_type != "sft", "another loss: `loss_type='sft'` has no beta"),
                "cache_dir": (self.cache_latents, "`cache_latents=True`"),
                "desirable_weight": kto,
                "undesirable_weight": kto,
                "label_smoothing": (self.loss_type != "kto", "a loss of pairs, and not `loss_type='kto'`"),
                "safeguard_mu": (self.safeguard, "`safeguard=True`"),
            }
        )
        if self.rpo_alpha and self.loss_type in ("sft", "mapo", "kto"):
            raise ValueError(
                f"`rpo_alpha` adds the preferred image's error to a loss of pairs, but `{self.loss_type}` "
                + ("has no pairs" if self.loss_type == "kto" else "holds it already")
                + ": leave it out, or choose another `loss_type`."
            )
        if self.safeguard and self.loss_type in ("sft", "kto"):
            raise ValueError(
                f"`safeguard` scales the gradient of a pair's rejected image, but `{self.loss_type}` has no such "
                "pair: leave it out, or choose another `loss_type`."
            )
