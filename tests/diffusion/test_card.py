"""Cards of preference LoRAs: metadata that the Hub takes, code that runs, and nothing that is not known."""

import ast
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from bt_hf.diffusion.card import write_lora_card
from bt_hf.diffusion.families.base import find_family
from bt_hf.hub.cards import template_folder
from tiny_pipelines import build, save

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAIRS, HELD_OUT = range(12), range(5)  # all that a card wants to know of them is how many there are


def evaluation(prefix: str = "eval_", **numbers: float) -> dict[str, float]:
    known = {"accuracy": 0.8, "accuracy_low": 0.6, "accuracy_high": 0.95, "winner_error_change": -0.0012}
    return {prefix + key: value for key, value in (known | numbers).items()}


def trainer_of(model: PeftModel | None = None, family: object = None, **facts: object) -> SimpleNamespace:
    args = SimpleNamespace(
        output_dir="my-taste-lora",
        loss_type="dpo",
        beta="auto",
        safeguard=True,
        seed=42,
        max_steps=7,
        num_train_epochs=3.0,
        resolution=32,
        validation_prompts=["a red apple", 'a "zebra"'],
    )
    state = SimpleNamespace(global_step=7, log_history=[{"loss": 1.0}, evaluation()])
    known = {"args": args, "beta": 1234.5, "model": model, "family": family, "state": state, "base_name": "tiny-sd"}
    return SimpleNamespace(**known | {"train_dataset": PAIRS, "eval_dataset": HELD_OUT} | facts)


def card_of(trainer: object, folder: Path) -> ModelCard:
    folder.mkdir(exist_ok=True)
    write_lora_card(folder, trainer)
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, `tiny-sd`, and what a trainer writes, `my-taste-lora`."""
    folder = tmp_path_factory.mktemp("lora-cards")
    base = save(folder / "tiny-sd", "sd")
    pipeline = build("sd")
    family = find_family(pipeline)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=family.target_modules)
        model = get_peft_model(pipeline.unet, config)
    model.save_pretrained(folder / "my-taste-lora")
    family.save_lora(model, folder / "my-taste-lora")
    Image.new("RGB", (8, 8)).save(folder / "my-taste-lora" / "before_after.png")
    write_lora_card(folder / "my-taste-lora", trainer_of(model, family, base_name=base, pipeline=pipeline))
    return folder


def test_card_says_what_is_known(published: Path) -> None:
    card = ModelCard.load(published / "my-taste-lora" / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    tags = ["bt_hf", "lora", "diffusers", "text-to-image", "preference", "diffusion-dpo", "stable-diffusion"]
    assert card.data.tags == tags
    (accuracy,) = card.data.eval_results
    assert (accuracy.task_type, accuracy.dataset_name) == ("text-to-image", "5 held-out pairs")
    assert accuracy.metric_value == 0.8
    assert accuracy.metric_args == {"low_95": 0.6, "high_95": 0.95}
    for fact in (
        "on 12 pairs, with the loss `dpo` and beta 1234 (set from the data).",
        "**0.800** (95 % interval 0.600 to 0.950)",
        "The denoising error of the preferred images fell by 0.0012.",
        "](before_after.png)",
        'a row for each prompt: "a red apple", "a \\"zebra\\"".',
        "`StableDiffusionPipeline`",
        "- steps: 7",
        "- safeguard: on",
        "- size of the images: 32 x 32",
        "- rank: 2",
        "- alpha: 6",
        "layers: `conv1`, ",
    ):
        assert fact in card.text
    assert "- epochs" not in card.text  # `max_steps` decides
    assert "Seen while" not in card.text


def test_card_keeps_local_paths_private(published: Path) -> None:
    card = ModelCard.load(published / "my-taste-lora" / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "path/to/tiny-sd" in card.text
    assert str(published) not in card.content


def test_code_of_the_card_runs(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(published)
    plain, peft = CODE.findall(Path("my-taste-lora/README.md").read_text())

    def run(code: str, *names: str) -> list[np.ndarray]:
        for name in names:
            Path(name).unlink(missing_ok=True)
        # The tiny pipeline is made for small images.
        call = 'pipe("a red apple", height=32, width=32, num_inference_steps=2, '
        exec(code.replace("path/to/tiny-sd", "tiny-sd").replace('pipe("a red apple", ', call), {})
        return [np.asarray(Image.open(name), dtype=float) for name in names]

    with_lora, half = run(plain, "with.png", "half.png")
    with_peft, without = run(peft, "with.png", "without.png")
    assert np.abs(with_lora - with_peft).max() <= 1  # rounding to 8 bits
    assert np.abs(with_lora - half).mean() > 1
    assert np.abs(half - without).mean() > 1


def test_card_of_a_hub_model_names_it(tmp_path: Path) -> None:
    trainer = trainer_of(base_name="stable-diffusion-v1-5/stable-diffusion-v1-5")
    trainer.args.hub_model_id = "me/my-taste-lora"
    card = card_of(trainer, tmp_path)
    assert card.data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert 'load_lora_weights("me/my-taste-lora"' in card.text
    assert "path/to" not in card.text
    assert "before_after" not in card.text  # there is no such file


def test_card_of_a_transformer_names_it(tmp_path: Path) -> None:
    card = card_of(trainer_of(family=SimpleNamespace(name="flux", denoiser="transformer")), tmp_path)
    assert "PeftModel.from_pretrained(pipe.transformer," in card.text
    assert card.data.tags[-1] == "flux"


@pytest.mark.parametrize(
    "trainer",
    [
        SimpleNamespace(),
        SimpleNamespace(args=None, model=None, state=None, family=None, base_name=None, beta=None, train_dataset=None),
        SimpleNamespace(train_dataset=iter([]), state=SimpleNamespace(log_history=[{"loss": 1.0, "step": 1}])),
        SimpleNamespace(state=SimpleNamespace(log_history=[evaluation(accuracy=math.nan)])),
    ],
)
def test_card_without_facts_makes_nothing_up(trainer: SimpleNamespace, tmp_path: Path) -> None:
    card = card_of(trainer, tmp_path)
    assert card.data.eval_results is None
    assert not re.search(r"More Information|None|nan|\{\{|\}\}|\n\n\n", card.content)
    assert "How good it is" not in card.text
    for code in CODE.findall(card.text):
        ast.parse(code)


def test_optional_sections_keep_their_distance(published: Path) -> None:
    text = (published / "my-taste-lora" / "README.md").read_text()
    assert not re.search(r"None|\bnan\b|\{\{|\}\}|\n\n\n", text)
    assert not re.search(r"[^\n]\n#", text)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"winner_error_change": 0.002, "winner_error_base": 0.1}, "rose by 0.002 (2 % of the base's)."),
        ({"winner_error_change": -0.002, "winner_error_base": 0.1}, "fell by 0.002 (2 % of the base's)."),
        ({"winner_error_change": 0.0}, "did not change."),
    ],
)
def test_change_of_the_winners_error_in_words(numbers: dict[str, float], words: str, tmp_path: Path) -> None:
    trainer = trainer_of(state=SimpleNamespace(log_history=[evaluation(**numbers)]))
    assert f"The denoising error of the preferred images {words}" in card_of(trainer, tmp_path).text


def test_several_evaluations_and_warnings(tmp_path: Path) -> None:
    entry = evaluation("eval_mine_") | evaluation("eval_yours_", accuracy=0.5)
    state = SimpleNamespace(log_history=[evaluation("eval_mine_", accuracy=0.1), entry])
    card = card_of(trainer_of(state=state, warnings_seen=["Step 3: they become all alike."]), tmp_path)
    results = [(result.dataset_name, result.metric_value) for result in card.data.eval_results]
    assert results == [("the held-out pairs mine", 0.8), ("the held-out pairs yours", 0.5)]
    assert "- Step 3: they become all alike." in card.text


def test_card_of_unpaired_rows_and_of_a_loss_without_beta(tmp_path: Path) -> None:
    trainer = trainer_of()
    trainer.args.loss_type = "kto"
    assert "on 12 liked or disliked images, with the loss `kto`" in card_of(trainer, tmp_path).text
    trainer.args.loss_type = "sft"
    assert "beta" not in card_of(trainer, tmp_path).text


def test_template_is_found() -> None:
    assert (template_folder() / "preference_lora.md").is_file()


def test_prompts_are_quoted_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "before_after.png").touch()
    trainer = trainer_of()
    trainer.args.validation_prompts = ["a dog's café", "*red* <b> a_b"]
    assert r"""prompt: "a dog's café", "\*red\* \<b\> a\_b".""" in card_of(trainer, tmp_path).text


def test_chance_within_the_interval_is_said(tmp_path: Path) -> None:
    def text(low: float) -> str:
        state = SimpleNamespace(log_history=[evaluation(accuracy_low=low)])
        return card_of(trainer_of(state=state), tmp_path).text

    assert "Chance lies within this interval" in text(0.4)
    assert "Chance lies" not in text(0.6)


def test_training_in_words(tmp_path: Path) -> None:
    (tmp_path / "training_curve.png").touch()
    trainer = trainer_of()
    trainer.args.loss_type, trainer.args.train_batch_size, trainer.args.label_smoothing = "kto", 32, 0.0
    trainer.args.device = torch.device("mps")
    trainer.state.log_history = [{"train_runtime": 20000.0}]
    text = card_of(trainer, tmp_path).text
    for fact in ("images: 12", "images in a batch: 12", "label smoothing: 0\n", "time of the steps: 5.56 h", "MPS ("):
        assert fact in text
    assert "](training_curve.png)" in text
