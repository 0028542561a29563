"""Draw docs/images/tastes.webp: the same prompts and seeds, drawn for four people.

    python docs/draw_tastes.py    # needs the extra `demo`; some minutes on 2 cores

Each person is simulated: they click on 64 pairs of real drawings, always on their own house of artists. A preference
LoRA is trained on these clicks, with the trainer's defaults. The prompts are none of those clicked on.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emoji"))
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from quickstart import DRAWING, SHOWN

from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer
from bt_hf.plots import contact_sheet
from emoji import DIFFUSION_FOLDER, load_emoji
from taste import preference_pairs

PEOPLE = ("mono", "fluent_3d", "twemoji", "noto")
PICTURE = Path(__file__).parent / "images" / "tastes.webp"


def load() -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(DIFFUSION_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(pipeline: DiffusionPipeline) -> list[Image.Image]:
    """Draw each prompt from a seed of its own."""
    generators = [torch.Generator().manual_seed(row) for row in range(len(SHOWN))]
    return pipeline(SHOWN, generator=generators, **DRAWING).images


def learn(taste: str, folder: str) -> DiffusionPipeline:
    """Return a pipeline with a LoRA of one person's clicks."""
    drawings = load_emoji("train")
    shown = {
        concept for concept, caption in zip(drawings["concept"], drawings["caption"], strict=True) if caption in SHOWN
    }
    pairs = preference_pairs(taste, 64, exclude=frozenset(shown))
    pipeline = load()
    args = PreferenceLoRAConfig(folder, report_to="none", save_strategy="no")
    PreferenceLoRATrainer(pipeline, args, train_dataset=pairs).train()
    return pipeline


def main() -> None:
    columns = [draw(load())]
    for taste in PEOPLE:
        with tempfile.TemporaryDirectory() as folder:
            columns.append(draw(learn(taste, folder)))
    rows = list(zip(*columns, strict=True))
    sheet = contact_sheet(
        [row[:1] for row in rows],
        [row[1:] for row in rows],
        prompts=SHOWN,
        titles=("the base", "after 64 clicks of four people"),
        size=112,
    )
    sheet.save(PICTURE, quality=90)


if __name__ == "__main__":
    main()
