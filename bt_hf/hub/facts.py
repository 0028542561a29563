"""Facts of a training run that its model card shows, read from a trainer."""

import dataclasses
import hashlib
import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from bt_hf.hub.card_sections import plain_line, read_card
from bt_hf.hub.contract import CARD, hub_id

Option = str | float | None
_INDEXES = ("model_index.json", "config.json")
_COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", "preference", "weight")
F = TypeVar("F", bound="RunFacts")


@dataclass(frozen=True)
class Evaluation:
    """Last evaluation on one dataset.

    Attributes:
        title: Dataset as the card calls it, such as "6 held-out pairs".
        subset: Name of the dataset in the log; `None` if it has none.
        numbers: Finite metrics by their name in the log, without prefix.
    """

    title: str
    subset: str | None
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class AdapterFacts:
    """Adapter of a model.

    Attributes:
        kind: PEFT's name of its method, such as "LORA".
        rank: Rank, of an adapter that has one.
        alpha: Scale alpha, of an adapter that has one.
        layers: Names of the layers that it changes.
    """

    kind: str
    rank: int | None
    alpha: float | None
    layers: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "AdapterFacts | None":
        """Read the active adapter of a model; `None` if it has none."""
        if not isinstance(model, PeftModel):
            return None
        config = model.peft_config[model.active_adapter]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        # Methods of PEFT differ in what they have.
        rank, alpha = getattr(config, "r", None), getattr(config, "lora_alpha", None)
        return cls(kind, rank, alpha, tuple(sorted(getattr(model.base_model, "targeted_module_names", ()))))

    @property
    def is_lora(self) -> bool:
        """True for a LoRA and its variants."""
        return "LORA" in self.kind

    def options(self) -> dict[str, Option]:
        """Describe the adapter in the words of a card."""
        kind = "LoRA" if self.kind == "LORA" else self.kind
        return {"adapter": kind, "rank": self.rank, "alpha": self.alpha, "layers": self._layers()}

    def _layers(self) -> str | None:
        """Join the layers' names; many layers are named by their kind."""
        if len(self.layers) <= 6:
            return ", ".join(f"`{name}`" for name in self.layers) or None
        kinds = {next(part for part in reversed(name.split(".")) if not part.isdecimal()) for name in self.layers}
        return ", ".join(f"`{kind}`" for kind in sorted(kinds)) + f" ({len(self.layers)} in all)"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run that every card shows. The templates read them as `run`; missing ones are left out of the card.

    Attributes:
        name: Name of the run, that of its folder.
        address: Hub id, or the name of the folder.
        base: Hub id or path of the base.
        base_revision: Commit of the base on the Hub, if it came from there.
        base_licence: Licence of the base, as its card states it.
        data_digest: Digest of the training examples; see `digest_rows`.
        rows: Name of the training examples.
        num_rows: Number of training examples; `None` for a stream.
        steps: Number of optimizer steps.
        effort: Time and hardware of a finished training.
        options: Options that decide how a run goes, by their name in the card.
        adapter: Adapter; `None` for a whole model.
        evaluations: Last evaluation on each dataset.
        warnings: Warnings during training.
        versions: Versions of the libraries.
        pictures: File names of pictures beside the card.
    """

    name: str
    address: str
    base: str | None = None
    base_revision: str | None = None
    base_licence: str | None = None
    data_digest: str | None = None
    rows: str = "pairs"
    num_rows: int | None = None
    steps: int | None = None
    effort: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    adapter: AdapterFacts | None = None
    evaluations: Sequence[Evaluation] = ()
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[str] = ()

    @classmethod
    def from_trainer(
        cls: type[F],
        trainer: Trainer,
        *,
        base: str | None,
        options: Mapping[str, Option],
        metrics: Sequence[str],
        libraries: Iterable[str],
        rows: str = "pairs",
        warnings: Sequence[str] = (),
        **own: Any,
    ) -> F:
        """Read the facts of a trainer as it stands.

        Args:
            trainer: The trainer.
            base: Hub id or path of the base.
            options: Options by their name in the card.
            metrics: Metrics, without prefix, that an evaluation needs to be shown.
            libraries: Libraries whose versions matter.
            rows: Name of the training examples.
            warnings: Warnings during training.
            own: Fields of the subclass.
        """
        args, state = trainer.args, trainer.state
        name = Path(args.output_dir).resolve().name
        evaluations = last_evaluations(state.log_history, metrics)
        held_out = count_rows(trainer.eval_dataset)
        if held_out and len(evaluations) == 1:
            evaluations = [dataclasses.replace(evaluations[0], title=f"{held_out} held-out pairs")]
        model = trainer.accelerator.unwrap_model(trainer.model)
        revision = find_revision(model, base)
        return cls(
            name=name,
            address=args.hub_model_id or name,
            base=base,
            base_revision=revision,
            base_licence=find_licence(base, revision),
            data_digest=getattr(trainer, "data_digest", None),
            rows=rows,
            num_rows=count_rows(trainer.train_dataset),
            steps=state.global_step,
            effort=_effort(state.log_history, args.device),
            options=options,
            adapter=AdapterFacts.of(model),
            evaluations=evaluations,
            warnings=warnings,
            versions=versions(libraries),
            **own,
        )

    @property
    def base_model(self) -> str | None:
        """Hub id of the base; `None` for a local folder."""
        return hub_id(self.base) if self.base else None

    @property
    def base_name(self) -> str | None:
        """Hub id of the base, or the name of its folder."""
        return self.base_model or (Path(self.base).name if self.base else None)

    @property
    def base_path(self) -> str:
        """Placeholder for the path of a local base."""
        return f"path/to/{Path(self.base or '').name or 'base'}"

    @property
    def training(self) -> dict[str, str]:
        """Lines of the card's section on training, in their order."""
        facts: dict[str, Option] = {
            self.rows: self.num_rows,
            f"digest of the {self.rows}": self.data_digest,
            "revision of the base": self.base_revision,
            "licence of the base": self.base_licence and plain_line(self.base_licence),
            "steps": self.steps,
            **self.effort,
            **self.options,
        }
        facts |= self.adapter.options() if self.adapter else {}
        return {fact: _in_words(value) for fact, value in facts.items() if value is not None}


def find_revision(model: nn.Module, base: str | None) -> str | None:
    """Find the commit on the Hub that a base was loaded from; `None` if it was not, or nobody knows."""
    loaded = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Any = getattr(loaded, "config", None)
    # diffusers keeps the folder in the cache, and transformers the commit, which not every class hands on.
    places = [getattr(config, "_name_or_path", None), *(_cached(base, name, None) for name in _INDEXES)]
    found = (re.search(r"snapshots[\\/]([0-9a-f]{40})", str(place or "")) for place in places)
    return getattr(config, "_commit_hash", None) or next((match[1] for match in found if match), None)


def _cached(base: str | None, file: str, revision: str | None) -> str | None:
    """Find a file of a base in its folder or in the cache; the Hub is not asked."""
    if not base:
        return None
    if Path(base).is_dir():
        return str(Path(base) / file)
    try:
        found = try_to_load_from_cache(base, file, revision=revision)
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None


def find_licence(base: str | None, revision: str | None) -> str | None:
    """Find the licence in the card of a base, in its folder or in the cache; the Hub is not asked."""
    card = _cached(base, CARD, revision)
    if card is None:
        return None
    try:
        text = Path(card).read_text(encoding="utf-8")
        licence = read_card(text, ignore_metadata_errors=True).data.to_dict().get("license")
    except (OSError, ValueError):  # there is no card, or none that can be read
        return None
    return str(licence) if licence else None


def digest_rows(rows: object) -> str | None:
    """Digest the training examples, so that two cards can be compared: 16 hexadecimal digits.

    Args:
        rows: A `Dataset`; of anything else, such as a stream, the digest is `None`.

    Example:
        >>> from datasets import Dataset
        >>> digest_rows(Dataset.from_dict({"prompt": ["a"]})) == digest_rows(Dataset.from_dict({"prompt": ["a"]}))
        True
    """
    if not isinstance(rows, Dataset):
        return None
    columns = [name for name in _COLUMNS if name in rows.column_names]
    state = hashlib.blake2b(digest_size=8)
    for batch in rows.select_columns(columns).with_format("arrow").iter(batch_size=100):
        for row in batch.to_pylist():
            state.update(repr([_content(row[name]) for name in columns]).encode())
    return state.hexdigest()


def _content(value: Any) -> Any:
    """Return what counts of a cell: of an image its bytes, or the name of its file."""
    if not isinstance(value, dict):
        return value
    content = value.get("bytes")
    return hashlib.blake2b(content).hexdigest() if content else Path(value.get("path") or "").name


def schedule_options(trainer: Trainer, rows: str = "pairs") -> dict[str, Option]:
    """Return the options of every `Trainer` that decide how a run goes, by their name in a card."""
    args: TrainingArguments = trainer.args
    batch, num_rows = args.train_batch_size, count_rows(trainer.train_dataset)
    return {
        "seed": args.seed,
        "epochs": None if args.max_steps > 0 else args.num_train_epochs,
        f"{rows} in a batch": min(batch, num_rows or batch),
        "gradient accumulation": args.gradient_accumulation_steps,
        "peak learning rate": args.learning_rate,
        "schedule": SchedulerType(args.lr_scheduler_type).value,
        "mixed precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
    }


def _in_words(value: Option) -> str:
    """Write an option for people: `on` for `True`, `3` for `3.0`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _effort(log_history: Iterable[Mapping[str, float]], device: torch.device) -> dict[str, str]:
    """Return time and hardware of the steps; empty before their end."""
    seconds = [entry["train_runtime"] for entry in log_history if "train_runtime" in entry]
    if not seconds:
        return {}
    size, unit = (1, "s") if seconds[-1] < 90 else (60, "min") if seconds[-1] < 5400 else (3600, "h")
    # A run may have been told to leave the machine's GPU alone.
    gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if gpu else f"{device.type.upper()} ({platform.machine()})"
    return {"time of the steps": f"{seconds[-1] / size:.3g} {unit}", "hardware": hardware}


def count_rows(data: object) -> int | None:
    """Count the rows of a dataset; `None` for a stream or for several datasets."""
    return len(data) if isinstance(data, Sized) and not isinstance(data, dict) else None


def last_evaluations(log_history: Iterable[Mapping[str, float]], metrics: Sequence[str]) -> list[Evaluation]:
    """Find the last evaluation on each dataset, and leave out those without a number, such as for ties alone.

    Args:
        log_history: Log of a trainer.
        metrics: Metrics, without prefix, that an evaluation needs.
    """
    last: dict[str, Mapping[str, float]] = {}
    for entry in log_history:
        for key in entry:
            prefix = key.removesuffix(metrics[0])
            if prefix.startswith("eval_") and prefix != key and all(prefix + name in entry for name in metrics):
                last[prefix] = entry
    found = []
    for prefix, entry in last.items():
        numbers = {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
        numbers = {name: value for name, value in numbers.items() if _is_finite(value)}
        subset = prefix[len("eval_") : -1] or None
        title = f"the held-out pairs {subset}" if subset else "held-out pairs"
        if all(name in numbers for name in metrics):
            found.append(Evaluation(title, subset, numbers))
    return found


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Look up the versions of this library and of those of `libraries` that are installed."""
    found = {"bt-hf": sys.modules["bt_hf"].__version__}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
