"""Row contract: every known kind of preference data becomes one kind of row, checked before training.

| column | type | meaning |
| --- | --- | --- |
| `prompt` | string | what was asked |
| `chosen`, `rejected` | image | the preferred and the other one |
| `preference` | float in [0, 1], default 1.0 | P(chosen preferred over rejected); 0.5 is a tie |
| `weight` | float >= 0, default 1.0 | how much the pair counts |
"""

from __future__ import annotations

import os
from typing import Literal

from datasets import Dataset, Image, IterableDataset

from bt_hf.data.checks import check_pairs, check_stream
from bt_hf.data.conversion import to_pairs, with_prompt
from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.images import short
from bt_hf.data.judged_folders import with_judgements_of_labels
from bt_hf.data.reading import features_of, open_dataset
from bt_hf.data.recognition import recognise
from bt_hf.data.rows import undecoded
from bt_hf.data.survey import survey
from bt_hf.data.urls import AllowUrls


def load_preference_pairs(
    source: str | os.PathLike | Dataset | IterableDataset | dict,
    split: str | None = None,
    streaming: bool = False,
    on_bad_rows: Literal["raise", "drop"] = "raise",
    num_proc: int | None = None,
    allow_urls: AllowUrls = False,
    default_prompt: str | None = None,
) -> Dataset | IterableDataset:
    """Load preference data of any known kind as checked rows of the contract above.

    The kind is told by the columns:

    - `prompt, chosen, rejected` (and `preference`, `weight`): the contract itself, TRL's preference format,
      `data-is-better-together/open-image-preferences-v1-binarized`; also with `chosen_file_name`,
      `rejected_file_name`, or `img_better`, `img_worse` (ImageRewardDB).
    - `caption, jpg_0, jpg_1, label_0, label_1, has_label`: Pick-a-Pic v1 and v2. The larger label is chosen and is
      the preference (0.5 for a tie); rows where `has_label` is false are left out.
    - `prompt, image_path, human_preference` (both lists): HPDv2. Each preferred image against each other one.

    Several images of a prompt may be judged in lists of a row, or with one image a row, which are grouped by
    `prompt_id` (else by the prompt). The name of the column tells how it is read, a log line repeats it, and values
    that contradict the name (stars called `rank`) are refused or warned of, never reversed:

    - `rating`, `ratings`, `rating_value`, `user_rating`: a number >= 0, larger is better. `stars`, `star_rating`: the
      same, from 0 to 5. `score`, `scores`, `likes`: any finite number.
    - `liked`, `like`, `is_liked`: true or false, 1 or 0, "like" or "dislike", "yes" or "no". Each liked image against
      each disliked one.
    - `rank`, `ranking`: numbers, 1 is the best and equal ranks are ties, as in ImageRewardDB or HPDv2's test set; or,
      in a list, the file names of all images, the best first.
    - `best`, `best_index`, `best_image`: beside a list of images the index (from 0) or the file name of the best one,
      against each other one; with one image a row as `liked`.

    The image column may also be called `images`, `image_path`, `image_paths`, `file_path`, `file_name` or
    `file_names`, and of these the prompt `caption` or `text`. Folders called `liked` and `disliked` (or `like`,
    `dislike`, `good`, `bad`), or `1` to `5` (`5 stars`), judge the images in them, also as the `label` that
    `imagefolder` makes of them. Their prompts stand in `metadata.csv`, or in `x.txt` beside `x.png`, or are the
    `default_prompt`.

    Each image is paired with those judged lower; equal ones make no pair. An image above m others is one choice among
    m + 1 (Plackett 1975), so each of its m pairs gets the weight 1/m: the weights of a prompt sum to the number of
    images that are above any. Of more than 16 lower ones it meets 16, evenly spread.

    A loaded dataset is checked in full before it is returned, two decoded images at a time; a stream is checked row
    by row as it is read, its columns at once. Pairs are not copied and keep all extra columns; where rows are
    rewritten (other layouts, and streams) extra columns of plain values stay, and of a ranking with one image a row
    only `prompt_id`. Rankings of embedded images repeat them in each pair.

    Args:
        source: A Hub id; a CSV, TSV, JSON, JSONL or Parquet file, or a folder with such a file called `metadata`
            (image paths start from there); a folder written by `save_to_disk` or otherwise known to
            `datasets.load_dataset`; a loaded dataset, or a `DatasetDict`.
        split: The split, with the slices of `datasets` where it loads ("train[:100]"). Default: the only split, else
            "train".
        streaming: Return an `IterableDataset` that reads rows as they are asked for. A loaded `IterableDataset` stays
            one either way. Here the images of one prompt must be neighbours if each has its own row. Files are
            Parquet, or WebDataset with members such as `1.chosen.jpg`, `1.rejected.jpg`, and `1.prompt.txt` or
            `1.json`. They go to processes and workers as a whole where their number is a multiple of the processes, so
            make many. Rows come in their own order, unless you go on with `.shuffle(seed, buffer_size)`.
        on_bad_rows: "raise" stops at the first bad row. "drop" leaves bad rows out and warns with the count of each
            reason (a stream: at the first of each reason). Of a stream, a file that can't be read is the same.
        num_proc: Processes for the work on a loaded dataset. Default: this one.
        allow_urls: Fetch images that rows name by `http://` and `https://` addresses: `True` from public servers,
            "private" also from your own network. Default: such rows are bad ones. Other addresses always are.
        default_prompt: The prompt of rows that have none. Default: such rows are bad ones.

    Returns:
        A `datasets.Dataset` (or `IterableDataset`) with the columns `prompt` (string), `chosen`, `rejected`
        (`datasets.Image`), `preference`, `weight` (float64) and the extra columns.

    Raises:
        PreferenceDataError: A `ValueError` with a one-line message: missing or mistyped columns, an unknown split, no
            rows or no labelled ones, or a bad row: a prompt that is empty or not text, an image that is missing,
            unreadable or too large, two identical images, a preference outside [0, 1], a negative weight, a rating
            out of range, a ranking of an unknown image, an image twice in one prompt. Of a stream, a file that can't
            be read. Names the file and the row. Or no image is judged higher than another, or most "ranks" are none.
        UnreachableError: A `ConnectionError`: with `allow_urls`, a server does not answer. No row is dropped for that.

    Example:
        >>> from PIL import Image as PILImage
        >>> red, blue = PILImage.new("RGB", (8, 8), "red"), PILImage.new("RGB", (8, 8), "blue")
        >>> rows = Dataset.from_dict({"prompt": ["a flag"], "chosen": [red], "rejected": [blue]})
        >>> load_preference_pairs(rows)[0]["preference"]
        1.0
        >>> rows = Dataset.from_dict({"prompt": ["a flag"] * 2, "image": [red, blue], "stars": [2, 5]})
        >>> load_preference_pairs(rows)[0]["chosen"].getpixel((0, 0))
        (0, 0, 255)
    """
    if on_bad_rows not in ("raise", "drop"):
        raise PreferenceDataError(f"on_bad_rows must be 'raise' or 'drop', found {on_bad_rows!r}")
    if allow_urls not in (True, False, "private"):
        raise PreferenceDataError(f"allow_urls must be False, True or 'private', found {short(allow_urls)}")
    if default_prompt is not None and not (isinstance(default_prompt, str) and default_prompt.strip()):
        raise PreferenceDataError(f"default_prompt must be a text, found {short(default_prompt)}")
    dataset, place, label = open_dataset(source, split, streaming, on_bad_rows, allow_urls)
    dataset = with_judgements_of_labels(undecoded(dataset))
    features = features_of(dataset, label)
    if default_prompt is not None:
        dataset = with_prompt(dataset, features, default_prompt)
        features = features_of(dataset, label)
    layout = recognise(dataset, features, label, place.table)
    survey(dataset, layout, label)
    pairs = to_pairs(dataset, features, layout, place, num_proc)
    check = check_stream if isinstance(pairs, IterableDataset) else check_pairs
    pairs = check(pairs, layout, label, on_bad_rows, num_proc)
    for name in ("chosen", "rejected"):
        pairs = pairs.cast_column(name, Image())
    return pairs
