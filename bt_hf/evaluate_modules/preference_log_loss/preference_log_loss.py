"""Preference log-loss for the `evaluate` library."""

from bt_hf.evaluate_modules import base


class PreferenceLogLoss(base.PreferenceMetric):
    """Bradley-Terry log-loss in nats and the Brier score, its squared counterpart.

    The log-loss is the cross-entropy of sigmoid(margin) against the preference; a model that knows nothing has a
    log-loss of 0.693 and a Brier score of 0.25.

    Example:
        >>> import evaluate
        >>> from bt_hf.evaluate_modules import path
        >>> metric = evaluate.load(path("preference_log_loss"))
        >>> round(metric.compute(predictions=[0.0, 0.0], references=[1.0, 0.0])["log_loss"], 3)
        0.693
    """

    keys = ("log_loss", "brier_score")
