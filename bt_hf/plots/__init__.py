"""Pictures of a preference model: training curves, calibration, and contact sheets."""

from bt_hf.plots.curves import FEWEST_PAIRS, plot_accuracy_by_pairs, plot_reliability, plot_training_curve
from bt_hf.plots.sheet import contact_sheet

__all__ = ["FEWEST_PAIRS", "contact_sheet", "plot_accuracy_by_pairs", "plot_reliability", "plot_training_curve"]
