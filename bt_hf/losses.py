"""The Bradley-Terry model: pure functions of tensors, per example."""

import torch
import torch.nn.functional as F


def bradley_terry_loss(
    margin: torch.Tensor, preference: torch.Tensor | float = 1.0, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Negative log-likelihood of a preference under the Bradley-Terry model.

    P(chosen preferred to rejected) = sigmoid(margin), and the loss is the cross-entropy between that and
    `preference`: -(p log sigmoid(margin) + (1 - p) log sigmoid(-margin)). A tie is `preference=0.5`.

    Args:
        margin: Reward of the chosen minus reward of the rejected, any shape, floating point.
        preference: P(chosen preferred to rejected) in [0, 1]; broadcasts against `margin`. Default 1.
        label_smoothing: Probability that a label is flipped, in [0, 0.5]: p becomes
            p (1 - label_smoothing) + (1 - p) label_smoothing, as in conservative DPO. Default 0.

    Returns:
        The loss of each example, of the broadcast shape of `margin` and `preference`. Not reduced.

    Raises:
        ValueError: `label_smoothing` is outside [0, 0.5].

    Source:
        Gallego, Fast Adaptation with Bradley-Terry Preference Models (https://arxiv.org/abs/2308.07929).

    Example:
        >>> import torch
        >>> from bt_hf import bradley_terry_loss
        >>> bradley_terry_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5]))
        tensor([0.6931, 1.1269])
    """
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"`label_smoothing` should be in [0, 0.5], but got {label_smoothing}.")
    target = torch.as_tensor(preference, dtype=margin.dtype, device=margin.device)
    target = target * (1 - label_smoothing) + (1 - target) * label_smoothing
    # -log sigmoid(-m) = m - log sigmoid(m), so one logsigmoid serves both terms.
    return (1 - target) * margin - F.logsigmoid(margin)


def agreement(margin: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """Agreement of a margin's sign with the preference: 1, or 0, or 0.5 where the margin is 0, a coin toss.

    Args:
        margin: (B,) reward of the chosen minus reward of the rejected.
        preference: (B,) P(chosen preferred to rejected). A tie (0.5) has no right answer: leave such rows out.

    Returns:
        (B,) in the dtype of `margin`; their mean is the accuracy.

    Source:
        The tensor counterpart of `bt_hf.metrics.agreement`, which defines it.

    Example:
        >>> import torch
        >>> from bt_hf.losses import agreement
        >>> agreement(torch.tensor([2.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
        tensor([1.0000, 0.0000, 0.5000])
    """
    return 0.5 + 0.5 * margin.sign() * (preference - 0.5).sign().to(margin.dtype)


def alignment_loss(reward: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How far the adapted model retrieves images differently from its base: KL(base || adapted), in nats.

    Each prompt's softmax over a group of images is held to the base's. A group holds only chosen or only rejected
    images, never both: which of the two drawings of a prompt is better is what the adapter is there to change.

    Args:
        reward: (prompts, images) rewards of the adapted model, one group.
        reference: (prompts, images) rewards of the base, same group.

    Returns:
        (prompts,) KL divergence of each prompt.
    """
    target = reference.log_softmax(dim=-1)
    return F.kl_div(reward.log_softmax(dim=-1), target, reduction="none", log_target=True).sum(dim=-1)
