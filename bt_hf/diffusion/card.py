"""Model card of a preference LoRA, from the facts of its training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import Trainer

from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.families.base import Family, Size
from bt_hf.diffusion.interfaces import find_interface_name
from bt_hf.diffusion.pipeline_config import PipelineConfig
from bt_hf.diffusion.quantization import describe_quantization
from bt_hf.hub.card_sections import plain_line
from bt_hf.hub.cards import card_metadata, eval_result, write_card
from bt_hf.hub.facts import Evaluation, Option, RunFacts, schedule_options

_METRICS = ("accuracy", "accuracy_low", "accuracy_high")
# Tags by which people search for a method.
_METHODS = {
    "dpo": "diffusion-dpo",
    "ipo": "diffusion-ipo",
    "hinge": "diffusion-slic",
    "bt": "bradley-terry",
    "mapo": "mapo",
    "sft": "sft",
    "kto": "diffusion-kto",
    "reward": "draft",
}


@dataclass(frozen=True, kw_only=True)
class LoRAFacts(RunFacts):
    """Facts of a preference LoRA's training, for the template `preference_lora.md`.

    Attributes:
        family: Name of the pipeline's family, such as "flux".
        pipeline: Class of the pipeline.
        denoiser: Attribute of the pipeline that is trained.
        loss: Loss type.
        beta: Beta in words; `None` for a loss without one.
        prompts: Validation prompts, quoted for Markdown.
        task: Task of the pipeline, as the Hub calls it.
        frames: Frames of each clip; `None` for a pipeline of images.
        interface_file: Name of the file for ComfyUI, A1111 and Forge; `None` without one.
    """

    family: str
    pipeline: str
    denoiser: str
    loss: str
    beta: str | None
    prompts: Sequence[str]
    task: str = "text-to-image"
    frames: int | None = None
    interface_file: str | None = None


def lora_facts(
    trainer: Trainer,
    args: PreferenceLoRAConfig,
    *,
    base: str | None,
    family: Family,
    size: Size,
    beta: float | None,
    warnings: Sequence[str],
) -> LoRAFacts:
    """Read the facts of a `PreferenceLoRATrainer` as it stands.

    Args:
        trainer: The trainer.
        args: Its options.
        base: Hub id or path of the pipeline.
        family: Family of the pipeline.
        size: Height and width of the images.
        beta: Beta in use; `None` before training.
        warnings: Warnings during training.
    """
    rows = "liked or disliked images" if args.loss_type == "kto" else "pairs"
    beta_in_words = _beta(args, beta)
    frames = family.frames if family.task == "text-to-video" else None
    options: dict[str, Option] = {
        "loss": args.loss_type,
        "beta": beta_in_words,
        "RPO alpha": args.rpo_alpha or None,
        "safeguard": "on" if args.safeguard else None,
        "quantisation of the base": describe_quantization(family.module),
        "size of the images": f"{size[1]} x {size[0]}",
        "frames of a clip": frames,
        "label smoothing": args.label_smoothing,
        "noise samples of a pair": args.num_noise_samples,
        "weights of timesteps, Min-SNR gamma": args.snr_gamma,
        **schedule_options(trainer, rows),
    }
    rate = getattr(trainer, "rate", None)
    if rate is not None:
        options["peak learning rate"] = f"{args.learning_rate * rate.highest:.2g} (found by itself)"
    return LoRAFacts.from_trainer(
        trainer,
        base=base,
        options=options,
        metrics=_METRICS,
        libraries=("torch", "diffusers", "transformers", "peft", "datasets"),
        rows=rows,
        warnings=warnings,
        loss=args.loss_type,
        beta=beta_in_words,
        **pipeline_facts(trainer, family, args),
    )


def pipeline_facts(trainer: Trainer, family: Family, args: PipelineConfig) -> dict[str, Any]:
    """Return the fields of `LoRAFacts` that tell of the pipeline and its pictures."""
    model, run = trainer.accelerator.unwrap_model(trainer.model), Path(args.output_dir).resolve().name
    return {
        "family": family.name,
        "pipeline": type(family.pipeline).__name__,
        "denoiser": family.denoiser,
        "task": family.task,
        "frames": family.frames if family.task == "text-to-video" else None,
        "prompts": [_quoted(prompt) for prompt in args.validation_prompts or ()],
        "interface_file": find_interface_name(family, model, run),
    }


def _beta(args: PreferenceLoRAConfig, beta: float | None) -> str | None:
    """Write the beta in use, and if the data set it; `None` for a loss without one."""
    if beta is None or args.loss_type == "sft":
        return None
    # MaPO's beta weighs two losses; its default is a constant.
    from_data = args.beta == "auto" and args.loss_type != "mapo"
    return f"{beta:.4g}" + (" (set from the data)" if from_data else "")


def _quoted(prompt: str) -> str:
    """Quote a prompt for a line of Markdown."""
    return f'"{plain_line(prompt)}"'


def write_lora_card(folder: Path, facts: LoRAFacts) -> None:
    """Write `README.md` into `folder`; it shows `before_after.png` and `training_curve.png` if they are there."""
    write_card(folder, "preference_lora.md", facts, lora_metadata(facts))


def lora_metadata(facts: LoRAFacts) -> ModelCardData:
    """Build the metadata of the card, for the Hub's search and its widgets."""
    tags = ["bt_hf", "lora", "diffusers", facts.task, "preference", _METHODS[facts.loss]]
    return card_metadata(
        facts,
        library="diffusers",
        task=facts.task,
        tags=list(dict.fromkeys([*tags, facts.family])),
        results=[_result(evaluation, facts.task) for evaluation in facts.evaluations],
    )


def _result(evaluation: Evaluation, task: str) -> EvalResult:
    """Build the number of an evaluation for the metadata."""
    numbers = evaluation.numbers
    return eval_result(
        evaluation.title,
        "accuracy",
        "Implicit preference accuracy",
        numbers["accuracy"],
        evaluation.subset,
        task_type=task,
        low_95=numbers["accuracy_low"],
        high_95=numbers["accuracy_high"],
    )
