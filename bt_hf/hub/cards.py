"""Model cards: the facts of a run, rendered with a template from `hub_cards/`."""

import platform
import sys
from collections.abc import Iterable, Mapping, Sized
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from bt_hf.hub.card_sections import keep_owner_text
from bt_hf.hub.contract import hub_id


def render_card(template: str, facts: Mapping[str, Any], data: ModelCardData) -> ModelCard:
    """Render a card, and read it back: its metadata is then known to be well-formed.

    Args:
        template: File name of a template in `hub_cards/`.
        facts: Values of the template. It leaves out what is missing, so that nothing has to be made up.
        data: Metadata; the template shows it as `metadata`, and its tags as `tags`.

    Example:
        >>> card = render_card("reward_adapter.md", {"name": "my-taste"}, ModelCardData(library_name="peft"))
        >>> card.data.library_name
        'peft'
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    # An optional section starts with an empty line, so that it is the same with and without the ones before it.
    rendered = environment.get_template(template).render(facts, metadata=data.to_yaml(), tags=data.tags or [])
    return ModelCard(rendered.strip() + "\n")


def save_card(card: ModelCard, folder: Path) -> None:
    """Write `README.md` into `folder`; of one that is there, only the generated parts and fields are renewed."""
    path = folder / "README.md"
    text = str(card)
    if path.is_file():
        text = keep_owner_text(text, path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


def template_folder() -> Path:
    """`hub_cards/`: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "hub_cards"
    return installed if installed.is_dir() else package.parent / "hub_cards"


def trained_model(trainer: Any) -> Any:
    """The model of a trainer without what accelerate wraps around it; `None` if there is none."""
    model, accelerator = getattr(trainer, "model", None), getattr(trainer, "accelerator", None)
    return model if model is None or accelerator is None else accelerator.unwrap_model(model)


def run_facts(trainer: Any, name: str, base: str | None) -> dict[str, Any]:
    """What each card begins with: the name of the run, its address, its base and its number of pairs.

    Args:
        trainer: A trainer, or whatever has some of its attributes.
        name: What to call a run that has no `output_dir`.
        base: Hub id or path of the base.
    """
    args = getattr(trainer, "args", None)
    name = Path(getattr(args, "output_dir", None) or name).resolve().name
    return {
        "name": name,
        "address": getattr(args, "hub_model_id", None) or name,
        "base_model": hub_id(base) if base else None,
        "base_name": (hub_id(base) or Path(base).name) if base else None,
        "base_path": f"path/to/{Path(base or '').name or 'base'}",
        "pairs": count_pairs(getattr(trainer, "train_dataset", None)),
    }


def training_facts(trainer: Any, options: Mapping[str, str], rows: str = "pairs", **facts: Any) -> dict[str, Any]:
    """Pairs, steps, what decides how a run goes, and its adapter, in the order of the card; only what is known.

    Args:
        trainer: A trainer, or whatever has some of its attributes.
        options: What the card calls an option of `trainer.args` -> its name there.
        rows: What one trained on, if not on pairs.
        facts: What stands between the steps and the options.
    """
    args, model = getattr(trainer, "args", None), trained_model(trainer)
    state = getattr(trainer, "state", None)
    facts = {
        rows: count_pairs(getattr(trainer, "train_dataset", None)),
        "steps": getattr(state, "global_step", None),
        **_effort(getattr(state, "log_history", None) or [], getattr(args, "device", None)),
        **facts,
    }
    for fact, name in options.items():
        value = getattr(args, name, None)
        facts[fact] = getattr(value, "value", value)
    batch = f"{rows} in a batch"
    if facts[rows] and facts.get(batch):
        facts[batch] = min(facts[rows], facts[batch])  # there are no more
    if (getattr(args, "max_steps", None) or -1) > 0:
        facts["epochs"] = None
    config = adapter_config(model)
    if config is not None:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        facts["adapter"] = "LoRA" if kind == "LORA" else kind
        facts["rank"], facts["alpha"] = getattr(config, "r", None), getattr(config, "lora_alpha", None)
        facts["layers"] = _layers(getattr(model.base_model, "targeted_module_names", []))
    return {fact: _in_words(value) for fact, value in facts.items() if value is not None}


def _in_words(value: Any) -> Any:
    """An option as people write it: `on` rather than `True`, `3` rather than `3.0`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else value


def _effort(log_history: Iterable[Mapping[str, Any]], device: torch.device | None) -> dict[str, str]:
    """How long the steps took, and on what; empty before their end."""
    seconds = [entry["train_runtime"] for entry in log_history if "train_runtime" in entry]
    if not seconds:
        return {}
    size, unit = (1, "s") if seconds[-1] < 90 else (60, "min") if seconds[-1] < 5400 else (3600, "h")
    time = f"{seconds[-1] / size:.3g} {unit}"
    kind = device.type if device is not None else "cpu"
    # Not whatever is in the machine: a run may have been told to leave the GPU alone.
    hardware = torch.cuda.get_device_name(device) if kind == "cuda" else f"{kind.upper()} ({platform.machine()})"
    return {"time of the steps": time, "hardware": hardware}


def adapter_config(model: Any) -> Any:
    """The configuration of a model's adapter; `None` if it has none."""
    return model.peft_config.get(model.active_adapter) if isinstance(model, PeftModel) else None


def _layers(names: Iterable[str]) -> str | None:
    """Layers of an adapter in one line: their names, or of many layers what they are called in each block."""
    found = sorted(names)
    if len(found) <= 6:
        return ", ".join(f"`{name}`" for name in found) or None
    kinds = {next(part for part in reversed(name.split(".")) if not part.isdecimal()) for name in found}
    return ", ".join(f"`{kind}`" for kind in sorted(kinds)) + f" ({len(found)} in all)"


def count_pairs(pairs: Any) -> int | None:
    """How many pairs there are; `None` for a stream or for several sets."""
    return len(pairs) if isinstance(pairs, Sized) and not isinstance(pairs, dict) else None


def eval_result(
    name: str,
    metric: str,
    title: str,
    value: float,
    subset: str | None = None,
    task_type: str = "zero-shot-image-classification",
    task_name: str = "Preference prediction",
    **arguments: float,
) -> EvalResult:
    """One number of the metadata's `model-index`.

    Args:
        name: Data set that it was measured on.
        metric: Type of the metric, such as `"accuracy"`.
        title: What to call the metric.
        value: The number.
        subset: Tells several data sets of one card apart, for which their names do not count.
        task_type: What the model does, as the Hub names tasks.
        task_name: What it was measured at.
        arguments: What else belongs to it, such as its interval.
    """
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type="preference-pairs",
        dataset_name=name,
        dataset_config=subset,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 4),
        metric_args={key: round(number, 4) for key, number in arguments.items()} or None,
    )


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of this library and of those of `libraries` that are installed."""
    found = {"bt-hf": sys.modules["bt_hf"].__version__}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
