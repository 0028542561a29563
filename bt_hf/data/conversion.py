"""Conversion of rows of a known format to pairs of the contract, not yet checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from bt_hf.data.formats import (
    DEFAULTS,
    NOTES,
    ROW,
    ROW_COLUMNS,
    ROWS,
    SHARD,
    Layout,
    PreferenceDataError,
    is_kind,
    prompt_column,
)
from bt_hf.data.images import short
from bt_hf.data.judgements import Judgement, identity
from bt_hf.data.places import IMAGE, PROBLEM, Place, encode_or_problem, scratch_file, store_images


def to_pairs(
    dataset: Dataset | IterableDataset, features: Features, layout: Layout, place: Place, num_proc: int | None
) -> Dataset | IterableDataset:
    """Turns rows of a layout into unchecked pairs: the contract's columns, plain extra ones, and maybe `NOTES`."""
    extras = {
        name: feature
        for name, feature in features.items()
        if isinstance(feature, Value) and feature.dtype != "null" and "binary" not in feature.dtype
        if name not in layout.kinds and name not in (*ROW_COLUMNS, *NOTES) and layout.group in (None, name)
    }
    images, floats = dict.fromkeys(["chosen", "rejected"], IMAGE), dict.fromkeys(DEFAULTS, Value("float64"))
    rewritten = Features({"prompt": Value("string")} | images | floats | extras | NOTES)
    expand = {"convert": layout.convert, "extras": tuple(extras), "place": place}
    options = {
        "with_indices": True,
        "batched": True,
        "remove_columns": list(features),
        "features": rewritten,
        "fn_kwargs": expand,
    }
    if isinstance(dataset, IterableDataset):
        if layout.group:
            arguments = expand | {"dataset": dataset, "columns": (layout.group, *layout.kinds)}
            arguments["judgement"] = layout.judgement
            return IterableDataset.from_generator(_stream_groups, features=rewritten, gen_kwargs=arguments)
        return dataset.map(_expand, batch_size=1, **options)  # nothing is read ahead of the row that is asked for
    if layout.group:
        return _join_groups(dataset, layout, place, rewritten, num_proc)
    if layout.in_place:
        return _in_place(dataset, layout, place, num_proc)
    # The default writer batch would keep the images of a thousand rows in memory.
    sizes = {"batch_size": 16, "writer_batch_size": 64}
    return dataset.map(
        _expand,
        num_proc=num_proc,
        desc="Making pairs",
        load_from_cache_file=False,
        cache_file_name=scratch_file(dataset),
        **sizes,
        **options,
    )


def _in_place(dataset: Dataset, layout: Layout, place: Place, num_proc: int | None) -> Dataset:
    """Rows that already are pairs: renamed and completed, their images not copied."""
    names = list(layout.kinds)[:3]
    dataset = store_images(dataset, names[1:], place, num_proc)
    for source, target in zip(names, ROW_COLUMNS[:3], strict=True):
        if source != target:
            dataset = dataset.remove_columns([target] if target in dataset.column_names else [])
            dataset = dataset.rename_column(source, target)
    for name, default in DEFAULTS.items():
        if dataset.features.get(name) != Value("float64"):
            values = dataset[name] if name in dataset.features else [default] * len(dataset)
            values = [None if value is None else float(value) for value in values]
            dataset = dataset.remove_columns([name] if name in dataset.features else [])
            dataset = dataset.add_column(name, values, feature=Value("float64"))
    return dataset


def _expand(
    batch: dict[str, list], indices: list[int], convert: Callable, extras: tuple[str, ...], place: Place
) -> dict[str, list]:
    """Convert a batch of rows of some layout to a batch of pairs."""
    pairs = []
    for position, index in enumerate(indices):
        row = {name: values[position] for name, values in batch.items()}
        kept = {name: row[name] for name in extras} | {ROW: row.get(ROW, index), SHARD: row.get(SHARD)}
        known: dict[Any, Any] = {}  # a ranking has each image in several pairs
        for pair in _pairs_of(row, convert):
            for name in ("chosen", "rejected"):
                key = id(pair[name])
                if key not in known:
                    known[key] = encode_or_problem(pair[name], name, place)
                pair[name], problem = known[key]
                pair[PROBLEM] = pair[PROBLEM] or problem
            pairs.append(kept | pair)
    return {name: [pair[name] for pair in pairs] for name in (*ROW_COLUMNS, *extras, *NOTES)}


def _pairs_of(row: dict[str, Any], convert: Callable) -> list[dict[str, Any]]:
    """Convert one row to pairs; a problem travels in `_problem` to where bad rows raise or are dropped."""
    blank = dict.fromkeys(ROW_COLUMNS) | DEFAULTS | {PROBLEM: row.get(PROBLEM)}
    if blank[PROBLEM]:
        return [blank]
    try:
        pairs = [blank | pair for pair in convert(row)]
    except ValueError as error:
        return [blank | {PROBLEM: str(error)}]
    for pair in pairs:
        if not isinstance(pair["prompt"], str):
            pair |= {"prompt": None, PROBLEM: f"prompt is not text: found {short(pair['prompt'])}"}
    return pairs


def _join_groups(dataset: Dataset, layout: Layout, place: Place, features: Features, num_proc: int | None) -> Dataset:
    """Rows of one image each -> pairs: the images of the chosen rows beside those of the rejected rows."""
    prompt, images, ranks = layout.kinds
    dataset = store_images(dataset, [images], place, num_proc)
    problems: dict[int, str | None] = dict.fromkeys(range(len(dataset)))
    problems |= dict(enumerate(dataset[PROBLEM] if PROBLEM in dataset.column_names else []))
    light = dataset.select_columns(sorted(name for name in {prompt, ranks, layout.group} if name is not None))
    groups: dict[tuple, list[int]] = {}  # by the prompt too, for identifiers that are empty or used twice
    for row, key in enumerate(zip(light[layout.group], light[prompt], strict=True)):
        groups.setdefault(key, []).append(row)
    blank = dict.fromkeys(features) | DEFAULTS
    pairs: list[dict[str, Any]] = []
    judged, numbers = list(light[ranks]), range(len(dataset))
    batches = dataset.select_columns([images]).iter(256)
    pictures = [identity(image) for batch in batches for image in batch[images]]  # not all of their bytes at once
    for (key, text), members in groups.items():
        _note_bad_members(problems, members, judged, pictures, layout.judgement, numbers)
        pairs += [blank | {ROW: row, PROBLEM: problems[row]} for row in members if problems[row]]
        rows = [row for row in members if not problems[row]]
        ranking = {prompt: text, images: rows, ranks: [judged[row] for row in rows], ROWS: rows}
        named = {layout.group: key} if layout.group != prompt else {}
        # Here an image is the number of its row.
        pairs += [blank | {ROW: members[0]} | pair | named for pair in _pairs_of(ranking, layout.convert)]
    plain = Features({name: feature for name, feature in features.items() if name not in ("chosen", "rejected")})
    columns = [Dataset.from_dict({name: [pair[name] for pair in pairs] for name in plain}, features=plain)]
    dataset = dataset.select_columns([images])
    for name in ("chosen", "rejected"):
        rows = [pair[ROW] if pair[name] is None else pair[name] for pair in pairs]
        columns.append(dataset.select(rows).rename_column(images, name))
    return concatenate_datasets(columns, axis=1)


def _note_bad_members(
    problems: dict[int, str | None],
    members: Iterable[int],
    judged: Sequence,
    identities: Sequence,
    judgement: Judgement | None,
    numbers: Sequence[int],
) -> None:
    """Note what is wrong with single images of a group, whose others stay: their judgements, or the image again."""
    first: dict[Any, int] = {}
    for row in members:
        try:
            if problems[row] is None and judgement is not None:
                judgement.value(judged[row])
        except ValueError as error:
            problems[row] = str(error)
        key = identities[row]
        if problems[row] is None and key is not None and first.setdefault(key, row) != row:
            problems[row] = (
                f"image twice: row {numbers[first[key]]} has the same image for the same prompt; judge it once, or "
                "give each person's rows a 'prompt_id' of their own"
            )


def _stream_groups(
    dataset: IterableDataset,
    columns: tuple[str, ...],
    convert: Callable,
    extras: tuple[str, ...],
    place: Place,
    judgement: Judgement,
) -> Iterator[dict[str, Any]]:
    """Join groups of a stream, which holds the images of one prompt at a time."""
    group, prompt, images, ranks = columns
    blank = dict.fromkeys([*ROW_COLUMNS, *extras, *NOTES]) | DEFAULTS
    seen: set[tuple] = set()
    # `iter`, unlike iterating, does not split among the workers of a DataLoader: here one of them reads all.
    plain = ({name: values[0] for name, values in batch.items()} for batch in dataset.iter(batch_size=1))
    for key, run in itertools.groupby(enumerate(plain), key=lambda item: (item[1][group], item[1][prompt])):
        members = [(row.get(ROW, index), row) for index, row in run]
        first, shard = members[0][0], members[0][1].get(SHARD)
        if key in seen:
            raise PreferenceDataError(
                f"row {first}{f' of {shard}' if shard else ''}: {group} {short(key[0])} comes again after others; in "
                "a stream the images of a prompt must be neighbours: sort the data, or load it with streaming=False"
            )
        seen.add(key)
        # By their positions here: a prompt may go on in another file, where rows are numbered from 0 again.
        problems = {position: row.get(PROBLEM) for position, (_, row) in enumerate(members)}
        judged, pictures = [row[ranks] for _, row in members], [identity(row[images]) for _, row in members]
        _note_bad_members(problems, problems, judged, pictures, judgement, [number for number, _ in members])
        for position, problem in problems.items():
            number, row = members[position]
            if problem:
                yield blank | {ROW: number, SHARD: row.get(SHARD), PROBLEM: problem}
        good = [member for position, member in enumerate(members) if not problems[position]]
        ranking: dict[str, Any] = {name: [row[name] for _, row in good] for name in (images, ranks)}
        ranking |= {group: key[0], prompt: key[1], ROWS: [number for number, _ in good], SHARD: shard}
        batch = _expand({name: [value] for name, value in ranking.items()}, [first], convert, extras, place)
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def with_prompt(dataset: Dataset | IterableDataset, features: Features, prompt: str) -> Dataset | IterableDataset:
    """Give a prompt to the rows that have none: a column if there is none, else where a row is empty."""
    name = prompt_column(features)
    if isinstance(dataset, IterableDataset):
        return dataset.map(
            _fill_prompt,
            fn_kwargs={"name": name, "prompt": prompt},
            features=Features(features | {name: Value("string")}),
        )
    if name in features and not is_kind(features[name], "text"):
        return dataset
    values = list(dataset[name]) if name in features else [None] * len(dataset)
    values = [value if (value or "").strip() else prompt for value in values]
    return dataset.remove_columns([name] if name in features else []).add_column(name, values, feature=Value("string"))


def _fill_prompt(row: dict[str, Any], name: str, prompt: str) -> dict[str, Any]:
    value = row.get(name)
    return {name: prompt if value is None or (isinstance(value, str) and not value.strip()) else value}


def place_images(dataset: Dataset | IterableDataset, name: str, place: Place, label: str) -> Any:
    """Return rows of single images whose column `name` is `IMAGE`, in its place.

    Raises:
        PreferenceDataError: An image may not be read from where it is; of a stream, when its row is read.
    """
    if isinstance(dataset, IterableDataset):
        features = Features((dataset.features or {}) | {name: IMAGE}) if dataset.features else None
        return dataset.map(lambda value: {name: place.encode(value)}, input_columns=name, features=features)
    dataset = store_images(dataset, [name], place, None)
    if PROBLEM not in dataset.column_names:
        return dataset
    for row, problem in enumerate(dataset[PROBLEM]):
        if problem:
            raise PreferenceDataError(f"row {row} of {label}: {problem}; fix the row, or leave it out")
    return dataset.remove_columns(PROBLEM)
