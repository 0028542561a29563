"""`bt-hf pairs`: draw images with a pipeline, and rank them into pairs with a reward."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bt_hf.cli.options import PositiveInt, parse_options

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

_DESCRIPTION = """Draw several images for each prompt, and pair the one that a reward likes best with the worst.

So a taste that was clicked once teaches a pipeline without further clicks: `bt-hf reward` learns the taste, this
command judges with it, and `bt-hf lora` trains the pipeline on the pairs."""
_EPILOG = """examples:
  bt-hf pairs stable-diffusion-v1-5/stable-diffusion-v1-5 --scorer my-taste --prompts prompts.txt --output_dir my-pairs
  bt-hf pairs my-model/ --scorer my-taste --dataset my-clicks/ --column prompt --candidates 8 --pairs_per_prompt 2
  bt-hf pairs my-model/ --scorer my-taste --prompts prompts.txt --prompt_templates "{prompt}" "{prompt}, oil painting"
  bt-hf pairs my-model/ --lora my-lora/ --scorer my-taste --prompts prompts.txt --steps 30 --guidance_scale 5

prompts.txt has one prompt a line. The same command again goes on where one was stopped. my-pairs/ then has the images
and metadata.jsonl, which load_preference_pairs and bt-hf lora read.
"""


@dataclass
class PairsOptions:
    """Options of `bt-hf pairs`."""

    model: str = field(
        metadata={
            "positional": True,
            "metavar": "MODEL",
            "help": "Hub id or folder of a text-to-image pipeline of diffusers.",
        }
    )
    scorer: str = field(
        metadata={"metavar": "ADAPTER_OR_MODEL", "help": "Hub id or folder of a reward, as in bt-hf score."}
    )
    prompts: str | None = field(default=None, metadata={"metavar": "FILE", "help": "Text file, one prompt a line."})
    dataset: str | None = field(
        default=None, metadata={"help": "Dataset to take the prompts from: Hub id, folder or file."}
    )
    column: str = field(default="prompt", metadata={"help": "Column of the dataset that holds them."})
    split: str | None = field(default=None, metadata={"help": 'Split of the dataset, such as "train[:1000]".'})
    output_dir: str = field(
        default="preference-pairs", metadata={"metavar": "FOLDER", "help": "Folder for images and metadata.jsonl."}
    )
    candidates: PositiveInt = field(
        default=PositiveInt(4), metadata={"metavar": "N", "help": "Images for each prompt."}
    )
    pairs_per_prompt: PositiveInt = field(
        default=PositiveInt(1), metadata={"metavar": "N", "help": "Pairs from the images of a prompt."}
    )
    prompt_templates: list[str] = field(
        default_factory=lambda: ["{prompt}"],
        metadata={
            "metavar": "TEXT",
            "help": 'Vary the drawings, such as "{prompt}" "{prompt}, oil painting": candidates take turns.',
        },
    )
    soft_labels: bool = field(default=False, metadata={"help": "Make preferences as sure as the reward, not 1."})
    seed: int = field(default=0, metadata={"help": "Other seeds draw other images."})
    batch_size: PositiveInt = field(default=PositiveInt(8), metadata={"metavar": "N", "help": "Images at a time."})
    lora: str | None = field(
        default=None, metadata={"metavar": "FOLDER", "help": "LoRA to load into the pipeline: Hub id or folder."}
    )
    steps: PositiveInt | None = field(
        default=None, metadata={"metavar": "N", "help": "Steps of denoising; default: the pipeline's."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"metavar": "SCALE", "help": "Guidance scale; default: the pipeline's."}
    )
    negative_prompt: str | None = field(
        default=None, metadata={"metavar": "TEXT", "help": "Words for things that images should not show."}
    )
    height: PositiveInt | None = field(
        default=None, metadata={"metavar": "PIXELS", "help": "Height; default: the pipeline's."}
    )
    width: PositiveInt | None = field(
        default=None, metadata={"metavar": "PIXELS", "help": "Width; default: the pipeline's."}
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None, metadata={"help": "Dtype of the pipeline; default: bfloat16 on a GPU, else float32."}
    )
    device: str | None = field(
        default=None, metadata={"help": 'Device such as "cpu" or "cuda:1"; default: a GPU if there is one.'}
    )

    def __post_init__(self) -> None:
        if self.prompts is None and self.dataset is None:
            raise ValueError("one of the arguments --prompts --dataset is required")
        if self.prompts is not None and self.dataset is not None:
            raise ValueError("--dataset: not allowed with --prompts")
        if self.candidates < 2 * self.pairs_per_prompt:
            raise ValueError(f"--candidates should be at least twice --pairs_per_prompt, but got {self.candidates}")

    @property
    def call_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, where they were given."""
        call = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "height": self.height,
            "width": self.width,
        }
        return {name: value for name, value in call.items() if value is not None}


def parse(argv: Sequence[str]) -> PairsOptions:
    """Parse the options of `bt-hf pairs`."""
    return parse_options("pairs", PairsOptions, argv, _DESCRIPTION, _EPILOG)


def run(options: PairsOptions) -> None:
    """Draw, rank, and print how many pairs came of it."""
    importlib.import_module("diffusers")  # first of all: without it, nothing below works
    prompts = read_prompts(options.prompts, options.dataset, options.column, options.split)

    import torch  # seconds, as all below: only once the arguments are known to be right

    from bt_hf.diffusion.generation.generate import generate_preference_pairs
    from bt_hf.reward.scorer import PreferenceScorer

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scorer = PreferenceScorer.from_pretrained(options.scorer, device=device)
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    pairs = generate_preference_pairs(
        load_pipeline(options.model, options.lora, getattr(torch, dtype), device),
        prompts,
        scorer,
        candidates=options.candidates,
        pairs_per_prompt=options.pairs_per_prompt,
        prompt_templates=options.prompt_templates,
        seed=options.seed,
        batch_size=options.batch_size,
        output_dir=options.output_dir,
        soft_labels=options.soft_labels,
        **options.call_options,
    )
    covered, asked = len(set(pairs["prompt"])), len(set(prompts))
    print(f"{len(pairs)} pairs, of {covered} of {asked} prompts, from {options.candidates} images for each.")
    print(f"Saved to {options.output_dir}")
    print(f"Next: bt-hf lora --model {options.model} --dataset {options.output_dir} --output_dir my-taste-lora")


def read_prompts(file: str | None, dataset: str | None, column: str, split: str | None) -> list[str]:
    """Read the prompts of a text file as they stand there, or else the distinct ones of a dataset's column.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no prompt, no such column or dataset, or the file is not UTF-8 text.
    """
    prompts, source = _read_column(dataset, column, split) if file is None else _read_lines(file)
    if not prompts:
        raise ValueError(f"{source}: expected at least one prompt, but found none")
    return prompts


def _read_lines(file: str) -> tuple[list[str], str]:
    """Return the lines of a text file that are not blank, and a name for messages."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no such file of prompts: '{file}'")
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' should be a text file in UTF-8, but is not ({error.reason})") from error
    return [line.strip() for line in lines if line.strip()], f"'{file}'"


def _read_column(dataset: str | None, column: str, split: str | None) -> tuple[list[str], str]:
    """Return the distinct texts of a dataset's column, and a name for messages."""
    from bt_hf.data.reading import open_dataset

    rows, _, source = open_dataset(dataset, split, streaming=False, roles=lambda names: {column: "text"})
    if column not in rows.column_names:
        raise ValueError(f"{source}: no column {column!r}; name one of {', '.join(rows.column_names)} in --column")
    values = list(rows.select_columns([column])[column])
    wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(f"{source}: the column {column!r} should hold texts, but has {type(wrong).__name__}")
    return list(dict.fromkeys(value.strip() for value in values if value and value.strip())), source


def load_pipeline(model: str, lora: str | None, dtype: torch.dtype, device: str) -> DiffusionPipeline:
    """Load a pipeline, perhaps with a LoRA, on its device.

    Raises:
        OSError: There is no such pipeline or LoRA.
        ValueError: The LoRA does not fit the pipeline.
    """
    from diffusers import DiffusionPipeline

    from bt_hf.hub.loading import check_pipeline_lora, load_pretrained

    if lora is not None and not Path(lora).exists() and (Path(lora).is_absolute() or lora.startswith(".")):
        raise FileNotFoundError(f"no such LoRA: '{lora}'")
    with _without_loading_bars():
        pipeline = load_pretrained(DiffusionPipeline, model, dtype=dtype)
        if lora is not None:
            check_pipeline_lora(lora, getattr(pipeline, "transformer", None) or pipeline.unet)
            pipeline.load_lora_weights(lora)
            # diffusers says only in a log that names do not fit.
            if not pipeline.get_list_adapters():
                raise ValueError(f"the LoRA '{lora}' has no weights for the pipeline '{model}': is it of this model?")
    return pipeline.to(device)


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
