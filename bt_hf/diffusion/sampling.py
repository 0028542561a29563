"""Draw images with a pipeline and let a reward judge them: preference pairs, or simply the best of several."""

import inspect
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from tqdm.auto import tqdm

from bt_hf.diffusion.fingerprint import describe, digest, digest_weights
from bt_hf.diffusion.pair_folder import ADVICE, PairFolder, counted

logger = logging.getLogger(__name__)

# Set here for each image, so nobody else may set them.
_TAKEN = (
    *("generator", "latents", "num_images_per_prompt", "output_type", "prompt", "prompt_embeds"),
    *("pooled_prompt_embeds", "return_dict"),
)
_Skip: TypeAlias = Literal["skip", "raise"]


class Scorer(Protocol):
    """What judges images: `PreferenceScorer`, or anything of your own with this method."""

    def score(self, prompts: Any, images: Any) -> torch.Tensor:
        """(N,) rewards of N images, each for its prompt; the larger the better."""


@dataclass(frozen=True)
class Candidate:
    """An image that a pipeline drew, or what was wrong with it; its reward is set once it has one."""

    seed: int
    image: PILImage.Image | None
    problem: str | None = None
    reward: float = float("nan")


def generate_preference_pairs(
    pipeline: Any,
    prompts: Sequence[str],
    scorer: Scorer,
    candidates: int = 4,
    pairs_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    output_dir: str | os.PathLike | None = None,
    on_bad_images: Literal["skip", "raise"] = "skip",
    soft_labels: bool = False,
    **pipeline_kwargs: Any,
) -> Dataset:
    """Draws several images for each prompt, ranks them with a reward, and pairs the best with the worst.

    With `pairs_per_prompt=2` the second best also meets the second worst, and so on. Each image has a seed of its own,
    which follows from `seed`, the place of its prompt and its own place, so that the batch size decides how fast it
    goes, not what is drawn (up to rounding). A pair is left out if its rewards are equal or its images identical.
    Images that are not finite or of one colour (a safety checker returns black ones) are left out, and a prompt with
    fewer than two others is dropped; one warning at the end counts all of these.

    Args:
        pipeline: A text-to-image `DiffusionPipeline`, where it is, or its Hub id or folder: a GPU is used then if
            there is one.
        prompts: What to draw, one or more pairs for each.
        scorer: `PreferenceScorer`, or anything with `score(prompts, images) -> (N,)` rewards.
        candidates: Images for each prompt, at least 2 `pairs_per_prompt`.
        pairs_per_prompt: Pairs for each prompt.
        seed: Other seeds give other images.
        batch_size: Images that are drawn at a time.
        output_dir: Folder for the pairs, which `load_preference_pairs` reads. Each prompt is kept as it is finished,
            and a call with the same settings goes on where one was stopped. Default: only in memory.
        on_bad_images: "skip" leaves bad images out and counts them; "raise" stops at the first.
        soft_labels: Whether `preference` is the scorer's sigmoid(reward difference) instead of 1.
        pipeline_kwargs: For the pipeline's call, such as `num_inference_steps` and `guidance_scale`. A text like
            `negative_prompt` counts for every image.

    Returns:
        A `datasets.Dataset` in the row contract: `prompt`, `chosen`, `rejected`, `preference`, and also `chosen_seed`,
        `rejected_seed` (int64; `torch.Generator().manual_seed` draws the image again), `chosen_reward` and
        `rejected_reward` (float32).

    Raises:
        TypeError: `pipeline` can't be called or `scorer` has no `score`.
        ValueError: A number is out of range, the pipeline has no such option or it is set here, `output_dir` was begun
            with other settings, or there is no usable pair.

    Example:
        ```python
        from bt_hf import PreferenceScorer, generate_preference_pairs

        scorer = PreferenceScorer.from_pretrained("my-taste")
        prompts = ["a red apple", "a house by the sea"]
        pairs = generate_preference_pairs("stable-diffusion-v1-5/stable-diffusion-v1-5", prompts, scorer)
        ```
    """
    prompts = _checked_prompts(prompts)
    _check_number("pairs_per_prompt", pairs_per_prompt, 1)
    _check_number("candidates", candidates, 2)
    _check_number("batch_size", batch_size, 1)
    if candidates < 2 * pairs_per_prompt:
        raise ValueError(
            f"`candidates` should be at least twice `pairs_per_prompt` = {pairs_per_prompt}, as each image is in one "
            f"pair, but got {candidates}."
        )
    _check_options(scorer, on_bad_images, pipeline_kwargs)
    pipeline = _loaded(pipeline, pipeline_kwargs)
    keep = PairFolder(output_dir)
    keep.begin(
        {
            "pipeline": _name(pipeline),
            "scheduler": describe(getattr(pipeline, "scheduler", None)),
            "pipeline_weights": digest_weights(getattr(pipeline, "components", {}).values()),
            "scorer": f"{type(scorer).__name__} {digest_weights([scorer, *getattr(scorer, '__dict__', {}).values()])}",
            "prompts": f"{len(prompts)} ({digest(*prompts)})",
            "candidates": candidates,
            "pairs_per_prompt": pairs_per_prompt,
            "seed": seed,
            "soft_labels": soft_labels,
            "options": describe(pipeline_kwargs),
        }
    )
    # Groups of prompts fill a batch. They are the same ones when a run goes on, so that not even rounding differs.
    group = max(1, batch_size // candidates)
    bar = tqdm(total=len(prompts), initial=min(len(keep.finished), len(prompts)), desc="Drawing pairs", unit="prompt")
    with bar, _quiet(pipeline):
        for start in range(0, len(prompts), group):
            places = range(start, min(start + group, len(prompts)))
            if all(place in keep.finished for place in places):
                continue
            drawn = draw(
                pipeline,
                [prompts[place] for place in places for _ in range(candidates)],
                [image_seed(seed, place, index) for place in places for index in range(candidates)],
                batch_size,
                **pipeline_kwargs,
            )
            drawn = judge(
                scorer, [prompts[place] for place in places for _ in range(candidates)], drawn, on_bad_images
            )
            for number, place in enumerate(places):
                if place not in keep.finished:
                    own = drawn[number * candidates : (number + 1) * candidates]
                    keep.add(place, prompts[place], *pair_up(own, pairs_per_prompt, soft_labels))
                    bar.update()
    return keep.end()


def best_of_n(
    pipeline: Any,
    prompt: str,
    scorer: Scorer,
    candidates: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    **pipeline_kwargs: Any,
) -> tuple[PILImage.Image, list[tuple[PILImage.Image, float, int]]]:
    """Draws several images for a prompt and returns the one that a reward likes best: taste without training.

    Args:
        pipeline: As in `generate_preference_pairs`.
        prompt: What to draw.
        scorer: `PreferenceScorer`, or anything with `score(prompts, images) -> (N,)` rewards.
        candidates: Images to choose from.
        seed: Other seeds give other images.
        batch_size: Images that are drawn at a time.
        pipeline_kwargs: For the pipeline's call.

    Returns:
        The best image, and all usable ones as (image, reward, seed), best first. `torch.Generator().manual_seed(seed)`
        draws an image again.

    Raises:
        TypeError: `pipeline` can't be called or `scorer` has no `score`.
        ValueError: The prompt is empty, a number is out of range, the pipeline has no such option or it is set here,
            or no image is usable.

    Example:
        ```python
        image, ranking = best_of_n(pipeline, "a red apple", PreferenceScorer.from_pretrained("my-taste"))
        ```
    """
    if not isinstance(prompt, str):
        raise ValueError(f"`prompt` should be a text, but got {type(prompt).__name__}.")
    (prompt,) = _checked_prompts([prompt])
    _check_number("candidates", candidates, 1)
    _check_number("batch_size", batch_size, 1)
    _check_options(scorer, "skip", pipeline_kwargs)
    pipeline = _loaded(pipeline, pipeline_kwargs)
    seeds = [image_seed(seed, 0, index) for index in range(candidates)]
    with _quiet(pipeline):
        drawn = draw(pipeline, [prompt] * candidates, seeds, batch_size, **pipeline_kwargs)
    ranking = ranked(judge(scorer, [prompt] * candidates, drawn, "skip"))
    if not ranking:
        raise ValueError(f"None of {candidates} images is usable ({counted(_problems(drawn))}). {ADVICE}")
    return ranking[0][0], ranking


# --- Steps ---


def image_seed(seed: int, place: int, index: int) -> int:
    """The seed of one image, 32 bits that look random: no two images of a run share one but by chance."""
    return int(digest(str(seed), str(place), str(index))[:8], 16)


def draw(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, **pipeline_kwargs: Any
) -> list[Candidate]:
    """Draws one image for each prompt and seed, which alone decides what comes out, whatever it is drawn beside.

    Raises:
        ValueError: The pipeline returns something else than one RGB image for each prompt.
    """
    drawn: list[Candidate] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        # On the CPU, so that a seed draws the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
        # A pipeline takes one text for each prompt, or refuses: "negative_prompt", "prompt_2", ...
        options = {
            name: [value] * len(chunk) if isinstance(value, str) and "prompt" in name else value
            for name, value in pipeline_kwargs.items()
        }
        # As floats: images of PIL do not tell NaN from black.
        images = np.asarray(pipeline(prompt=chunk, generator=generators, output_type="np", **options).images)
        if images.ndim != 4 or images.shape[0] != len(chunk) or images.shape[3] != 3:
            raise ValueError(
                f"Expected {len(chunk)} RGB images (N, H, W, 3) from {type(pipeline).__name__}, but got an array of "
                f"shape {images.shape}: use a text-to-image pipeline."
            )
        drawn += [
            _candidate(seed, image) for seed, image in zip(seeds[start : start + batch_size], images, strict=True)
        ]
    return drawn


def _candidate(seed: int, pixels: np.ndarray) -> Candidate:
    """Pixels (H, W, 3) in [0, 1] as an image, or what is wrong with them."""
    if not np.isfinite(pixels).all():
        return Candidate(seed, None, "not finite")
    rounded = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    if (rounded == rounded[0, 0]).all():
        return Candidate(seed, None, "of one colour")
    return Candidate(seed, PILImage.fromarray(rounded))


def judge(scorer: Scorer, prompts: Sequence[str], drawn: Sequence[Candidate], on_bad_images: _Skip) -> list[Candidate]:
    """The same candidates with rewards.

    Raises:
        ValueError: An image is bad and `on_bad_images` is "raise", or the rewards are not N finite numbers.
    """
    bad = next(((prompt, one) for prompt, one in zip(prompts, drawn, strict=True) if one.image is None), None)
    if bad is not None and on_bad_images == "raise":
        raise ValueError(
            f"The image for {bad[0]!r} with seed {bad[1].seed} is {bad[1].problem}. {ADVICE} "
            "Or leave such images out with on_bad_images='skip'."
        )
    good = [place for place, one in enumerate(drawn) if one.image is not None]
    if not good:
        return list(drawn)
    given = scorer.score([prompts[place] for place in good], [drawn[place].image for place in good])
    rewards = torch.as_tensor(given).detach().to("cpu", torch.float32)
    if rewards.shape != (len(good),) or not rewards.isfinite().all():
        raise ValueError(
            f"`scorer.score` should give {len(good)} finite rewards, one for each image, but gave "
            f"{'some that are not finite' if rewards.shape == (len(good),) else f'shape {tuple(rewards.shape)}'}."
        )
    found = dict(zip(good, rewards.tolist(), strict=True))
    return [replace(one, reward=found[place]) if place in found else one for place, one in enumerate(drawn)]


def ranked(drawn: Iterable[Candidate]) -> list[tuple[PILImage.Image, float, int]]:
    """The usable candidates as (image, reward, seed), best first; of equal ones the first drawn."""
    usable = [(one.image, one.reward, one.seed) for one in drawn if one.image is not None]
    return sorted(usable, key=lambda one: -one[1])


def pair_up(drawn: Sequence[Candidate], pairs: int, soft_labels: bool) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The best with the worst of one prompt's candidates, the second best with the second worst, and so on.

    Returns:
        Rows without the prompt, and counts of what was left out.
    """
    skipped = _problems(drawn)
    ranking = ranked(drawn)
    if len(ranking) < 2:
        skipped["prompts with fewer than 2 usable images"] += 1
        return [], skipped
    rows = []
    for place in range(min(pairs, len(ranking) // 2)):
        (chosen, more, chosen_seed), (rejected, less, rejected_seed) = ranking[place], ranking[-1 - place]
        if more == less:
            skipped["pairs of equal rewards"] += 1
        elif chosen.tobytes() == rejected.tobytes() and chosen.size == rejected.size:
            skipped["pairs of identical images"] += 1
        else:
            probability = torch.sigmoid(torch.tensor(more - less, dtype=torch.double)).item()
            rows.append(
                {
                    "chosen": chosen,
                    "rejected": rejected,
                    "preference": probability if soft_labels else 1.0,
                    "chosen_seed": chosen_seed,
                    "rejected_seed": rejected_seed,
                    "chosen_reward": more,
                    "rejected_reward": less,
                }
            )
    return rows, skipped


def _problems(drawn: Iterable[Candidate]) -> Counter[str]:
    return Counter(f"images {one.problem}" for one in drawn if one.problem)


# --- Checks, and the pipeline ---


def _name(pipeline: Any) -> str:
    """Class and Hub id; of a folder only its last name, as the folder of pairs may be published."""
    name = str(getattr(pipeline, "name_or_path", "") or "")
    return (
        f"{type(pipeline).__name__} {Path(name).name if os.path.isabs(name) or os.path.exists(name) else name}".strip()
    )


def _checked_prompts(prompts: Any) -> list[str]:
    if isinstance(prompts, str):
        raise ValueError("`prompts` should be a list of texts, but got a single one: put it into a list.")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("`prompts` should hold at least one prompt, but it is empty.")
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"`prompts` should hold texts that are not empty, but number {place} is {prompt!r}.")
    return prompts


def _check_number(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` should be a whole number of at least {least}, but got {value!r}.")


def _check_options(scorer: Any, on_bad_images: str, pipeline_kwargs: Mapping[str, Any]) -> None:
    if not callable(getattr(scorer, "score", None)):
        raise TypeError(
            "`scorer` should have a method `score(prompts, images)`, as `PreferenceScorer` has, but got "
            f"{type(scorer).__name__}."
        )
    if on_bad_images not in ("skip", "raise"):
        raise ValueError(f"`on_bad_images` should be 'skip' or 'raise', but got {on_bad_images!r}.")
    taken = [name for name in pipeline_kwargs if name in _TAKEN]
    if taken:
        raise ValueError(
            f"The options {', '.join(taken)} of the pipeline are set here for each image, so leave them out. Images "
            "follow from `seed`; there are `candidates` for each prompt."
        )


def _loaded(pipeline: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(pipeline, (str, os.PathLike)):
        from bt_hf.diffusion.loading import from_pretrained

        pipeline = from_pretrained(os.fspath(pipeline))
        pipeline = pipeline.to("cuda") if torch.cuda.is_available() else pipeline
    if not callable(pipeline):
        raise TypeError(
            "`pipeline` should be a text-to-image pipeline of diffusers, its Hub id or its folder, but got "
            f"{type(pipeline).__name__}."
        )
    known = inspect.signature(pipeline).parameters
    unknown = [name for name in options if name not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(
            f"{type(pipeline).__name__} takes no {', '.join(unknown)}: leave it out. Not every pipeline has every "
            "option; those of FLUX.2 have no `negative_prompt`, for example."
        )
    return pipeline


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """No progress bar of the pipeline itself: there is one over the prompts."""
    config = getattr(pipeline, "_progress_bar_config", None)
    if not hasattr(pipeline, "set_progress_bar_config"):
        yield
        return
    pipeline.set_progress_bar_config(**{**(config or {}), "disable": True})
    try:
        yield
    finally:
        if config is None:
            del pipeline._progress_bar_config
        else:
            pipeline.set_progress_bar_config(**config)
