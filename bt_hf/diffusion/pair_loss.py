"""Per-row losses and logged metrics from denoising errors."""

from collections.abc import Callable

import numpy as np
import torch

from bt_hf.diffusion import losses
from bt_hf.diffusion.collator import Batch
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.kto import kto, kto_baseline
from bt_hf.diffusion.safeguard import safeguard_scale, with_safeguard
from bt_hf.losses import agreement


class PairLoss:
    """Losses of the rows of a batch, from the denoising errors of their images.

    Errors are (N,), of the chosen images first, then of the rejected; of unpaired rows one for each. `reference` are
    those of the base, `None` if the loss needs none.

    Args:
        args: Options `loss_type`, `label_smoothing`, `rpo_alpha`, `safeguard*` and `*desirable_weight`.
        gather: Gives the rows of all processes' tensors.
        track: Takes values of the rows that count, by name, into the means of the log.
    """

    def __init__(
        self,
        args: PreferenceLoRAConfig,
        gather: Callable[[torch.Tensor], torch.Tensor],
        track: Callable[..., None],
    ) -> None:
        self.args = args
        self.gather = gather
        self.track = track

    @property
    def needs_reference(self) -> bool:
        return self.args.loss_type not in losses.REFERENCE_FREE

    def losses(
        self,
        errors: torch.Tensor,
        reference: torch.Tensor | None,
        batch: Batch,
        beta: float,
        predicted: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of each row (B,).

        Args:
            errors: (N,).
            reference: (N,).
            batch: `preference` or `label`, and `weight`, each (B,).
            beta: As in `losses.denoising_margin`.
            predicted: (N, C, h, w), which the safeguard needs; without, it is off.
            target: (N, C, h, w), the same.
        """
        if self.args.loss_type == "kto":
            assert reference is not None
            return self._kto(errors, reference, batch, beta)
        preference = batch["preference"]
        pair = _pair(errors, reference)
        if self.args.safeguard and predicted is not None and target is not None:
            (chosen, rejected), (chosen_target, rejected_target) = predicted.chunk(2), target.chunk(2)
            scale = safeguard_scale(
                chosen, rejected, chosen_target, rejected_target, self.args.safeguard_mu, preference
            )
            self.track(batch["weight"], safeguard_scale=scale)
            pair = with_safeguard(pair, scale, preference)
        smoothing = self.args.label_smoothing
        values = losses.LOSSES[self.args.loss_type](pair, preference, beta, smoothing)
        if not self.args.rpo_alpha:
            return values
        return values + self.args.rpo_alpha * losses.preferred_change(pair, preference, smoothing)

    def _kto(self, errors: torch.Tensor, reference: torch.Tensor, batch: Batch, beta: float) -> torch.Tensor:
        # All processes' images share a baseline: the mean of clamped means would be another number.
        weight = batch["weight"].repeat(len(errors) // len(batch["weight"]))
        everywhere = self.gather(torch.stack([errors.detach(), reference, weight], dim=1))  # (N, 3)
        baseline = kto_baseline(everywhere[:, 0], everywhere[:, 1], beta, counts=everywhere[:, 2] > 0)
        weights = self.args.desirable_weight, self.args.undesirable_weight
        if "label" in batch:
            return kto(errors, reference, batch["label"], baseline, beta, *weights)
        # Held-out pairs: each image by itself, liked as much as the preference says.
        liked = torch.cat([batch["preference"], 1 - batch["preference"]])
        return kto(errors, reference, liked, baseline, beta, *weights).view(2, -1).mean(0)

    @staticmethod
    def margins(errors: torch.Tensor, reference: torch.Tensor | None, beta: float) -> torch.Tensor:
        """Return the margin of each pair (B,): see `losses.denoising_margin`."""
        return losses.denoising_margin(_pair(errors, reference), beta)

    def log(self, errors: torch.Tensor, reference: torch.Tensor | None, batch: Batch, beta: float) -> None:
        """Record the metrics of a training batch for the log."""
        if "label" in batch:
            self._log_unpaired(errors, reference, batch)
            return
        weight, preference = batch["weight"], batch["preference"]
        margin = self.margins(errors, reference, beta)
        self.track(weight, margin=margin)
        decided = weight * (preference != 0.5)
        self.track(decided, accuracy=agreement(margin, preference))
        if reference is not None:
            winner, loser = by_preference(errors, preference)
            base_winner, base_loser = by_preference(reference, preference)
            self.track(
                decided,
                winner_error_base=base_winner,
                winner_error_change=winner - base_winner,
                loser_error_change=loser - base_loser,
            )

    def _log_unpaired(self, errors: torch.Tensor, reference: torch.Tensor | None, batch: Batch) -> None:
        if reference is not None:
            weight, liked, change = batch["weight"], batch["label"] > 0.5, errors - reference
            self.track(weight * liked, winner_error_base=reference, winner_error_change=change)
            self.track(weight * ~liked, loser_error_change=change)


def by_preference(errors: torch.Tensor, preference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split errors (2B,) into those of winners and losers (B,); below a preference of one half the rejected won."""
    chosen, rejected = errors.chunk(2)
    won = preference >= 0.5
    return torch.where(won, chosen, rejected), torch.where(won, rejected, chosen)


def error_changes(
    winner: np.ndarray, loser: np.ndarray, base_winner: np.ndarray, base_loser: np.ndarray, weight: np.ndarray
) -> dict[str, float]:
    """Return the weighted mean of the winners' errors with the base, and of the changes against it.

    Args:
        winner: (B,) errors of the preferred images.
        loser: (B,) errors of the others.
        base_winner: (B,) errors of the preferred images with the base.
        base_loser: (B,) errors of the others with the base.
        weight: (B,), 0 for ties, which have no winner.

    Returns:
        `winner_error_base`, `winner_error_change` and `loser_error_change`; nothing if all weights are 0.
    """
    if not weight.any():
        return {}
    changes = {"winner_error_change": winner - base_winner, "loser_error_change": loser - base_loser}
    values = {"winner_error_base": base_winner, **changes}
    return {name: float(np.average(value, weights=weight)) for name, value in values.items()}


def _pair(errors: torch.Tensor, reference: torch.Tensor | None) -> losses.Errors:
    chosen, rejected = errors.chunk(2)
    if reference is None:
        return losses.Errors(chosen, rejected)
    base_chosen, base_rejected = reference.chunk(2)
    return losses.Errors(chosen, rejected, base_chosen, base_rejected)
