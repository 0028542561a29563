"""Library of images whose embeddings are computed once: found by caption, ordered by taste."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk

# Candidates that the base retrieves for each image that is asked for; taste orders these.
POOL = 4
# Weight of a logit of taste against one of the caption. Chosen on training concepts: 1 lets taste outvote the caption
# of a base that knows few words, and 0 is the base's order.
TASTE_WEIGHT = 0.5
# Images from which on FAISS, where it is installed, searches faster than a product with all embeddings.
INDEXED_FROM = 10_000


@dataclass(frozen=True)
class Found:
    """Image that a search found.

    Attributes:
        index: Its place in the library.
        name: Its name there, such as a file name.
        caption: Reward of the base, in logits: how well the image fits the prompt.
        taste: How much more the person likes it than the other candidates on average, in logits.
    """

    index: int
    name: str
    caption: float
    taste: float


class ImageLibrary:
    """Embeddings of many images, with and without the adapter.

    A library of `INDEXED_FROM` images or more is searched by FAISS, if that is installed: `pip install
    'bt-hf[search]'`. Its exact index of inner products finds the same images in less time; it is built in memory at
    the first search and holds a copy of the base's embeddings; saved folders are the same with and without it.

    Args:
        names: M names, such as file names.
        base: (M, D) normalised float32 embeddings of the base.
        adapted: (M, D) those of the adapted model.
        model: Digest of the model that embedded them.

    Example:
        ```python
        from bt_hf import ImageLibrary, PreferenceScorer

        scorer = PreferenceScorer.from_pretrained("my-taste")
        library = scorer.index(["first.png", "second.png"])
        library.save("my-library")
        scorer.search("a red apple", ImageLibrary.load("my-library"), top_k=1)
        ```
    """

    def __init__(self, names: Sequence[str], base: torch.Tensor, adapted: torch.Tensor, model: str) -> None:
        self.names = list(names)
        self.base = base
        self.adapted = adapted
        self.model = model

    def __len__(self) -> int:
        return len(self.names)

    def save(self, folder: str | Path) -> None:
        """Save the library as a folder of `datasets`, with the columns `name`, `base` and `adapted`."""
        vector = List(Value("float32"), length=self.base.shape[1])
        features = Features({"name": Value("string"), "base": vector, "adapted": vector})
        columns = {"name": self.names, "base": list(self.base.numpy()), "adapted": list(self.adapted.numpy())}
        rows = Dataset.from_dict(columns, features=features)
        rows.info.description = self.model
        rows.save_to_disk(str(folder))

    @classmethod
    def load(cls, folder: str | Path) -> "ImageLibrary":
        """Load a saved library.

        Raises:
            ValueError: The folder does not hold one.
        """
        try:
            rows = load_from_disk(str(folder))
        except FileNotFoundError as error:
            raise ValueError(
                f"'{folder}' does not hold a library: save one by `scorer.index(images).save(folder)`."
            ) from error
        if not isinstance(rows, Dataset) or set(rows.column_names) != {"name", "base", "adapted"}:
            raise ValueError(f"'{folder}' holds a dataset of another kind, not a library of `scorer.index`.")
        table = rows.with_format("numpy")
        base, adapted = (
            torch.from_numpy(np.asarray(table[name][:], dtype=np.float32).reshape(len(rows), -1))
            for name in ("base", "adapted")
        )
        return cls(list(rows["name"]), base, adapted, rows.info.description)

    def search(
        self,
        base_text: torch.Tensor,
        taste_text: torch.Tensor,
        scale: float,
        top_k: int,
        taste_weight: float = TASTE_WEIGHT,
        pool: int = POOL,
    ) -> list[Found]:
        """Return the images that fit a prompt best, those first that the person likes.

        The base retrieves `pool` candidates for each image that is asked for, and these are ordered by caption +
        `taste_weight` * taste, both in logits.

        Args:
            base_text: (D,) embedding of the prompt by the base.
            taste_text: (D,) what the adapter adds to it.
            scale: exp(logit_scale).
            top_k: Images to return.
            taste_weight: Weight of taste against the caption.
            pool: Candidates for each image that is returned.
        """
        kept = self._nearest(base_text, min(len(self), top_k * pool))
        fits, taste = scale * (self.base[kept] @ base_text), scale * (self.adapted[kept] @ taste_text)
        taste = taste - taste.mean()
        order = (fits + taste_weight * taste).argsort(descending=True, stable=True)[:top_k]
        return [
            Found(int(kept[place]), self.names[int(kept[place])], float(fits[place]), float(taste[place]))
            for place in order.tolist()
        ]

    def _nearest(self, text: torch.Tensor, count: int) -> torch.Tensor:
        """Return the places of the `count` images with the largest inner products, in ascending order."""
        if self._index is None:
            return (self.base @ text).topk(count).indices.sort().values
        _, places = self._index.search(text[None].float().cpu().numpy(), count)
        return torch.from_numpy(places[0]).sort().values

    @cached_property
    def _index(self) -> Any:
        """Index of the base's embeddings, or `None` for a small library or without FAISS."""
        if len(self) < INDEXED_FROM or importlib.util.find_spec("faiss") is None:
            return None
        import faiss

        index = faiss.IndexFlatIP(self.base.shape[1])
        index.add(self.base.numpy())
        return index
