"""Frame of the metrics for the `evaluate` library; the mathematics is in `bt_hf.metrics`."""

import inspect

import datasets
import evaluate

from bt_hf.metrics import preference_metrics

_INPUTS = """
Args:
    predictions: Margins, `reward(chosen) - reward(rejected)`, one per pair.
    references: Preferences in [0, 1], one per pair: 1.0 the chosen image wins, 0.0 the other one, 0.5 a tie.
    sample_weight: Optional weights, one per pair. Default 1.0 each.

Returns:
    {keys}: float.
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


class PreferenceMetric(evaluate.Metric):
    """Some of `bt_hf.metrics.preference_metrics`, as a metric for `evaluate`.

    A subclass is described by its docstring. Its file imports this module rather than this class: the loader of
    `evaluate` takes the first metric that it finds among the names of a file.

    Attributes:
        keys: Names of the metrics.
    """

    keys: tuple[str, ...] = ()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=_CITATION,
            inputs_description=_INPUTS.format(keys=", ".join(f"`{key}`" for key in self.keys)),
            features=datasets.Features(
                {"predictions": datasets.Value("float32"), "references": datasets.Value("float32")}
            ),
        )

    def _compute(
        self, predictions: list[float], references: list[float], sample_weight: list[float] | None = None
    ) -> dict[str, float]:
        metrics = preference_metrics(predictions, references, sample_weight)
        return {key: metrics[key] for key in self.keys}
