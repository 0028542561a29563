"""Library of images whose embeddings are computed once: found by caption, ordered by taste."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk

# Images that the base retrieves for each that is asked for; taste orders these.
POOL = 4


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

    Args:
        names: M names, such as file names.
        base: (M, D) normalised float32 embeddings of the base.
        adapted: (M, D) those of the adapted model.
        model: Digest of the model that embedded them.

    Example:
        ```python
        library = scorer.index("my-photos/")
        library.save("my-library")
        scorer.search("a red apple", ImageLibrary.load("my-library"), top_k=5)
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
        width = self.base.shape[1] if len(self) else -1
        vector = List(Value("float32"), length=width)
        features = Features({"name": Value("string"), "base": vector, "adapted": vector})
        columns = {"name": self.names, "base": self.base.numpy(), "adapted": self.adapted.numpy()}
        rows = Dataset.from_dict(columns, features=features)
        rows.info.description = self.model
        rows.save_to_disk(str(folder))

    @classmethod
    def load(cls, folder: str | Path) -> "ImageLibrary":
        """Load a saved library.

        Raises:
            ValueError: The folder is not one.
        """
        try:
            rows = load_from_disk(str(folder))
        except FileNotFoundError as error:
            raise ValueError(f"{folder} does not hold a library: save one with `scorer.index(images).save(...)`.") from error
        if not isinstance(rows, Dataset) or set(rows.column_names) != {"name", "base", "adapted"}:
            raise ValueError(f"{folder} holds a dataset of another kind, not a library of `scorer.index`.")
        table = rows.with_format("numpy")
        base, adapted = (torch.from_numpy(np.asarray(table[name][:], dtype=np.float32)) for name in ("base", "adapted"))
        return cls(list(rows["name"]), base, adapted, rows.info.description)

    def search(
        self, base_text: torch.Tensor, adapted_text: torch.Tensor, scale: float, top_k: int, pool: int = POOL
    ) -> list[Found]:
        """Return the images that fit a prompt, those that the person likes first.

        Args:
            base_text, adapted_text: (D,) embeddings of the prompt, without and with the adapter.
            scale: exp(logit_scale).
            top_k: Images to return.
            pool: Candidates for each of them.
        """
        caption = scale * (self.base @ base_text)  # (M,)
        kept = caption.topk(min(len(self), top_k * pool)).indices
        fits = caption[kept]
        taste = scale * (self.adapted[kept] @ adapted_text) - fits
        order = (fits + _bounded(taste, fits)).argsort(descending=True, stable=True)[:top_k]
        taste = taste - taste.mean()
        return [
            Found(int(kept[i]), self.names[int(kept[i])], float(fits[i]), float(taste[i])) for i in order.tolist()
        ]
