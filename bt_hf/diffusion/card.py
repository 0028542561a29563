"""The card of a preference LoRA: what is known about a run, and nothing that is not."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from bt_hf.hub.cards import count_pairs, eval_result, render_card, run_facts, save_card, training_facts, versions

SHEET, CURVE = "before_after.png", "training_curve.png"
# What the methods are called where one looks for them.
_METHODS = {
    "dpo": "diffusion-dpo",
    "ipo": "diffusion-ipo",
    "hinge": "diffusion-slic",
    "bt": "bradley-terry",
    "mapo": "mapo",
    "sft": "sft",
    "kto": "diffusion-kto",
}
# What Markdown would take for its own in a prompt, and a quotation mark.
_MARKUP, _ESCAPED = re.compile(r'([\\`*_~<>\[\]&$|"])'), r"\\\1"
_OPTIONS = {
    "label smoothing": "label_smoothing",
    "draws of noise for a pair": "num_noise_samples",
    "weights of timesteps, Min-SNR gamma": "snr_gamma",
    "seed": "seed",
    "epochs": "num_train_epochs",
    "pairs in a batch": "train_batch_size",
    "gradient accumulation": "gradient_accumulation_steps",
    "peak learning rate": "learning_rate",
    "schedule": "lr_scheduler_type",
}


def write_lora_card(folder: Path, trainer: Any) -> None:
    """Write `README.md` into `folder`, from what `trainer` (a `PreferenceLoRATrainer`) knows so far.

    The card shows `before_after.png` and `training_curve.png` if they are in `folder`.
    """
    pictures = {"sheet": SHEET, "curve": CURVE}
    facts = lora_facts(trainer) | {fact: name for fact, name in pictures.items() if (folder / name).is_file()}
    save_card(render_card("preference_lora.md", facts, lora_metadata(facts)), folder)


def lora_facts(trainer: Any) -> dict[str, Any]:
    """The values of the template `preference_lora.md`. What is not known is left out, or empty."""
    args, family = getattr(trainer, "args", None), getattr(trainer, "family", None)
    evaluations = _evaluations(getattr(getattr(trainer, "state", None), "log_history", None) or [])
    held_out = count_pairs(getattr(trainer, "eval_dataset", None))
    if held_out and len(evaluations) == 1:
        evaluations[0]["title"] = f"{held_out} held-out pairs"
    loss = getattr(args, "loss_type", None)
    rows = "liked or disliked images" if loss == "kto" else "pairs"
    height, width = getattr(trainer, "size", None) or [getattr(args, "resolution", None)] * 2
    return {
        **run_facts(trainer, "preference-lora", getattr(trainer, "base_name", None)),
        "family": getattr(family, "name", None),
        "denoiser": getattr(family, "denoiser", "unet"),
        "pipeline": getattr(trainer, "pipeline_class_name", None) or _class_name(getattr(trainer, "pipeline", None)),
        "loss": loss,
        "beta": _beta(trainer),
        "rows": rows,
        "prompts": _prompts(trainer),
        "evaluations": evaluations,
        "warnings": list(getattr(trainer, "warnings_seen", None) or []),
        "training": training_facts(
            trainer,
            {f"{rows} in a batch" if fact == "pairs in a batch" else fact: name for fact, name in _OPTIONS.items()},
            rows,
            loss=loss,
            beta=_beta(trainer),
            safeguard="on" if getattr(args, "safeguard", False) else None,
            **{"size of the images": f"{width} x {height}" if height and width else None},
        ),
        "versions": versions(("torch", "diffusers", "transformers", "peft", "datasets")),
    }


def lora_metadata(facts: Mapping[str, Any]) -> ModelCardData:
    """The metadata of the card, for the Hub's search and its widgets."""
    known: dict[str, Any] = {}
    method = _METHODS.get(facts["loss"])
    tags = ["bt_hf", "lora", "diffusers", "text-to-image", "preference", *([method] if method else [])]
    if facts["family"] and facts["family"] not in tags:
        tags.append(facts["family"])
    if facts["base_model"]:
        known["base_model"] = facts["base_model"]
        known["base_model_relation"] = "adapter"
    if facts["evaluations"]:
        known["model_name"] = facts["name"]
        known["eval_results"] = [_result(evaluation) for evaluation in facts["evaluations"]]
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **known)


def _evaluations(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last evaluation on each data set: its title, its numbers, and what became of the winners' errors."""
    last: dict[str, Mapping[str, Any]] = {}
    for entry in log_history:
        for key in entry:
            prefix = key.removesuffix("accuracy_low")
            if prefix != key and prefix.startswith("eval_"):
                last[prefix] = entry
    found = []
    for prefix, entry in last.items():
        numbers = {key: entry.get(f"{prefix}accuracy{key}", math.nan) for key in ("", "_low", "_high")}
        # Without a number, such as for ties alone, there is nothing to claim.
        if not all(math.isfinite(number) for number in numbers.values()):
            continue
        name = prefix[len("eval_") : -1]
        found.append(
            {
                "title": f"the held-out pairs {name}" if name else "held-out pairs",
                "subset": name or None,
                "accuracy": f"{numbers['']:.3f}",
                "interval": f"{numbers['_low']:.3f} to {numbers['_high']:.3f}",
                "undecided": numbers["_low"] <= 0.5 <= numbers["_high"],
                "numbers": {"accuracy": numbers[""], "low": numbers["_low"], "high": numbers["_high"]},
                "winner": _change_in_words(
                    entry.get(f"{prefix}winner_error_change"), entry.get(f"{prefix}winner_error_base")
                ),
            }
        )
    return found


def _change_in_words(change: float | None, base: float | None) -> str | None:
    """What became of an error: "fell by 0.0012 (1.4 % of the base's)"."""
    if change is None or not math.isfinite(change):
        return None
    if change == 0:
        return "did not change"
    share = f" ({100 * abs(change) / base:.2g} % of the base's)" if base and math.isfinite(base) else ""
    return f"{'rose' if change > 0 else 'fell'} by {abs(change):.2g}{share}"


def _result(evaluation: Mapping[str, Any]) -> EvalResult:
    numbers = evaluation["numbers"]
    return eval_result(
        evaluation["title"],
        "accuracy",
        "Implicit preference accuracy",
        numbers["accuracy"],
        evaluation["subset"],
        task_type="text-to-image",
        low_95=numbers["low"],
        high_95=numbers["high"],
    )


def _beta(trainer: Any) -> str | None:
    """The beta in use, and whether the data set it; `None` where the loss has none."""
    args, beta = getattr(trainer, "args", None), getattr(trainer, "beta", None)
    loss = getattr(args, "loss_type", None)
    if beta is None or loss == "sft":
        return None
    # The beta of MaPO weighs two losses: its default is a constant.
    from_data = getattr(args, "beta", None) == "auto" and loss != "mapo"
    return f"{beta:.4g}" + (" (set from the data)" if from_data else "")


def _prompts(trainer: Any) -> list[str]:
    """The validation prompts, quoted, for a line of Markdown."""
    for owner in (trainer, getattr(trainer, "args", None)):
        prompts = getattr(owner, "validation_prompts", None)
        if prompts:
            return [f'"{_MARKUP.sub(_ESCAPED, " ".join(prompt.split()))}"' for prompt in prompts]
    return []


def _class_name(value: Any) -> str | None:
    return type(value).__name__ if value is not None else None
