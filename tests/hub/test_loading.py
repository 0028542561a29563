"""Published adapters in unmodified libraries, and as the start of a training."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer, pull_adapter, push_adapter
from hub_published import BASE, LORA, PIPELINE, QUIET, TASTE, push
from hub_server import TOKEN, Hub, environment
from tiny_models import picture, red_pairs
from tiny_pipelines import build as build_pipeline
from tiny_pipelines import draw
from tiny_trainers import make

pytest_plugins = ["hub_fixtures"]


CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
SCORES = """
import json, sys
from pathlib import Path
sys.path = [path for path in sys.path if not (Path(path) / "bt_hf").is_dir()]
try:
    import bt_hf
except ImportError:
    pass
else:
    sys.exit("bt_hf is here")
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
base, taste, *images = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), taste).eval()
processor = AutoProcessor.from_pretrained(taste)
images = [Image.open(path).convert("RGB") for path in images]
inputs = processor(text=["a red apple"], images=images, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    print(json.dumps(model(**inputs).logits_per_text[0].tolist()))
"""
IMAGES = """
import sys
from pathlib import Path
sys.path = [path for path in sys.path if not (Path(path) / "bt_hf").is_dir()]
try:
    import bt_hf
except ImportError:
    pass
else:
    sys.exit("bt_hf is here")
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
base, lora, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(lora)
options = dict(height=32, width=32, num_inference_steps=2, guidance_scale=1.0, output_type="pt")
save_file({"image": pipe("a red apple", generator=torch.Generator().manual_seed(0), **options).images[0]}, out)
"""


def run_fresh(code: str, hub: Hub, home: Path, *argv: object) -> str:
    """Run code in a process that has neither bt_hf nor anything in its cache."""
    home.mkdir()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, argv)],
        cwd=home,
        env=environment(hub, home / "hf"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_reward_loads_anywhere_and_scores_the_same(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path
) -> None:
    push(made)
    images = [tmp_path / "first.png", tmp_path / "second.png"]
    picture((220, 40, 40)).save(images[0])
    picture((40, 40, 220)).save(images[1])
    scorer = PreferenceScorer.from_pretrained(made / "my-taste")
    expected = scorer.score("a red apple", images).tolist()
    printed = run_fresh(SCORES, hub, tmp_path / "home", BASE, TASTE, *images)
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)
    published = PreferenceScorer.from_pretrained(TASTE)
    assert published.score("a red apple", images).tolist() == expected
    assert TOKEN.encode() not in b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_lora_loads_anywhere_and_draws_the_same(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path
) -> None:
    push(made, LORA)
    pipeline = build_pipeline("sd")
    plain = draw(pipeline)
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, made / "my-taste-lora").get_base_model()
    expected = draw(pipeline)
    run_fresh(IMAGES, hub, tmp_path / "home", PIPELINE, LORA, tmp_path / "image.safetensors")
    image = load_file(tmp_path / "image.safetensors")["image"]
    assert torch.allclose(image, expected, atol=1e-5)
    assert not torch.allclose(image, plain, atol=1e-2)


def test_code_of_the_published_cards_runs(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    push(made)
    push(made, LORA)
    monkeypatch.chdir(tmp_path)
    picture((220, 40, 40)).save("first.png")
    picture((40, 40, 220)).save("second.png")
    ours, plain = CODE.findall(hub.files(TASTE)["README.md"].decode())
    capsys.readouterr()
    exec(ours, {})
    compared = float(capsys.readouterr().out.splitlines()[0])
    exec(plain, {})
    assert float(capsys.readouterr().out) == pytest.approx(compared, abs=1e-5)
    _, peft = CODE.findall(hub.files(LORA)["README.md"].decode())
    # The tiny pipeline is made for small images.
    exec(peft.replace('"a red apple", ', '"a red apple", height=32, width=32, num_inference_steps=2, '), {})
    with_lora, without = (np.asarray(Image.open(f"{name}.png"), dtype=float) for name in ("with", "without"))
    assert np.abs(with_lora - without).mean() > 1


def test_lora_training_goes_on_from_a_published_id(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path
) -> None:
    push(made, LORA)
    trainer = make(tmp_path, LORA, validation_prompts=["a red apple"], validation_inference_steps=1, max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    assert hub.titles("me/out") == ["End of training"]
    files = hub.files("me/out")
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
    assert set(files) == expected | {"before_after.png", "out_comfyui.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == PIPELINE
    assert "](before_after.png)" in files["README.md"].decode()
    assert pull_adapter("me/out", kind="lora", base_model=made / "tiny-sd").is_dir()


def test_whole_models_are_published_too(hub: Hub, online: Path, made: Path, tmp_path: Path) -> None:
    args = BradleyTerryConfig(str(tmp_path / "whole"), **QUIET, full_finetuning=True, save_strategy="no")
    trainer = BradleyTerryTrainer(str(made / "tiny-clip"), args, red_pairs(4))
    trainer.push_to_hub()
    assert {"config.json", "model.safetensors", "README.md"} < set(hub.files("me/whole"))
    assert str(made).encode() not in hub.everything()
    assert 'AutoModel.from_pretrained("me/whole", dtype=torch.float32)' in hub.files("me/whole")["README.md"].decode()
    assert PreferenceScorer.from_pretrained("me/whole").score("a red apple", [picture((9, 9, 9))]).isfinite().all()


def test_training_goes_on_from_a_published_id(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    push(made)
    trainer = BradleyTerryTrainer(TASTE, BradleyTerryConfig(str(tmp_path / "more"), **QUIET), red_pairs(8))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" in name}
    assert any(value.abs().sum() > 0 for name, value in before.items() if "lora_B" in name)
    trainer.train()
    trainer.save_model()
    push_adapter(tmp_path / "more", TASTE)  # the base's id has come along
    assert len(hub.titles(TASTE)) == 2
