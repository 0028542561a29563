"""Share what was learnt, and what was clicked: the Hub, and files to take along."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import get_token

from bt_hf.data.clicks import image_file
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.hub.card_sections import show_pictures
from bt_hf.hub.contract import ADAPTER_CONFIG, CARD, FAVOURITES, PICTURES, check_repo_id
from bt_hf.hub.pairs import publishable_pairs
from bt_hf.hub.push import full_name, push_adapter
from bt_hf.plots import contact_sheet
from bt_hf.studio.jobs import Handle
from bt_hf.studio.learner import Learner
from bt_hf.studio.pool import Pool
from bt_hf.studio.session import Session
from bt_hf.studio.training import LORA, REWARD

WHAT = {"drawing": LORA, "reward": REWARD, "pairs": None}
FORMATS = ("parquet", "jsonl")
_FAVOURITES = 8


@dataclass(frozen=True)
class Sharing:
    """Publishing and exports of a session.

    Args:
        session, pool, learner: The parts of the studio.
    """

    session: Session
    pool: Pool
    learner: Learner

    def folder(self, what: str | None) -> Path:
        """Return the folder of what is trained: "drawing" or "reward"; by default the one that is there.

        Raises:
            FileNotFoundError: It is not trained yet.
        """
        names = [what] if what else ["drawing", "reward"]
        for name in names:
            folder = self.session.folder / str(WHAT[name])
            if (folder / ADAPTER_CONFIG).is_file():
                return folder
        raise FileNotFoundError("nothing is trained yet: train the taste or the drawing first")

    def card(self, what: str | None, show_images: bool) -> str:
        """Return the card as it would be published.

        Raises:
            FileNotFoundError: Nothing is trained yet.
        """
        folder = self.folder(what)
        pictures = [name for name in PICTURES if (folder / name).is_file() and name != FAVOURITES]
        text = (folder / CARD).read_text(encoding="utf-8")
        return show_pictures(text, [*pictures, *([FAVOURITES] if show_images else [])])

    def publish(self, handle: Handle, options: Mapping[str, Any]) -> dict[str, Any]:
        """Publish an adapter or the pairs, private unless told otherwise; images of the person only if asked.

        Args:
            handle: The job.
            options: `repo_id`, `what` ("drawing", "reward" or "pairs"), `private` (default true), `show_images`
                (default false), `base_model` (Hub id of a base that was a local folder).
        """
        repo_id, private = options["repo_id"], options.get("private", True)
        handle.say("Publishing", None)
        if options.get("what") == "pairs":
            check_repo_id(repo_id)
            pairs = publishable_pairs(self.pairs())
            name = full_name(repo_id)
            commit = pairs.push_to_hub(name, private=private)
            handle.job.message = _published(private)
            return {"url": str(getattr(commit, "repo_url", "")) or name}
        folder = self.folder(options.get("what"))
        favourites = folder / FAVOURITES
        favourites.unlink(missing_ok=True)
        if options.get("show_images", False):
            self.draw_favourites(favourites)
        try:
            commit = push_adapter(folder, repo_id, private=private, base_model=options.get("base_model"))
        finally:
            favourites.unlink(missing_ok=True)
        handle.job.message = _published(private)
        return {"url": str(commit.commit_url).split("/commit/")[0]}

    def draw_favourites(self, path: Path) -> None:
        """Draw the images that are liked most and least."""
        ranking = self.learner.ranking()
        if len(ranking) < 2:
            raise ValueError("nothing is ranked yet: click a few times first, or leave the images out of the card")
        count = min(_FAVOURITES, len(ranking) // 2)
        rows = [[self.pool.read(number) for number in numbers] for numbers in (ranking[:count], ranking[-count:])]
        contact_sheet([rows[0]], [rows[1]], path, titles=("liked most", "liked least"))

    def pairs(self) -> Dataset:
        """Return the pairs of the session.

        Raises:
            ValueError: There is none.
        """
        return load_preference_pairs(str(self.session.folder), on_bad_rows="drop")

    def parquet(self, path: Path) -> None:
        """Write the pairs with their images as a Parquet file in the row contract."""
        self.pairs().to_parquet(path)

    def archive(self, path: Path) -> None:
        """Write the pairs as a ZIP of `metadata.jsonl` and images, a folder that `load_preference_pairs` reads."""
        with self.session.reading():
            pairs = self.session.log.pairs()
        files: dict[int, Path] = {}
        lines = io.StringIO()
        for pair in pairs:
            found = {number: image_file(self.session.folder, number) for number in (pair.chosen, pair.rejected)}
            if any(file is None for file in found.values()):
                continue
            files |= {number: file for number, file in found.items() if file is not None}
            names = {side: f"images/{files[getattr(pair, side)].name}" for side in ("chosen", "rejected")}
            row = {"prompt": pair.prompt, **names, "preference": pair.preference, "weight": pair.weight}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not files:
            raise ValueError("there is no click to export yet")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("metadata.jsonl", lines.getvalue())
            for file in files.values():
                archive.write(file, f"images/{file.name}")


def _published(private: bool) -> str:
    return "Published, for you alone." if private else "Published, for everybody to see."


def why_not_published() -> str | None:
    """Return the reason that nothing can be published, `None` if it can."""
    return None if get_token() else "log in on this machine with `hf auth login` first"
