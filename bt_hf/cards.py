"""Model cards: the facts of a run, rendered with a template from `hub_cards/`."""

import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def render_card(template: str, facts: Mapping[str, Any], data: ModelCardData) -> ModelCard:
    """Render a card, and read it back: its metadata is then known to be well-formed.

    Args:
        template: File name of a template in `hub_cards/`.
        facts: Values of the template. It leaves out what is missing, so that nothing has to be made up.
        data: Metadata; the template shows it as `metadata`.

    Example:
        >>> card = render_card("reward_adapter.md", {"name": "my-taste"}, ModelCardData(library_name="peft"))
        >>> card.data.library_name
        'peft'
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    # An optional section starts with an empty line, so that it is the same with and without the ones before it.
    return ModelCard(environment.get_template(template).render(facts, metadata=data.to_yaml()).strip() + "\n")


def template_folder() -> Path:
    """`hub_cards/`: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "hub_cards"
    return installed if installed.is_dir() else package.parent / "hub_cards"


def hub_id(name_or_path: str) -> str | None:
    """`name_or_path` if it is a Hub id; `None` if it is a local path, which is nobody else's business."""
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return None if Path(name_or_path).exists() else name_or_path


def eval_result(
    name: str, metric: str, title: str, value: float, subset: str | None = None, **arguments: float
) -> EvalResult:
    """One number of the metadata's `model-index`.

    Args:
        name: Data set that it was measured on.
        metric: Type of the metric, such as `"accuracy"`.
        title: What to call the metric.
        value: The number.
        subset: Tells several data sets of one card apart, for which their names do not count.
        arguments: What else belongs to it, such as its interval.
    """
    return EvalResult(
        task_type="zero-shot-image-classification",
        task_name="Preference prediction",
        dataset_type="preference-pairs",
        dataset_name=name,
        dataset_config=subset,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 4),
        metric_args={key: round(number, 4) for key, number in arguments.items()} or None,
    )


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of this library and of those of `libraries` that are installed."""
    found = {"bt-hf": sys.modules["bt_hf"].__version__}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
