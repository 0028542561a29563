"""Candidates of a prompt: draw each from its seed, judge them by a reward, rank and pair them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image as PILImage

from bt_hf.data.fingerprint import digest
from bt_hf.diffusion.generation.pair_folder import ADVICE

_Skip: TypeAlias = Literal["skip", "raise"]


class Scorer(Protocol):
    """Judge of images: `PreferenceScorer`, or anything of your own with this method."""

    def score(self, prompts: Any, images: Any) -> torch.Tensor:
        """Return rewards (N,) of N images, each for its prompt; the larger the better."""


@dataclass(frozen=True)
class Candidate:
    """Image that a pipeline drew from a text, or the problem with it; the reward is NaN until it is judged."""

    prompt: str
    seed: int
    image: PILImage.Image | None
    problem: str | None = None
    reward: float = float("nan")


def image_seed(seed: int, place: int, index: int) -> int:
    """Return the seed of one image, 32 bits: no two images of a run share one but by chance."""
    return int(digest(str(seed), str(place), str(index))[:8], 16)


def draw(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, **pipeline_kwargs: Any
) -> list[Candidate]:
    """Draw one image for each prompt and seed, which alone decides what comes out, whatever it is drawn beside.

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
        # A list of their own: Z-Image writes its chat into it.
        images = np.asarray(pipeline(prompt=list(chunk), generator=generators, output_type="np", **options).images)
        if images.ndim != 4 or images.shape[0] != len(chunk) or images.shape[3] != 3:
            raise ValueError(
                f"Expected {len(chunk)} RGB images (N, H, W, 3) from {type(pipeline).__name__}, but got an array of "
                f"shape {images.shape}: use a text-to-image pipeline."
            )
        drawn += map(_candidate, chunk, seeds[start : start + batch_size], images)
    return drawn


def _candidate(prompt: str, seed: int, pixels: np.ndarray) -> Candidate:
    """Turn pixels (H, W, 3) in [0, 1] into an image, or name the problem with them."""
    if not np.isfinite(pixels).all():
        return Candidate(prompt, seed, None, "not finite")
    rounded = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    if (rounded == rounded[0, 0]).all():
        return Candidate(prompt, seed, None, "of one colour")
    return Candidate(prompt, seed, PILImage.fromarray(rounded))


def judge(scorer: Scorer, prompts: Sequence[str], drawn: Sequence[Candidate], on_bad_images: _Skip) -> list[Candidate]:
    """Return the same candidates with rewards.

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


def ranked(drawn: Iterable[Candidate]) -> list[Candidate]:
    """Sort the usable candidates, best first; among equal ones, first drawn first."""
    return sorted((one for one in drawn if one.image is not None), key=lambda one: -one.reward)


def pair_up(drawn: Sequence[Candidate], pairs: int, soft_labels: bool) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Pair the best of one prompt's candidates with the worst, the second best with the second worst, and so on.

    Returns:
        Rows without the prompt, and counts of what was left out.
    """
    skipped = problems(drawn)
    ranking = ranked(drawn)
    if len(ranking) < 2:
        skipped["prompts with fewer than 2 usable images"] += 1
        return [], skipped
    rows = []
    for place in range(min(pairs, len(ranking) // 2)):
        chosen, rejected = ranking[place], ranking[-1 - place]
        if chosen.reward == rejected.reward:
            skipped["pairs of equal rewards"] += 1
        elif chosen.image == rejected.image:
            skipped["pairs of identical images"] += 1
        else:
            difference = torch.tensor(chosen.reward - rejected.reward, dtype=torch.double)
            rows.append(
                {
                    "chosen": chosen.image,
                    "rejected": rejected.image,
                    "preference": torch.sigmoid(difference).item() if soft_labels else 1.0,
                    "chosen_prompt": chosen.prompt,
                    "rejected_prompt": rejected.prompt,
                    "chosen_seed": chosen.seed,
                    "rejected_seed": rejected.seed,
                    "chosen_reward": chosen.reward,
                    "rejected_reward": rejected.reward,
                }
            )
    return rows, skipped


def problems(drawn: Iterable[Candidate]) -> Counter[str]:
    """Count the images that are not usable, by their problem."""
    return Counter(f"images {one.problem}" for one in drawn if one.problem)
