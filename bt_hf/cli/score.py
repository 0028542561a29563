"""`bt-hf score`: score images with a reward, and rank them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bt_hf.cli.options import PositiveInt, parse_options

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_DESCRIPTION = "Score images with a reward for a prompt, best first."
_EPILOG = """examples:
  bt-hf score my-taste --prompt "a red apple" photos/ --top_k 10
  bt-hf score my-taste --prompt "a red apple" first.png second.png --compare
  bt-hf score openai/clip-vit-base-patch32 --prompt "a red apple" photos/ --format jsonl > rewards.jsonl

A reward means nothing alone: P(a is preferred to b) = sigmoid(reward of a - reward of b), for the same prompt.
"""


@dataclass
class ScoreOptions:
    """Options of `bt-hf score`."""

    model: str = field(
        metadata={
            "positional": True,
            "metavar": "ADAPTER_OR_MODEL",
            "help": "Hub id or folder of a reward adapter or of a plain dual encoder.",
        }
    )
    images: list[str] = field(
        metadata={
            "positional": True,
            "metavar": "IMAGE",
            "help": "Image files, or folders that are searched with all below them.",
        }
    )
    prompt: str = field(metadata={"help": "Prompt that the images are judged for."})
    base_model: str | None = field(
        default=None, metadata={"help": "Base of the adapter, if another than the one that it names."}
    )
    revision: str | None = field(default=None, metadata={"help": "Git revision of the adapter or model on the Hub."})
    top_k: PositiveInt | None = field(default=None, metadata={"metavar": "N", "help": "Show the best N only."})
    compare: bool = field(
        default=False, metadata={"help": "For exactly two images: the probability that the first is preferred."}
    )
    format: Literal["table", "jsonl"] = field(
        default="table", metadata={"help": "A table, or one JSON object a line."}
    )
    batch_size: PositiveInt = field(default=PositiveInt(32), metadata={"metavar": "N", "help": "Images at a time."})
    device: str | None = field(
        default=None, metadata={"help": 'Device such as "cpu" or "cuda:1"; default: a GPU if there is one.'}
    )

    def __post_init__(self) -> None:
        if self.compare and self.top_k is not None:
            raise ValueError("--compare and --top_k exclude each other")


def parse(argv: Sequence[str]) -> ScoreOptions:
    """Parse the options of `bt-hf score`."""
    return parse_options("score", ScoreOptions, argv, _DESCRIPTION, _EPILOG)


def run(options: ScoreOptions) -> None:
    """Score, and print the ranking or the probability."""
    paths = find_images(options.images)
    if options.compare and len(paths) != 2:
        raise ValueError(f"--compare needs exactly two images, but got {len(paths)}")

    from bt_hf.reward.scorer import PreferenceScorer  # seconds: only once the arguments are known to be right

    scorer = PreferenceScorer.from_pretrained(
        options.model, base_model=options.base_model, revision=options.revision, device=options.device
    )
    scorer.batch_size = options.batch_size
    if options.compare:
        first, second = map(str, paths)
        _print_comparison(options, first, second, scorer.compare(options.prompt, first, second))
    else:
        _print_ranking(options, paths, scorer.rank(options.prompt, paths, top_k=options.top_k))


def _print_comparison(options: ScoreOptions, first: str, second: str, probability: float) -> None:
    if options.format == "table":
        print(f"{probability:.3f}  probability that {first} is preferred to {second}")
    else:
        _print_json(prompt=options.prompt, image_a=first, image_b=second, probability=probability)


def _print_ranking(options: ScoreOptions, paths: Sequence[Path], ranking: Iterable[tuple[int, float]]) -> None:
    if options.format == "table":
        print(f"{'rank':>4}  {'reward':>9}  image")
    for place, (index, reward) in enumerate(ranking, start=1):
        if options.format == "table":
            print(f"{place:4}  {reward:9.4f}  {paths[index]}")
        else:
            _print_json(image=str(paths[index]), prompt=options.prompt, reward=reward)


def find_images(names: Iterable[str]) -> list[Path]:
    """Find the named files and all images in the named folders, each once, in a stable order.

    Raises:
        FileNotFoundError: There is no such file or folder, or no image in a folder.
    """
    paths: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise FileNotFoundError(f"no images in the folder '{path}' ({', '.join(sorted(IMAGE_SUFFIXES))})")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"no such image file or folder: '{path}'")
    return list(dict.fromkeys(paths))


def _print_json(**values: object) -> None:
    print(json.dumps(values, ensure_ascii=False))
