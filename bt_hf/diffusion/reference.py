"""Denoising errors of the base: computed in the step, or once where noise samples come again."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from bt_hf.diffusion.beta import auto_beta
from bt_hf.diffusion.cache import LatentPairs, Pairs
from bt_hf.diffusion.collator import Batch
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.errors import BETA, Denoising, NoisyBatch

logger = logging.getLogger(__name__)

_BETA_PAIRS, _BETA_SAMPLES = 64, 4  # pairs, and noise samples of each, for `auto_beta`


class Reference:
    """Denoising errors of the base, which are the reference of a preference loss.

    Args:
        denoising: Adds noise and measures errors.
        base_model: Context in which the LoRA is off; yields the model.
        read_batches: Yields encoded batches of up to so many rows of a dataset, in their own order.
        accelerator: Of the training: shares rows out over the processes.
        args: Options of the training.
        sharded: True if all processes have to take part in each forward (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        denoising: Denoising,
        base_model: Callable[[], AbstractContextManager[nn.Module]],
        read_batches: Callable[[Pairs, int | None], Iterator[Batch]],
        accelerator: Accelerator,
        args: PreferenceLoRAConfig,
        sharded: bool,
    ) -> None:
        self.denoising = denoising
        self.base_model = base_model
        self.read_batches = read_batches
        self.accelerator = accelerator
        self.args = args
        self.sharded = sharded
        # Errors (N, samples, sides) by dataset and purpose.
        self._known: WeakKeyDictionary[LatentPairs, dict[int, torch.Tensor]] = WeakKeyDictionary()

    @torch.no_grad()
    def compute(self, noisy: NoisyBatch) -> torch.Tensor:
        """Compute the base's errors (N,), in the precision of the training."""
        with self.base_model() as base, self.accelerator.autocast():
            return self.denoising.errors(base, noisy)[0]

    def errors(self, noisy: NoisyBatch, batch: Batch, sample: int) -> torch.Tensor:
        """Return the base's errors (N,): those that the batch brings, else computed now."""
        known = batch.get("reference")  # (B, samples, sides)
        return self.compute(noisy) if known is None else known[:, sample].T.flatten()

    def known(self, pairs: LatentPairs, purpose: int) -> torch.Tensor | None:
        """Return the errors (N, samples, sides) that `precompute` has computed, if any."""
        return self._known.get(pairs, {}).get(purpose)

    @torch.no_grad()
    def precompute(self, pairs: LatentPairs, purpose: int, samples: int, description: str) -> None:
        """Compute the errors at the fixed noise samples of each row, shared out over the processes, unless known.

        Args:
            pairs: Encoded rows.
            purpose: `TRAIN` or `EVAL`.
            samples: Noise samples of each row.
            description: Text of the progress bar.
        """
        if self.known(pairs, purpose) is not None:
            return
        total = -(-len(pairs) // self.args.per_device_eval_batch_size)
        silent = self.args.disable_tqdm or self.args.process_index != 0
        found = []
        for index, batch in enumerate(
            tqdm(self.read_batches(pairs, None), description, total, disable=silent, leave=False)
        ):
            count = len(batch["row"])
            errors = torch.zeros(count, samples, len(batch["latents"]) // count, device=self.args.device)
            if self.sharded or index % self.accelerator.num_processes == self.accelerator.process_index:
                for sample in range(samples):
                    values = self.compute(self.denoising.add_noise(batch, sample, purpose))
                    errors[:, sample] = values.view(-1, count).T
            found.append((errors if self.sharded else self.accelerator.reduce(errors, "sum")).cpu())
        self._known.setdefault(pairs, {})[purpose] = torch.cat(found)

    @torch.no_grad()
    def auto_beta(self, pairs: Pairs) -> float:
        """Return beta from the spread of the errors on the first pairs: see `beta.auto_beta`."""
        chosen, rejected = [], []
        for batch in self.read_batches(pairs, _BETA_PAIRS):
            for sample in range(_BETA_SAMPLES):
                errors = self.compute(self.denoising.add_noise(batch, sample, BETA))
                # Each unpaired row is compared with the next.
                first, second = errors.chunk(2) if "preference" in batch else (errors, errors.roll(1))
                chosen.append(first.cpu())
                rejected.append(second.cpu())
        beta = auto_beta(torch.cat(chosen), torch.cat(rejected))
        logger.info("beta = %.4g, from the spread of the base's error differences.", beta)
        return beta


def samples_come_again(samples: int, batches: int, args: PreferenceLoRAConfig) -> bool:
    """True if training meets a fixed noise sample a second time, so that caching the reference errors pays off.

    Args:
        samples: Noise samples of each row.
        batches: Batches of an epoch.
        args: Options `max_steps`, `num_train_epochs` and `gradient_accumulation_steps`.
    """
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps / max(-(-batches // args.gradient_accumulation_steps), 1)
    return samples < epochs
