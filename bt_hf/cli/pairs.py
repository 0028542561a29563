"""`bt-hf pairs`: draw images with a pipeline, and rank them into pairs with a reward."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bt_hf.cli import Parser

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
_DTYPES = ("float32", "float16", "bfloat16")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `bt-hf pairs`."""
    parser = Parser(
        prog="bt-hf pairs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id or folder of a text-to-image pipeline of diffusers")
    add("--scorer", required=True, metavar="ADAPTER_OR_MODEL", help="Hub id or folder of a reward, as in bt-hf score")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE", help="text file with one prompt a line")
    source.add_argument("--dataset", help="take the prompts from a dataset: Hub id, folder or file")
    add("--column", default="prompt", help="column of the dataset that holds them; default: prompt")
    add("--split", help='split of the dataset, such as "train[:1000]"')
    add("--output_dir", "--output-dir", default="preference-pairs", metavar="FOLDER", help="default: preference-pairs")
    add("--candidates", type=_positive, default=4, metavar="N", help="images for each prompt; default: 4")
    add("--pairs_per_prompt", "--pairs-per-prompt", type=_positive, default=1, metavar="N", help="default: 1")
    add(
        "--prompt_templates",
        "--prompt-templates",
        nargs="+",
        default=["{prompt}"],
        metavar="TEXT",
        help='vary what is drawn, such as "{prompt}" "{prompt}, oil painting": candidates take turns',
    )
    add("--soft_labels", "--soft-labels", action="store_true", help="preferences as sure as the reward, not 1")
    add("--seed", type=int, default=0, help="other seeds draw other images; default: 0")
    add("--batch_size", "--batch-size", type=_positive, default=8, metavar="N", help="images at a time; default: 8")
    add("--lora", metavar="FOLDER", help="LoRA to load into the pipeline: Hub id or folder")
    add("--steps", type=_positive, metavar="N", help="steps of denoising; default: the pipeline's")
    add("--guidance_scale", "--guidance-scale", type=float, metavar="SCALE", help="default: the pipeline's")
    add("--negative_prompt", "--negative-prompt", metavar="TEXT", help="what no image should show")
    add("--height", type=_positive, metavar="PIXELS", help="default: the pipeline's")
    add("--width", type=_positive, metavar="PIXELS", help="default: the pipeline's")
    add("--dtype", choices=_DTYPES, help="of the pipeline; default: bfloat16 on a GPU, else float32")
    add("--device", help='such as "cpu" or "cuda:1"; default: a GPU if there is one')
    options = parser.parse_args(argv)
    if options.candidates < 2 * options.pairs_per_prompt:
        parser.error(f"--candidates should be at least twice --pairs_per_prompt, but got {options.candidates}")
    return options


def run(options: argparse.Namespace) -> None:
    """Draw, rank, and say what came of it."""
    prompts = read_prompts(options.prompts, options.dataset, options.column, options.split)

    import torch  # seconds, as all below: only once the arguments are known to be right

    from bt_hf.diffusion.generation.generate import generate_preference_pairs
    from bt_hf.reward.scorer import PreferenceScorer

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scorer = PreferenceScorer.from_pretrained(options.scorer, device=device)
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    call = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
        "height": options.height,
        "width": options.width,
    }
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
        **{name: value for name, value in call.items() if value is not None},
    )
    covered, asked = len(set(pairs["prompt"])), len(set(prompts))
    print(f"{len(pairs)} pairs, of {covered} of {asked} prompts, from {options.candidates} images for each.")
    print(f"Saved to {options.output_dir}")
    print(f"Next: bt-hf lora --model {options.model} --dataset {options.output_dir} --output_dir my-taste-lora")


def read_prompts(file: str | None, dataset: str | None, column: str, split: str | None) -> list[str]:
    """The prompts of a text file, as they stand there, or the distinct ones of a dataset's column.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no prompt, no such column or dataset, or the file is not UTF-8 text.
    """
    if file is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"no such file of prompts: '{file}'")
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"'{file}' should be a text file in UTF-8, but is not ({error.reason})") from error
        prompts = [line.strip() for line in lines if line.strip()]
        where = f"'{file}'"
    else:
        from bt_hf.data.reading import open_dataset

        rows, _, where = open_dataset(dataset, split, streaming=False)
        if column not in rows.column_names:
            raise ValueError(f"{where}: no column {column!r}; name one of {', '.join(rows.column_names)} in --column")
        values = list(rows.select_columns([column])[column])
        wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
        if wrong is not None:
            raise ValueError(f"{where}: the column {column!r} should hold texts, but has {type(wrong).__name__}")
        prompts = list(dict.fromkeys(value.strip() for value in values if value and value.strip()))
    if not prompts:
        raise ValueError(f"{where}: expected at least one prompt, but found none")
    return prompts


def load_pipeline(model: str, lora: str | None, dtype: Any, device: str) -> Any:
    """A pipeline, perhaps with a LoRA, on its device.

    Raises:
        OSError: There is no such pipeline or LoRA.
        ValueError: The LoRA does not fit the pipeline.
    """
    from diffusers import DiffusionPipeline

    if lora is not None and not Path(lora).exists() and (Path(lora).is_absolute() or lora.startswith(".")):
        raise FileNotFoundError(f"no such LoRA: '{lora}'")
    with _without_loading_bars():
        pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype)
        if lora is not None:
            pipeline.load_lora_weights(lora)
            # Of names that do not fit, diffusers only says so in a log.
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, but got {text!r}")
    return int(text)
