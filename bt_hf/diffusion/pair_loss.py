"""What the errors of a batch are worth: the loss of each row, and what the log says of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bt_hf.diffusion import losses
from bt_hf.diffusion.config import PreferenceLoRAConfig


class Objective:
    """Losses of the rows of a batch, from the denoising errors of their images.

    Errors are (N,), of the chosen images first, then of the rejected; of unpaired rows one for each. `reference` are
    those of the base, `None` if the loss needs none.

    Args:
        args: Options `loss_type`, `label_smoothing`, `safeguard*` and `*desirable_weight`.
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
        batch: Mapping[str, Any],
        beta: float,
        predicted: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each row (B,); with predictions and targets (N, C, h, w), the safeguard applies if it is on."""
        if self.args.loss_type == "kto":
            assert reference is not None
            # Of all processes' images at once: the mean of clamped means would be another number.
            weight = batch["weight"].repeat(len(errors) // len(batch["weight"]))
            everywhere = self.gather(torch.stack([errors.detach(), reference, weight], dim=1))  # (N, 3)
            baseline = losses.kto_baseline(everywhere[:, 0], everywhere[:, 1], beta, counts=everywhere[:, 2] > 0)
            weights = self.args.desirable_weight, self.args.undesirable_weight
            if "label" in batch:
                return losses.kto(errors, reference, batch["label"], baseline, beta, *weights)
            # Held-out pairs: each image by itself, liked as much as the preference says.
            liked = torch.cat([batch["preference"], 1 - batch["preference"]])
            return losses.kto(errors, reference, liked, baseline, beta, *weights).view(2, -1).mean(0)
        preference = batch["preference"]
        pair = _pair(errors, reference)
        if self.args.safeguard and predicted is not None and target is not None:
            (chosen, rejected), (chosen_target, rejected_target) = predicted.chunk(2), target.chunk(2)
            scale = losses.safeguard_scale(
                chosen, rejected, chosen_target, rejected_target, self.args.safeguard_margin, preference
            )
            self.track(batch["weight"], safeguard_scale=scale)
            pair = losses.with_safeguard(pair, scale, preference)
        return losses.LOSSES[self.args.loss_type](pair, preference, beta, self.args.label_smoothing)

    @staticmethod
    def margins(errors: torch.Tensor, reference: torch.Tensor | None, beta: float) -> torch.Tensor:
        """How much more the chosen image is liked than the rejected, (B,)."""
        return losses.denoising_margin(_pair(errors, reference), beta or 1.0)

    def log(self, errors: torch.Tensor, reference: torch.Tensor | None, batch: Mapping[str, Any], beta: float) -> None:
        """Record what the log says of a training batch."""
        weight = batch["weight"]
        if "label" in batch:
            if reference is not None:
                liked, change = batch["label"] > 0.5, errors - reference
                self.track(weight * liked, winner_error_base=reference, winner_error_change=change)
                self.track(weight * ~liked, loser_error_change=change)
            return
        preference = batch["preference"]
        margin = self.margins(errors, reference, beta)
        hits = ((margin > 0) == (preference > 0.5)).float()
        # A LoRA that does nothing yet, as at the first step, guesses.
        hits = torch.where(margin == 0, torch.full_like(hits, 0.5), hits)
        self.track(weight, margin=margin)
        decided = weight * (preference != 0.5)
        self.track(decided, accuracy=hits)
        if reference is not None:
            winner, loser = by_preference(errors, preference)
            base_winner, base_loser = by_preference(reference, preference)
            self.track(
                decided,
                winner_error_base=base_winner,
                winner_error_change=winner - base_winner,
                loser_error_change=loser - base_loser,
            )


def by_preference(errors: torch.Tensor, preference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors (2B,) of the winners and of the losers, each (B,); below a preference of one half the rejected won."""
    chosen, rejected = errors.chunk(2)
    won = preference >= 0.5
    return torch.where(won, chosen, rejected), torch.where(won, rejected, chosen)


def _pair(errors: torch.Tensor, reference: torch.Tensor | None) -> losses.Errors:
    chosen, rejected = errors.chunk(2)
    if reference is None:
        return losses.Errors(chosen, rejected)
    base_chosen, base_rejected = reference.chunk(2)
    return losses.Errors(chosen, rejected, base_chosen, base_rejected)
