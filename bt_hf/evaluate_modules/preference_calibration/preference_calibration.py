"""Preference calibration as a metric for the `evaluate` library; the mathematics is in `bt_hf.metrics`."""

# The loader of `evaluate` finds the imports with a regular expression: keep one a line.
import datasets
import evaluate

from bt_hf.metrics import preference_metrics

_DESCRIPTION = """
Expected calibration error: the gap between how sure the model is of the image it favours, max(p, 1 - p) with
p = sigmoid(margin), and how often that image was chosen, in 10 equal bins on [0.5, 1].
"""

_INPUTS = """
Args:
    predictions: Margins, `reward(chosen) - reward(rejected)`, one per pair.
    references: Preferences in [0, 1], one per pair: 1.0 the chosen image wins, 0.0 the other one, 0.5 a tie.
    sample_weight: Optional weights, one per pair. Default 1.0 each.

Returns:
    `calibration_error`: float.

Example:
    >>> metric = evaluate.load("bt_hf/evaluate_modules/preference_calibration")
    >>> round(metric.compute(predictions=[50.0, 50.0], references=[1.0, 0.0])["calibration_error"], 2)
    0.5
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


class PreferenceCalibration(evaluate.Metric):
    """Preference calibration; its `description` and `inputs_description` explain it."""

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
        return {name: metrics[name] for name in ("calibration_error",)}
