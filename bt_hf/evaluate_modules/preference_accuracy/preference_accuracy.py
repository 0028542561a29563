"""Preference accuracy as a metric for the `evaluate` library; the mathematics is in `bt_hf.metrics`."""

# The loader of `evaluate` finds the imports with a regular expression: keep one a line.
import datasets
import evaluate

from bt_hf.metrics import preference_metrics

_DESCRIPTION = """
Share of pairs on which the sign of the margin agrees with the preference, with its 95 % Wilson interval.
A margin of 0 counts one half; ties (references of 0.5) are left out.
"""

_INPUTS = """
Args:
    predictions: Margins, `reward(chosen) - reward(rejected)`, one per pair.
    references: Preferences in [0, 1], one per pair: 1.0 the chosen image wins, 0.0 the other one, 0.5 a tie.
    sample_weight: Optional weights, one per pair. Default 1.0 each.

Returns:
    `accuracy`, `accuracy_low`, `accuracy_high`: float.

Example:
    >>> metric = evaluate.load("bt_hf/evaluate_modules/preference_accuracy")
    >>> round(metric.compute(predictions=[1.0, -1.0, 2.0, 3.0], references=[1.0, 1.0, 1.0, 1.0])["accuracy"], 2)
    0.75
"""

_CITATION = """
@article{bradley1952rank,
  title   = {Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons},
  author  = {Bradley, Ralph Allan and Terry, Milton E.},
  journal = {Biometrika},
  volume  = {39},
  pages   = {324--345},
  year    = {1952},
  doi     = {10.2307/2334029},
}
"""


class PreferenceAccuracy(evaluate.Metric):
    """Preference accuracy; its `description` and `inputs_description` explain it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float32"), "references": datasets.Value("float32")}
            ),
        )

    def _compute(
        self, predictions: list[float], references: list[float], sample_weight: list[float] | None = None
    ) -> dict[str, float]:
        metrics = preference_metrics(predictions, references, sample_weight)
        return {
            name: metrics[name]
            for name in (
                "accuracy",
                "accuracy_low",
                "accuracy_high",
            )
        }
