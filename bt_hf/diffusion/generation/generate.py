"""Draw images with a pipeline and let a reward judge them: preference pairs, or simply the best of several."""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from PIL import Image as PILImage
from tqdm.auto import tqdm

from bt_hf.data.fingerprint import describe, digest, digest_weights
from bt_hf.diffusion.generation.candidates import Scorer, draw, image_seed, judge, pair_up, problems, ranked
from bt_hf.diffusion.generation.pair_folder import ADVICE, PairFolder, counted

# Set here for each image, so nobody else may set them.
_TAKEN = (
    *("generator", "latents", "num_images_per_prompt", "output_type", "prompt", "prompt_embeds"),
    *("pooled_prompt_embeds", "return_dict"),
)


def generate_preference_pairs(
    pipeline: Any,
    prompts: Sequence[str],
    scorer: Scorer,
    candidates: int = 4,
    pairs_per_prompt: int = 1,
    prompt_templates: Sequence[str] = ("{prompt}",),
    seed: int = 0,
    batch_size: int = 8,
    output_dir: str | os.PathLike | None = None,
    on_bad_images: Literal["skip", "raise"] = "skip",
    soft_labels: bool = False,
    **pipeline_kwargs: Any,
) -> Dataset:
    """Draw several images for each prompt, rank them with a reward, and pair the best with the worst.

    With `pairs_per_prompt=2` the second best also meets the second worst, and so on. Each image has a seed of its own,
    which follows from `seed`, the place of its prompt and its own place, so that the batch size decides how fast it
    goes, not what is drawn (up to rounding). A pair is left out if its rewards are equal or its images identical.
    Images that are not finite or of one colour (a safety checker returns black ones) are left out, and a prompt with
    fewer than two others is dropped; one warning at the end counts all of these.

    A reward can only choose among what is drawn. If the pipeline rarely draws what is wanted, let `prompt_templates`
    vary the texts: with `["{prompt}", "{prompt}, oil painting", "{prompt}, flat icon"]` the candidates of a prompt are
    drawn from these in turn, but judged by, and paired under, the prompt itself. A LoRA that is trained on the pairs
    then learns to draw what the best of them had in common when it is asked for the bare prompt.

    Args:
        pipeline: A text-to-image `DiffusionPipeline`, where it is, or its Hub id or folder: a GPU is used then if
            there is one.
        prompts: What to draw, one or more pairs for each.
        scorer: `PreferenceScorer`, or anything with `score(prompts, images) -> (N,)` rewards.
        candidates: Images for each prompt, at least 2 `pairs_per_prompt`.
        pairs_per_prompt: Pairs for each prompt.
        prompt_templates: Texts with "{prompt}" in them, from which a prompt's candidates are drawn in turn. Default:
            from the prompt as it is.
        seed: Other seeds give other images.
        batch_size: Images that are drawn at a time.
        output_dir: Folder for the pairs, which `load_preference_pairs` reads. Each prompt is kept as it is finished,
            and a call with the same settings goes on where one was stopped. Default: only in memory.
        on_bad_images: "skip" leaves bad images out and counts them; "raise" stops at the first.
        soft_labels: Let `preference` be sigmoid(reward difference) instead of 1.
        pipeline_kwargs: For the pipeline's call, such as `num_inference_steps` and `guidance_scale`. A text like
            `negative_prompt` counts for every image.

    Returns:
        A `datasets.Dataset` in the row contract: `prompt`, `chosen`, `rejected`, `preference`, and also
        `chosen_prompt`, `rejected_prompt`, `chosen_seed`, `rejected_seed` (the text and the int64 seed that draw the
        image again, by `torch.Generator().manual_seed`), `chosen_reward` and `rejected_reward` (float32).

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
    templates = _checked_templates(prompt_templates)
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
            "prompt_templates": templates,
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
            every = [(place, index) for place in places for index in range(candidates)]
            drawn = draw(
                pipeline,
                [templates[index % len(templates)].replace("{prompt}", prompts[place]) for place, index in every],
                [image_seed(seed, place, index) for place, index in every],
                batch_size,
                **pipeline_kwargs,
            )
            drawn = judge(scorer, [prompts[place] for place, _ in every], drawn, on_bad_images)
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
    """Draw several images for a prompt and return the one that a reward likes best: taste without training.

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
        from bt_hf import PreferenceScorer, best_of_n

        scorer = PreferenceScorer.from_pretrained("my-taste")
        image, ranking = best_of_n("stable-diffusion-v1-5/stable-diffusion-v1-5", "a red apple", scorer)
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
        raise ValueError(f"None of {candidates} images is usable ({counted(problems(drawn))}). {ADVICE}")
    usable = [(one.image, one.reward, one.seed) for one in ranking if one.image is not None]
    return usable[0][0], usable


# --- Checks, and the pipeline ---


def _name(pipeline: Any) -> str:
    """Return class and Hub id, or a folder's last name alone, as the folder of pairs may be published."""
    name = str(getattr(pipeline, "name_or_path", "") or "")
    return (
        f"{type(pipeline).__name__} {Path(name).name if os.path.isabs(name) or os.path.exists(name) else name}".strip()
    )


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        raise ValueError("`prompts` should be a list of texts, but got a single one: put it into a list.")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("`prompts` should hold at least one prompt, but it is empty.")
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"`prompts` should hold texts that are not empty, but number {place} is {prompt!r}.")
    return prompts


def _checked_templates(templates: Sequence[str]) -> list[str]:
    if isinstance(templates, str):
        raise ValueError("`prompt_templates` should be a list of texts, but got a single one: put it into a list.")
    templates = list(templates)
    wrong = next((one for one in templates if not isinstance(one, str) or "{prompt}" not in one), None)
    if wrong is not None or not templates:
        found = "but it is empty" if not templates else f"but one is {wrong!r}"
        raise ValueError(
            f"`prompt_templates` should hold texts with {{prompt}} where the prompt goes, such as "
            f"'{{prompt}}, oil painting', {found}."
        )
    return templates


def _check_number(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` should be a whole number of at least {least}, but got {value!r}.")


def _check_options(scorer: Scorer, on_bad_images: str, pipeline_kwargs: Mapping[str, Any]) -> None:
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
        from bt_hf.diffusion.origin import from_pretrained

        pipeline = from_pretrained(os.fspath(pipeline))
        pipeline = pipeline.to("cuda") if torch.cuda.is_available() else pipeline
    if not callable(pipeline):
        raise TypeError(
            "`pipeline` should be a text-to-image pipeline of diffusers, its Hub id or its folder, but got "
            f"{type(pipeline).__name__}."
        )
    known = inspect.signature(pipeline).parameters
    if "num_frames" in known:
        raise ValueError(
            f"{type(pipeline).__name__} draws videos, and images alone are ranked: draw the clips yourself, and pair "
            "them as animated images, on which `PreferenceLoRATrainer` trains with `num_frames`."
        )
    unknown = [name for name in options if name not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(
            f"{type(pipeline).__name__} takes no {', '.join(unknown)}: leave it out. Not every pipeline has every "
            "option; those of FLUX.2 have no `negative_prompt`, for example."
        )
    return pipeline


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar: there is one over the prompts."""
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
