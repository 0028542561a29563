"""Metrics for the `evaluate` library, one folder a metric, as its loader wants them."""

from pathlib import Path


def path(name: str) -> str:
    """Return the path of a metric for `evaluate.load`, wherever this library is installed.

    Args:
        name: "preference_accuracy", "preference_calibration" or "preference_log_loss".

    Raises:
        ValueError: There is no such metric.

    Example:
        >>> import evaluate
        >>> evaluate.load(path("preference_accuracy")).compute(predictions=[1.0], references=[1.0])["accuracy"]
        1.0
    """
    folder = Path(__file__).parent
    known = sorted(file.parent.name for file in folder.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"There is no metric {name!r}: expected one of {', '.join(known)}.")
    return str(folder / name)
