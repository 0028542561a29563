"""Arguments with which a pipeline draws from embedded prompts, at an exact size and in the family's words."""

import inspect
from typing import Any

from bt_hf.diffusion.families.base import Conditions, Family, Size


def drawing_arguments(
    family: Family, conditions: Conditions, negative: Conditions, size: Size, steps: int, guidance: float | None
) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, but for the seeds.

    Args:
        family: Family around the pipeline.
        conditions: Embeddings of N prompts, each (N, ...).
        negative: Embeddings of N negative prompts; those that the pipeline does not take are left out.
        size: Height and width of the images.
        steps: Denoising steps.
        guidance: Strength of guidance; `None` for the pipeline's own.
    """
    known = inspect.signature(family.pipeline.__call__).parameters
    named = {f"negative_{name}": value for name, value in family.call_arguments(negative).items()}
    options: dict[str, Any] = {"num_inference_steps": steps, "height": size[0], "width": size[1]}
    if guidance is not None:
        options[family.guidance_option] = guidance
    return {
        **family.call_arguments(conditions),
        **{name: value for name, value in named.items() if name in known},
        **options,
        **family.call_options,
    }


def own_guidance(family: Family) -> float:
    """Return the strength of guidance that the pipeline draws with where it is told none."""
    return inspect.signature(family.pipeline.__call__).parameters[family.guidance_option].default
