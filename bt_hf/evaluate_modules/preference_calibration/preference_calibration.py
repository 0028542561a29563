"""Preference calibration for the `evaluate` library."""

from bt_hf.evaluate_modules import base


class PreferenceCalibration(base.PreferenceMetric):
    """Expected calibration error: the gap between the model's confidence in the image it favours and its success.

    The confidence is max(p, 1 - p) with p = sigmoid(margin), the success how often that image was chosen, in 10 equal
    bins on [0.5, 1].

    Example:
        >>> import evaluate
        >>> from bt_hf.evaluate_modules import path
        >>> metric = evaluate.load(path("preference_calibration"))
        >>> metric.compute(predictions=[50.0, 50.0], references=[1.0, 0.0])["calibration_error"]
        0.5
    """

    keys = ("calibration_error",)
