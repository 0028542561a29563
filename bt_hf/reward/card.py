"""Model card of a reward, from the facts of its training."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from transformers import Trainer

from bt_hf.hub.cards import card_metadata, eval_result, write_card
from bt_hf.hub.facts import AdapterFacts, Evaluation, Option, RunFacts, schedule_options
from bt_hf.reward import encoders
from bt_hf.reward.config import BradleyTerryConfig

_METRICS = ("accuracy", "accuracy_low", "accuracy_high", "log_loss")
_OF_BOTH = (*_METRICS, *(f"base_{name}" for name in _METRICS))


@dataclass(frozen=True, kw_only=True)
class RewardFacts(RunFacts):
    """Facts of a reward's training, for the template `reward_adapter.md`.

    Attributes:
        family: Model type of the dual encoder, such as "clip".
        padding: Argument `padding` of its processor, as it was trained.
        verdict: Result of cross-validation in one sentence.
        words: What it likes, in a sentence of words.
    """

    family: str
    padding: str
    verdict: str | None
    words: str | None = None


def reward_facts(
    trainer: Trainer, args: BradleyTerryConfig, verdict: str | None, words: str | None = None
) -> RewardFacts:
    """Read the facts of a `BradleyTerryTrainer` as it stands.

    Args:
        trainer: The trainer.
        args: Its options.
        verdict: Result of cross-validation in one sentence; `None` without one.
        words: What it likes, in a sentence of words; `None` if that is not known.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = AdapterFacts.of(model)
    options: dict[str, Option] = {**schedule_options(trainer), "label smoothing": args.label_smoothing}
    if adapter and adapter.is_lora:
        options |= {"warm start": args.warm_start, "weight of the prior": args.prior_weight}
    options["weight of the KL term"] = args.kl_weight
    processor = type(trainer.processing_class).__name__.lower()
    return RewardFacts.from_trainer(
        trainer,
        base=encoders.base_name(model),
        options=options,
        metrics=_OF_BOTH,
        libraries=("torch", "transformers", *(("peft",) if adapter else ()), "datasets"),
        family=model.config.model_type,
        padding='"max_length"' if "siglip" in processor else "True",  # see `encoders.tokenize`
        verdict=verdict,
        words=words,
    )


def write_reward_card(folder: Path, facts: RewardFacts) -> None:
    """Write `README.md` into `folder`; it shows `reliability.png` and `training_curve.png` if they are there."""
    write_card(folder, "reward_adapter.md", facts, reward_metadata(facts))


def reward_metadata(facts: RewardFacts) -> ModelCardData:
    """Build the metadata of the card, for the Hub's search and its widgets."""
    tags = ["bt_hf", facts.family, "preference", "reward-model", "bradley-terry"]
    return card_metadata(
        facts,
        library="peft" if facts.adapter else "transformers",
        task="zero-shot-image-classification",
        tags=[*tags, *(["lora"] if facts.adapter and facts.adapter.is_lora else [])],
        results=[result for evaluation in facts.evaluations for result in _results(evaluation)],
        relation="adapter" if facts.adapter else "finetune",
    )


def _results(evaluation: Evaluation) -> list[EvalResult]:
    """Build the numbers of an evaluation for the metadata."""
    title, subset, numbers = evaluation.title, evaluation.subset, evaluation.numbers
    low, high = numbers["accuracy_low"], numbers["accuracy_high"]
    return [
        eval_result(
            title,
            "accuracy",
            "Accuracy",
            numbers["accuracy"],
            subset,
            low_95=low,
            high_95=high,
            base=numbers["base_accuracy"],
        ),
        eval_result(title, "log_loss", "Log loss", numbers["log_loss"], subset, base=numbers["base_log_loss"]),
    ]
