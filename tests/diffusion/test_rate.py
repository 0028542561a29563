"""The learning rate that finds itself, against what its description says, step by step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bt_hf import PreferenceLoRAConfig
from bt_hf.diffusion.rate import GAIN, LOOKS, REACH, TARGET, MarginRate
from tiny_models import red_pairs
from tiny_trainers import adapter, logged, make

STEPS = 80


class Steps:
    """Steps of a training with a warmup of ten, whose margins a function of step and rate decides."""

    def __init__(self, start: float = 1e-4) -> None:
        self.number = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.number], lr=start)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, step / 10))
        self.rate = MarginRate(lambda value: value)
        self.args = SimpleNamespace(get_warmup_steps=lambda steps: 10)

    def run(self, margin: Any, steps: range) -> list[float]:
        rates = []
        for step in steps:
            rates.append(self.optimizer.param_groups[0]["lr"])
            value = torch.full((4,), float(margin(step, rates[-1])))
            self.rate.observe(value, torch.ones(4), torch.ones(4))
            self.optimizer.step()
            self.schedule.step()
            state = SimpleNamespace(global_step=step + 1, max_steps=STEPS)
            self.rate.on_step_end(
                self.args, state, SimpleNamespace(), optimizer=self.optimizer, lr_scheduler=self.schedule
            )
        return rates


@pytest.mark.parametrize(("margin", "limit"), [(0.0, REACH), (2 * TARGET, 1 / REACH)])
def test_rate_goes_to_its_limit_by_equal_factors(margin: float, limit: float) -> None:
    """Looks are two steps apart, the first after the warmup: at step 12, 14, ..."""
    factor = GAIN if limit > 1 else 1 / GAIN
    for step, rate in enumerate(Steps().run(lambda *_: margin, range(STEPS))):
        looks = max(0, step // (STEPS // LOOKS) - 5)
        bounded = max(min(factor**looks, REACH), 1 / REACH)
        assert rate == pytest.approx(1e-4 * min(1, step / 10) * bounded)


@pytest.mark.parametrize("needed", [2e-5, 1e-4, 5e-4])
def test_margins_follow_the_plan_whatever_the_pipeline_needs(needed: float) -> None:
    """A pipeline whose margins grow in proportion to the rate, from 0 to the target at the rate it needs."""
    total = 0.0

    def margin(step: int, rate: float) -> float:
        nonlocal total
        total += rate / needed * TARGET / STEPS
        return total

    steps = Steps()
    rates = steps.run(margin, range(STEPS))
    assert total == pytest.approx(TARGET, rel=0.3)
    assert steps.rate.highest == pytest.approx(max(rates) / 1e-4) or max(rates) <= 1e-4


def test_ties_and_reversed_pairs() -> None:
    rate = MarginRate(lambda value: value)
    rate.observe(torch.tensor([3.0, -5.0, 100.0]), torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1.0, 2.0, 1.0]))
    total, weight = rate._seen[0].tolist()
    assert (total, weight) == (13.0, 3.0)


def test_all_processes_take_one_rate() -> None:
    """Each sees its own margins; the mean over all of them counts, weighted by their pairs."""
    theirs = torch.tensor([[60.0, 4.0]])
    steps = Steps()
    steps.rate.gather = lambda own: torch.cat([own, theirs])
    steps.run(lambda *_: 0.0, range(14))  # alone, it would be behind the plan
    assert steps.rate._mean / steps.rate._weight == pytest.approx(60 / 8)
    assert steps.rate._factor < 1


@pytest.mark.parametrize(
    ("given", "adapts", "rate"),
    [
        ({}, True, 1e-4),
        ({"learning_rate": 1e-4}, False, 1e-4),
        ({"learning_rate": 1e-5, "adapt_rate": True}, True, 1e-5),
        ({"adapt_rate": False}, False, 1e-4),
        ({"loss_type": "mapo"}, False, 1e-4),
        ({"optim": "sgd"}, False, 1e-4),
    ],
)
def test_a_rate_that_is_given_stays(given: dict[str, Any], adapts: bool, rate: float, tmp_path: Path) -> None:
    config = PreferenceLoRAConfig(str(tmp_path), report_to="none", **given)
    assert (config.adapt_rate, config.learning_rate) == (adapts, rate)


def test_other_losses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`adapt_rate=True` has no effect without `loss_type='dpo'`"):
        PreferenceLoRAConfig(str(tmp_path), report_to="none", adapt_rate=True, loss_type="sft")


def test_in_training_the_rate_rises_and_a_resumed_run_ends_at_the_same_bits(tmp_path: Path) -> None:
    pairs = red_pairs(8)
    options = {"adapt_rate": True, "learning_rate": 1e-4, "warmup_steps": 1, "max_steps": 8, "save_total_limit": 9}
    options |= {"save_strategy": "steps", "save_steps": 3, "pairs": pairs}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    whole.save_model()
    rates = logged(whole, "learning_rate")
    risen = [1e-4 * min(GAIN**looks, REACH) for looks in range(7)]  # nothing is learnt so soon
    assert rates == pytest.approx([0.0, *risen])
    assert "(found by itself)" in (tmp_path / "whole" / "out" / "README.md").read_text()
    again = make(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    again.save_model()
    one, two = adapter(tmp_path / "whole" / "out"), adapter(tmp_path / "again" / "out")
    assert all(torch.equal(value, two[name]) for name, value in one.items())
