"""`bt-hf score`: score images with a reward, and rank them."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from bt_hf.cli import Parser

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_EPILOG = """examples:
  bt-hf score my-taste --prompt "a red apple" photos/ --top_k 10
  bt-hf score my-taste --prompt "a red apple" first.png second.png --compare
  bt-hf score openai/clip-vit-base-patch32 --prompt "a red apple" photos/ --format jsonl > rewards.jsonl

A reward means nothing alone: P(a is preferred to b) = sigmoid(reward of a - reward of b), for the same prompt.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `bt-hf score`."""
    parser = Parser(
        prog="bt-hf score",
        description="Score images with a reward for a prompt, best first.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="ADAPTER_OR_MODEL", help="Hub id or folder of a reward adapter or of a plain dual encoder")
    add("images", metavar="IMAGE", nargs="+", help="image files, or folders that are searched with all below them")
    add("--prompt", required=True, help="what was asked for")
    add("--base_model", "--base-model", help="base of the adapter, if another than the one that it names")
    add("--revision", help="git revision of the adapter or the model on the Hub")
    add("--top_k", "--top-k", type=_positive, metavar="N", help="show the best N only")
    add("--compare", action="store_true", help="for exactly two images: the probability that the first is preferred")
    add("--format", choices=("table", "jsonl"), default="table", help="jsonl: one JSON object a line; default: table")
    add("--batch_size", "--batch-size", type=_positive, default=32, metavar="N", help="images at a time; default: 32")
    add("--device", help='such as "cpu" or "cuda:1"; default: a GPU if there is one')
    options = parser.parse_intermixed_args(argv)
    if options.compare and options.top_k is not None:
        parser.error("--compare and --top_k exclude each other")
    return options


def run(options: argparse.Namespace) -> None:
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
        probability = scorer.compare(options.prompt, first, second)
        if options.format == "table":
            print(f"{probability:.3f}  probability that {first} is preferred to {second}")
        else:
            _print_json(prompt=options.prompt, image_a=first, image_b=second, probability=probability)
        return
    ranking = scorer.rank(options.prompt, paths, top_k=options.top_k)
    if options.format == "table":
        print(f"{'rank':>4}  {'reward':>9}  image")
    for place, (index, reward) in enumerate(ranking, start=1):
        if options.format == "table":
            print(f"{place:4}  {reward:9.4f}  {paths[index]}")
        else:
            _print_json(image=str(paths[index]), prompt=options.prompt, reward=reward)


def find_images(names: Iterable[str]) -> list[Path]:
    """The files that are named, and all images in the folders that are, each once, in a stable order.

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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, but got {text!r}")
    return int(text)


def _print_json(**values: object) -> None:
    print(json.dumps(values, ensure_ascii=False))
