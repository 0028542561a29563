"""Precision that a device computes in fastest."""

import logging
import os
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def multiplies_bfloat16(use_cpu: bool = False) -> bool:
    """True if the device of a training multiplies in bfloat16 by itself, rather than by way of float32.

    Args:
        use_cpu: Whether training is kept on the CPU though there may be an accelerator.

    Returns:
        True for NVIDIA GPUs from Ampere on, AMD GPUs, and CPUs with AMX or AVX512-BF16. False for other accelerators,
        about which PyTorch does not tell whether they emulate it.
    """
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not use_cpu and torch.accelerator.is_available():
        return False
    # PyTorch 2.6 has no list of capabilities yet; float32 is right there as well.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def take_precision(args: TrainingArguments) -> None:
    """Let accelerate compute in the precision of `args`, whatever an earlier training of this process computed in.

    accelerate keeps one precision for a process, and refuses another: a reward in float32 and then a preference LoRA
    in bfloat16, whose configs were made before either, would not start.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = "bf16" if args.bf16 else "fp16" if args.fp16 else launched
    if wanted == "bf16" and args.device.type == "cpu" and not multiplies_bfloat16(use_cpu=True):
        logger.warning(
            "This CPU emulates bfloat16, which is many times slower than float32: leave out `bf16`, or the launcher's "
            "mixed precision."
        )
    if is_initialized() and not args.deepspeed and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()
