"""Preference accuracy for the `evaluate` library."""

from bt_hf.evaluate_modules import base


class PreferenceAccuracy(base.PreferenceMetric):
    """Share of pairs on which the sign of the margin agrees with the preference, with its 95 % Wilson interval.

    A margin of 0 counts one half; ties (references of 0.5) are left out.

    Example:
        >>> import evaluate
        >>> from bt_hf.evaluate_modules import path
        >>> metric = evaluate.load(path("preference_accuracy"))
        >>> metric.compute(predictions=[1.0, -1.0, 2.0, 3.0], references=[1.0, 1.0, 1.0, 1.0])["accuracy"]
        0.75
    """

    keys = ("accuracy", "accuracy_low", "accuracy_high")
