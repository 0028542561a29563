"""Options of `BradleyTerryTrainer`."""

from dataclasses import dataclass, field

from bt_hf.training.config import PreferenceConfig
from bt_hf.training.option_checks import check_bounds


@dataclass
class BradleyTerryConfig(PreferenceConfig):
    """Options of `BradleyTerryTrainer`: those of `transformers.TrainingArguments`, with defaults for few pairs.

    The objective is the mean over pairs of

        bradley_terry_loss(margin, preference) + kl_weight * KL(base || adapted)

    and training begins at the taste that `bt_hf.reward.posterior.fit_taste` finds (see `warm_start`).

    Example:
        >>> from bt_hf import BradleyTerryConfig
        >>> BradleyTerryConfig(output_dir="my-taste", report_to="none").num_train_epochs
        10
    """

    num_train_epochs: float = field(default=10, metadata={"help": "How often each pair is seen."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Pairs in a batch on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pairs in a batch of evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    logging_steps: float = field(default=5, metadata={"help": "Log every so many steps."})
    warm_start: bool = field(
        default=True,
        metadata={
            "help": "Begin with the taste that a small Bayesian fit finds in the embeddings of the base, written into "
            "the LoRAs of the two projections: well under a second for hundreds of pairs. Skipped where the text "
            "projection has no plain LoRA, where training goes on from an adapter, or where a constant shift can't be "
            "expressed."
        },
    )
    prior_weight: float = field(
        default=0.5,
        metadata={
            "help": "Nats of likelihood that a looser prior has to gain, for each factor of e, to be believed as much "
            "as a tight one; larger keeps closer to the mean difference of the clicked images."
        },
    )
    kl_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of KL(base || adapted) over the images that a prompt retrieves: larger keeps more of the "
            "base's text-image alignment, 0 turns it off."
        },
    )
    kl_bank_size: int = field(
        default=256, metadata={"help": "How many training pairs' images the KL is taken over, at most."}
    )
    full_finetuning: bool = field(
        default=False, metadata={"help": "Train all weights instead of a LoRA; a frozen copy serves as the base."}
    )
    cache_features: bool = field(
        default=True,
        metadata={
            "help": "Compute what lies below the first trained layer once per prompt and image instead of every "
            "epoch. Off for streams and with a data collator of your own (it may augment)."
        },
    )
    cache_max_gb: float = field(
        default=4.0, metadata={"help": "No cache if it would take more than this much memory, in GB."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Keep the cache in memory-mapped files of this folder instead of memory, whatever `cache_max_gb` "
            "says: later runs find them, and processes share the work."
        },
    )

    def __post_init__(self) -> None:
        amount = (0, 1e300, "a finite number of at least 0")
        super().__post_init__()
        self.warn_of_two_lengths()
        check_bounds(
            self,
            {
                "prior_weight": amount,
                "kl_weight": amount,
                "cache_max_gb": amount,
                "kl_bank_size": (1, 10**9, "a whole number of at least 1"),
            },
        )
        begins = self.warm_start and not self.full_finetuning
        in_memory = self.cache_features and self.cache_dir is None
        self.refuse_without_effect(
            {
                "prior_weight": (begins, "`warm_start=True`, a LoRA alone"),
                "kl_bank_size": (self.kl_weight > 0, "`kl_weight` above 0"),
                "cache_dir": (self.cache_features, "`cache_features=True`"),
                "cache_max_gb": (in_memory, "a cache in memory: `cache_features=True` and no `cache_dir`"),
            }
        )
