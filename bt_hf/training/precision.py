"""Precision that a device computes in fastest."""

from typing import Any

import torch


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
