"""Store of finished prompts while pairs are drawn, in memory or in a folder."""

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value

from bt_hf.data.atomic import write_file

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "prompt": Value("string"),
        "chosen": Image(),
        "rejected": Image(),
        "preference": Value("float64"),
        "chosen_prompt": Value("string"),
        "rejected_prompt": Value("string"),
        "chosen_seed": Value("int64"),
        "rejected_seed": Value("int64"),
        "chosen_reward": Value("float32"),
        "rejected_reward": Value("float32"),
    }
)
_SETTINGS, _PROGRESS, _METADATA = "settings.json", "progress.jsonl", "metadata.jsonl"
_FILE_NAMES = {"chosen": "chosen_file_name", "rejected": "rejected_file_name"}
ADVICE = (
    "Draw some by hand first: float32 or bfloat16 helps against NaN, and safety_checker=None against black images."
)


class PairFolder:
    """Finished prompts, in memory or in a folder that survives being killed at any moment.

    The folder holds settings.json, the images, progress.jsonl with a line for each finished prompt, and at the end
    metadata.jsonl, which makes it a dataset.
    """

    def __init__(self, folder: str | os.PathLike | None) -> None:
        self.folder = None if folder is None else Path(folder)
        # Place of the prompt -> its rows, and counts of what was skipped.
        self.finished: dict[int, dict[str, Any]] = {}

    def begin(self, settings: dict[str, Any]) -> None:
        """Start, or resume from the prompts that the folder holds.

        Raises:
            ValueError: The folder holds something else, or was begun with other settings.
        """
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`output_dir` should be a folder, but '{self.folder}' is a file.")
        self.folder.mkdir(parents=True, exist_ok=True)
        for half in (*self.folder.glob(".*.tmp"), *self.folder.glob("images/.*.tmp")):  # left by a run that was killed
            half.unlink()
        file = self.folder / _SETTINGS
        if not file.exists():
            if any(self.folder.iterdir()):
                raise ValueError(
                    f"`output_dir` should be a new or empty folder, or one that was begun here, but '{self.folder}' "
                    f"has files and no {_SETTINGS}: name another folder."
                )
            write_file(file, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        begun = json.loads(file.read_text(encoding="utf-8"))
        # Through JSON, as what was written went too.
        settings = json.loads(json.dumps(settings))
        names = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
        if names:
            changes = "; ".join(f"{name} was {begun.get(name)!r}, is {settings.get(name)!r}" for name in names)
            raise ValueError(
                f"`output_dir` '{self.folder}' was begun with other settings ({changes}). Give the same ones to go "
                "on, or name another folder to start anew."
            )
        progress = self.folder / _PROGRESS
        if progress.exists():
            text = progress.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]  # a killed run may have written half a line
            if whole != text:
                write_file(progress, whole)
            self.finished = {line["place"]: line for line in map(json.loads, whole.decode().splitlines())}

    def add(self, place: int, prompt: str, rows: list[dict[str, Any]], skipped: Mapping[str, int]) -> None:
        """Keep a finished prompt: its images first, so that a line never names a file that is not there."""
        kept = []
        for number, row in enumerate(rows):
            images: dict[str, Any] = {}
            for name in ("chosen", "rejected"):
                png = io.BytesIO()
                row[name].save(png, format="PNG")
                if self.folder is None:
                    images[name] = {"bytes": png.getvalue(), "path": None}
                else:
                    images[name] = f"images/{place:06}-{number}-{name}.png"
                    write_file(self.folder / images[name], png.getvalue())
            kept.append({"prompt": prompt, **row, **images})
        self.finished[place] = {"place": place, "rows": kept, "skipped": dict(skipped)}
        if self.folder is not None:
            with (self.folder / _PROGRESS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.finished[place], ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def end(self) -> Dataset:
        """Return the dataset, and warn of the images and prompts that are not in it.

        Raises:
            ValueError: No pair is usable.
        """
        places = [self.finished[place] for place in sorted(self.finished)]
        rows = [row for line in places for row in line["rows"]]
        skipped: Counter[str] = Counter()
        for line in places:
            skipped.update(line["skipped"])
        if not rows:
            raise ValueError(
                f"No usable pair from {len(places)} prompt{'s' * (len(places) != 1)} ({counted(skipped)}). {ADVICE}"
            )
        if skipped:
            logger.warning("%d pairs from %d prompts; left out: %s.", len(rows), len(places), counted(skipped))
        columns = {name: [row[name] for row in rows] for name in FEATURES}
        if self.folder is not None:
            # Named as `datasets` names columns of image files in a folder, so that the Hub shows the images too.
            lines = [{_FILE_NAMES.get(name, name): value for name, value in row.items()} for row in rows]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_file(self.folder / _METADATA, text.encode())
            columns |= {name: [str(self.folder / file) for file in columns[name]] for name in _FILE_NAMES}
        return Dataset.from_dict(columns, features=FEATURES)


def counted(counts: Mapping[str, int]) -> str:
    """Write counts into a sentence: "images not finite: 2, pairs of equal rewards: 1"."""
    return ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
