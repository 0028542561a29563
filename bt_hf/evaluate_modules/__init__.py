"""Metrics for the `evaluate` library, one folder a metric, as its loader wants them."""
