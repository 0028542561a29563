"""Model cards: facts of a run, rendered with a template from `hub_cards/`."""

import dataclasses
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bt_hf.hub.card_sections import in_code, keep_owner_text, plain_line, read_card
from bt_hf.hub.contract import CARD, PICTURES
from bt_hf.hub.facts import RunFacts


def render_card(template: str, run: RunFacts, data: ModelCardData) -> ModelCard:
    """Render a card, and read it back: its metadata is then known to be well-formed.

    Args:
        template: File name of a template in `hub_cards/`.
        run: Facts; a template that reads a fact that `run` does not have is an error.
        data: Metadata; the template shows it as `metadata`, and its tags as `tags`.

    Example:
        >>> from bt_hf.hub.facts import RunFacts
        >>> run = RunFacts(name="my-taste", address="me/my-taste")
        >>> render_card("card.md", run, ModelCardData(library_name="peft")).data.library_name
        'peft'
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"code": in_code, "line": plain_line}
    # An optional section starts with an empty line, so that it is the same with and without the ones before it.
    rendered = environment.get_template(template).render(run=run, metadata=data.to_yaml(), tags=data.tags or [])
    return read_card(rendered.strip() + "\n")


def write_card(folder: Path, template: str, run: RunFacts, data: ModelCardData) -> None:
    """Write `README.md` into `folder`, with the pictures that are there.

    Of a card that exists, only the generated parts and fields are renewed.
    """
    run = dataclasses.replace(run, pictures=[name for name in PICTURES if (folder / name).is_file()])
    path, text = folder / CARD, str(render_card(template, run, data))
    if path.is_file():
        text = keep_owner_text(text, path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


def template_folder() -> Path:
    """Return `hub_cards/`: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "hub_cards"
    return installed if installed.is_dir() else package.parent / "hub_cards"


def card_metadata(
    run: RunFacts, library: str, task: str, tags: list[str], results: list[EvalResult], relation: str = "adapter"
) -> ModelCardData:
    """Build the metadata of a card, for the Hub's search and its widgets.

    Args:
        run: Facts of the run.
        library: Library that loads the model.
        task: Task of the model, as the Hub calls it.
        tags: Tags.
        results: Measured numbers.
        relation: Relation to the base, as the Hub calls it.
    """
    known: dict[str, Any] = {}
    if run.base_model:
        known |= {"base_model": run.base_model, "base_model_relation": relation}
    if results:
        known |= {"model_name": run.name, "eval_results": results}
    return ModelCardData(library_name=library, pipeline_tag=task, tags=tags, **known)


def eval_result(
    name: str,
    metric: str,
    title: str,
    value: float,
    subset: str | None = None,
    task_type: str = "zero-shot-image-classification",
    task_name: str = "Preference prediction",
    **arguments: float,
) -> EvalResult:
    """Build one number of the metadata's `model-index`.

    Args:
        name: Dataset that it was measured on.
        metric: Type of the metric, such as `"accuracy"`.
        title: Name of the metric.
        value: The number.
        subset: Name that tells several datasets of one card apart, since the Hub ignores `name` for that.
        task_type: Task of the model, as the Hub calls it.
        task_name: Task that was measured.
        arguments: Numbers that belong to it, such as its interval.
    """
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type="preference-pairs",
        dataset_name=name,
        dataset_config=subset,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 4),
        metric_args={key: round(number, 4) for key, number in arguments.items()} or None,
    )
