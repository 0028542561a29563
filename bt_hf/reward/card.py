"""The card of a reward: what is known about a run, and nothing that is not."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from peft import PeftModel

from bt_hf.hub.cards import (
    adapter_config,
    count_pairs,
    eval_result,
    render_card,
    run_facts,
    save_card,
    trained_model,
    training_facts,
    versions,
)
from bt_hf.reward import encoders

DIAGRAM, CURVE = "reliability.png", "training_curve.png"
_TAGS = ("preference", "reward-model", "bradley-terry")
_OPTIONS = {
    "seed": "seed",
    "epochs": "num_train_epochs",
    "pairs in a batch": "train_batch_size",
    "gradient accumulation": "gradient_accumulation_steps",
    "peak learning rate": "learning_rate",
    "schedule": "lr_scheduler_type",
    "label smoothing": "label_smoothing",
    "warm start": "warm_start",
    "weight of the prior": "prior_weight",
    "weight of the alignment": "kl_weight",
}
# What only a LoRA has.
_OF_LORA = ("warm start", "weight of the prior")


def write_reward_card(folder: Path, trainer: Any) -> None:
    """Write `README.md` into `folder`, from what `trainer` (a `BradleyTerryTrainer`) knows so far.

    The card shows `reliability.png` and `training_curve.png` if they are in `folder`.
    """
    pictures = {"reliability": DIAGRAM, "curve": CURVE}
    facts = reward_facts(trainer) | {fact: name for fact, name in pictures.items() if (folder / name).is_file()}
    save_card(render_card("reward_adapter.md", facts, reward_metadata(facts)), folder)


def reward_facts(trainer: Any) -> dict[str, Any]:
    """The values of the template `reward_adapter.md`. What is not known is left out, or empty."""
    model = trained_model(trainer)
    adapter = isinstance(model, PeftModel)
    lora = adapter and "LORA" in str(getattr(adapter_config(model), "peft_type", ""))
    options = {fact: name for fact, name in _OPTIONS.items() if lora or fact not in _OF_LORA}
    evaluations = _evaluations(getattr(getattr(trainer, "state", None), "log_history", None) or [])
    held_out = count_pairs(getattr(trainer, "eval_dataset", None))
    if held_out and len(evaluations) == 1:
        evaluations[0]["title"] = f"{held_out} held-out pairs"
    processor = type(getattr(trainer, "processing_class", None)).__name__.lower()
    return {
        **run_facts(trainer, "reward", encoders.base_name(model) if model is not None else None),
        "adapter": adapter,
        "lora": lora,
        "family": getattr(getattr(model, "config", None), "model_type", None),
        # As the model was trained: see `encoders.tokenize`.
        "padding": '"max_length"' if "siglip" in processor else "True",
        "verdict": getattr(trainer, "verdict", None),
        "evaluations": evaluations,
        "training": training_facts(trainer, options),
        "versions": versions(("torch", "transformers", *(("peft",) if adapter else ()), "datasets")),
    }


def reward_metadata(facts: Mapping[str, Any]) -> ModelCardData:
    """The metadata of the card, for the Hub's search and its widgets."""
    known: dict[str, Any] = {}
    tags = ["bt_hf", *([facts["family"]] if facts["family"] else []), *_TAGS, *(["lora"] if facts["lora"] else [])]
    if facts["base_model"]:
        known["base_model"] = facts["base_model"]
        known["base_model_relation"] = "adapter" if facts["adapter"] else "finetune"
    if facts["evaluations"]:
        known["model_name"] = facts["name"]
        known["eval_results"] = [result for evaluation in facts["evaluations"] for result in _results(evaluation)]
    return ModelCardData(
        library_name="peft" if facts["adapter"] else "transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=tags,
        **known,
    )


def _evaluations(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last evaluation on each data set: its title, its numbers, and the rows of its table."""
    last: dict[str, Mapping[str, Any]] = {}
    for entry in log_history:
        for key in entry:
            prefix = key.removesuffix("accuracy")
            # `eval_base_accuracy` has no base beside it, so this finds those of the trained model only.
            if prefix != key and prefix.startswith("eval_") and f"{prefix}base_accuracy" in entry:
                last[prefix] = entry
    found = []
    for prefix, entry in last.items():
        title = f"the held-out pairs {name}" if (name := prefix[len("eval_") : -1]) else "held-out pairs"
        rows: list[dict[str, Any]] = []
        for who, start in (("this model", prefix), ("its base", f"{prefix}base_")):
            accuracy, low, high, log_loss = (
                entry.get(start + key, math.nan) for key in ("accuracy", "accuracy_low", "accuracy_high", "log_loss")
            )
            rows.append(
                {
                    "name": who,
                    "accuracy": f"{accuracy:.3f}",
                    "interval": f"{low:.3f} to {high:.3f}",
                    "log_loss": f"{log_loss:.3f}",
                    "numbers": {"accuracy": accuracy, "low": low, "high": high, "log_loss": log_loss},
                }
            )
        # Without a number, such as for ties alone, there is nothing to claim.
        if all(math.isfinite(number) for row in rows for number in row["numbers"].values()):
            found.append({"title": title, "subset": name or None, "rows": rows})
    return found


def _results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    numbers, base = (row["numbers"] for row in evaluation["rows"])
    title, subset = evaluation["title"], evaluation["subset"]
    return [
        eval_result(
            title,
            "accuracy",
            "Accuracy",
            numbers["accuracy"],
            subset,
            low_95=numbers["low"],
            high_95=numbers["high"],
            base=base["accuracy"],
        ),
        eval_result(title, "log_loss", "Log loss", numbers["log_loss"], subset, base=base["log_loss"]),
    ]
