"""`bt-hf score`: score images with a reward, and rank them."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bt_hf.cli.errors import one_line
from bt_hf.cli.options import PositiveInt, parse_options

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
            "help": "Image files, or folders that are searched with all below them but what is hidden.",
        }
    )
    prompt: str = field(metadata={"help": "Prompt that the images are judged for."})
    base_model: str | None = field(
        default=None, metadata={"help": "Base of the adapter, if another than the one that it names."}
    )
    revision: str | None = field(default=None, metadata={"help": "Git revision of the adapter or model on the Hub."})
    scale: float | None = field(
        default=None,
        metadata={"help": "Scale of the adapter: 0 is the base, 1 (the default) the taste as it was trained."},
    )
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
    paths, left_out = find_images(options.images)
    if options.compare and len(paths) != 2:
        raise ValueError(f"--compare needs exactly two images, but got {len(paths)}")

    from bt_hf.reward.scorer import PreferenceScorer  # seconds: only once the arguments are known to be right

    scorer = PreferenceScorer.from_pretrained(
        options.model, base_model=options.base_model, revision=options.revision, device=options.device
    )
    scorer.batch_size = options.batch_size
    if options.scale is not None:
        scorer.set_scale(options.scale)
    if options.compare:
        first, second = map(str, paths)
        _print_comparison(options, first, second, scorer.compare(options.prompt, first, second))
        return
    rewards, problems = _score(scorer, options.prompt, paths)
    if not rewards:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"no image can be read: {problems[0]}{more}")
    for problem in problems:
        _note(f"left out: {problem}")
    if left_out:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        _note(f"left out {left_out.total()} other files in folders: {counts}")
    ranking = sorted(rewards, key=lambda one: -one[1])
    _print_ranking(options, ranking[: options.top_k])


def _score(scorer: Any, prompt: str, paths: Sequence[Path]) -> tuple[list[tuple[Path, float]], list[str]]:
    """Score images a few at a time. Return paths with rewards, and the problems of those that can't be read."""
    from bt_hf.data.images import to_rgb

    rewards: list[tuple[Path, float]] = []
    problems: list[str] = []
    for start in range(0, len(paths), scorer.batch_size):
        images = {}
        for path in paths[start : start + scorer.batch_size]:
            try:
                images[path] = to_rgb(path)
            except ValueError as error:
                problems.append(one_line(str(error)))
                continue
            images[path].filename = str(path)  # type: ignore[attr-defined]  # as images of files have it: for errors
        rewards += zip(images, scorer.score(prompt, list(images.values())).tolist(), strict=True)
    return rewards, problems


def _print_comparison(options: ScoreOptions, first: str, second: str, probability: float) -> None:
    if options.format == "table":
        _print(f"{probability:.3f}  probability that {_shown(first)} is preferred to {_shown(second)}")
    else:
        _print_json(prompt=options.prompt, image_a=first, image_b=second, probability=probability)


def _print_ranking(options: ScoreOptions, ranking: Iterable[tuple[Path, float]]) -> None:
    if options.format == "table":
        print(f"{'rank':>4}  {'reward':>9}  image")
    for place, (path, reward) in enumerate(ranking, start=1):
        if options.format == "table":
            _print(f"{place:4}  {reward:9.4f}  {_shown(path)}")
        else:
            _print_json(image=str(path), prompt=options.prompt, reward=reward)


def find_images(names: Iterable[str]) -> tuple[list[Path], Counter[str]]:
    """Find the named files and all images in the named folders, each once, in a stable order.

    Hidden files, files of hidden folders, and those without the ending of a format in `FORMATS` are left out.

    Returns:
        The images; and how many files of the folders are left out, by why.

    Raises:
        FileNotFoundError: There is no such file or folder, or no image in a folder.
    """
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in map(Path, names):
        if path.is_dir():
            found = _search(path, left_out)
            if not found:
                raise FileNotFoundError(
                    f"no images in the folder '{path}', but {left_out.total()} other files (names of images end with "
                    f"{', '.join(sorted(_suffixes()))})"
                )
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"no such image file or folder: '{path}'")
    return list(dict.fromkeys(paths)), left_out


def _search(folder: Path, left_out: Counter[str]) -> list[Path]:
    """List the images below a folder, and count the other files."""
    found = []
    suffixes = _suffixes()
    for parent, _, names in os.walk(folder):
        for file in (Path(parent, name) for name in names):
            if any(part.startswith(".") for part in file.relative_to(folder).parts):
                left_out["hidden"] += 1
            elif file.suffix.lower() in suffixes and file.is_file():
                found.append(file)
            else:
                left_out["not images"] += 1
    return sorted(found)


def _suffixes() -> frozenset[str]:
    """Return the endings of the names of images that Pillow reads here."""
    from PIL import Image

    from bt_hf.data.images import FORMATS

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def _note(text: str) -> None:
    print(f"bt-hf score: {_shown(text)}", file=sys.stderr)


def _shown(path: str | Path) -> str:
    """Return a file name on one line: what is not printable, as newlines and undecodable bytes, is escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(path)
    )


def _print(text: str) -> None:
    """Print whatever the terminal's encoding is."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _print_json(**values: object) -> None:
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
        plain = text.isprintable()  # some readers of lines also split them at U+2028 and its like
    except UnicodeEncodeError:
        plain = False
    print(text if plain else json.dumps(values))
