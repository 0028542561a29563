"""Blind comparison of drawings with and without a LoRA, and what the votes say."""

from collections.abc import Sequence
from typing import Any

from bt_hf.data.clicks import CHOICES, Click, ClickLog
from bt_hf.metrics import verdict_sentence, wilson_interval


def votes_of(log: ClickLog, run: str) -> list[Click]:
    """Return the votes on the drawings of one run of training that prefer one or call it a tie."""
    return [
        click
        for click in log.clicks
        if click.asked.kind == "blind" and click.asked.of == run and CHOICES[click.choice] is not None
    ]


def tally(votes: Sequence[Click]) -> dict[str, Any]:
    """Return how often the LoRA's drawing won, with a 95 % interval and a plain sentence.

    Returns:
        `base`, `lora`, `ties` (counts), `share` of the LoRA with ties counted half, `low`, `high` (Wilson's interval),
        `sentence`.
    """
    won = [
        0.5 if click.choice == "tie" else float((click.choice == "left") == (click.asked.adapted == "left"))
        for click in votes
    ]
    wins, ties = won.count(1.0), won.count(0.5)
    low, high = wilson_interval(sum(won), len(won))
    return {
        "base": len(won) - wins - ties,
        "lora": wins,
        "ties": ties,
        "share": sum(won) / len(won) if won else None,
        "low": low,
        "high": high,
        "sentence": _sentence(won),
    }


def _sentence(won: Sequence[float]) -> str:
    if not won:
        return "No vote prefers either yet."
    text = verdict_sentence(won, [1 - value for value in won])
    return f"The LoRA's drawings against the base's, sides hidden: {text[0].lower()}{text[1:]}"
