"""Metrics of a Bradley-Terry model, with the intervals and tests that say how far to believe them.

Example:
    >>> from bt_hf.metrics import preference_metrics
    >>> preference_metrics([2.0, 1.0, -0.5, 0.3])["accuracy"]
    0.75
"""

from bt_hf.metrics.comparison import (
    McNemarResult,
    mcnemar_test,
    paired_difference_interval,
    pairs_needed,
    sign_flip_test,
    verdict_sentence,
)
from bt_hf.metrics.intervals import clustered_sample_size, effective_sample_size, wilson_interval
from bt_hf.metrics.scores import (
    ReliabilityBin,
    agreement,
    brier_score,
    calibration_error,
    log_loss,
    preference_accuracy,
    preference_metrics,
    reliability_bins,
)

__all__ = [
    "McNemarResult",
    "ReliabilityBin",
    "agreement",
    "brier_score",
    "calibration_error",
    "clustered_sample_size",
    "effective_sample_size",
    "log_loss",
    "mcnemar_test",
    "paired_difference_interval",
    "pairs_needed",
    "preference_accuracy",
    "preference_metrics",
    "reliability_bins",
    "sign_flip_test",
    "verdict_sentence",
    "wilson_interval",
]
