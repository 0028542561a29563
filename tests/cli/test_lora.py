"""`bt-hf lora` in this process: an unmodified pipeline draws with what it saves, and errors are one line."""

import json
import runpy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline

from bt_hf.cli import main
from bt_hf.cli.lora import LoraArguments, parse, unpair
from bt_hf.data.images import to_rgb
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.diffusion.collator import batch_labels
from tiny_models import picture, red_pairs
from tiny_pipelines import draw, save

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_preference_lora.py"
FAST = ["--resolution", "32", "--max_steps", "2", "--logging_steps", "1", "--warmup_steps", "0", "--use_cpu"]
FAST += ["--disable_tqdm", "True", "--report_to", "none", "--save_strategy", "no", "--num_eval_noise_samples", "2"]


class Workplace(NamedTuple):
    """A pipeline, pairs and held-out pairs, all folders, and a LoRA that `bt-hf lora` trained with them."""

    model: str
    pairs: str
    held_out: str
    lora: Path
    printed: list[str]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("cli-lora")
    model = save(folder / "base")
    pairs, held_out, out = folder / "pairs", folder / "held-out", folder / "lora"
    red_pairs(6).save_to_disk(pairs)
    red_pairs(4, seed=1).save_to_disk(held_out)
    config = folder / "taste.yaml"
    config.write_text(
        f"model: {model}\ndataset: {pairs}\neval_dataset: {held_out}\noutput_dir: nowhere\ncache_dir: {folder}/cache\n"
        "learning_rate: 1e-2\nlora_r: 2\nvalidation_prompts: [a red apple, dog]\nvalidation_images: 1\n"
        "validation_inference_steps: 2\n"
    )
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *values, **options: printed.append(" ".join(map(str, values))))
        argv = ["lora", f"--config={config}", "--output_dir", str(out), "--lora_alpha", "6", *FAST]
        assert main(argv) == 0
    return Workplace(model, str(pairs), str(held_out), out, printed)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def test_says_what_it_did_and_what_comes_next(workplace: Workplace) -> None:
    said = "\n".join(workplace.printed)
    assert workplace.printed[0] == "Training on 6 pairs, 4 pairs held out"
    assert ", set from the data" in said
    assert "4 held-out pairs: implicit accuracy " in said
    assert "% against the base's " in said
    assert f"Saved to {workplace.lora}" in said
    assert f"Before | after: {workplace.lora / 'before_after.png'}" in workplace.printed
    assert f"Drawn to {workplace.lora / 'training_curve.png'}" in workplace.printed
    assert workplace.printed[-1] == f'Next: pipeline.load_lora_weights("{workplace.lora}")'
    files = {file.name for file in workplace.lora.iterdir()}
    assert {"README.md", "adapter_model.safetensors", "before_after.png", "training_curve.png"} <= files


def test_an_unmodified_pipeline_draws_with_it(workplace: Workplace) -> None:
    adapter = json.loads((workplace.lora / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 6)
    assert "conv1" in adapter["target_modules"]  # alpha alone leaves the family's layers
    pipeline = DiffusionPipeline.from_pretrained(workplace.model)
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline)
    pipeline.load_lora_weights(workplace.lora)
    assert (draw(pipeline) - before).abs().max() > 1e-4


def test_training_goes_on_and_other_layers(workplace: Workplace, tmp_path: Path, capsys) -> None:
    argv = ["lora", "--dataset", workplace.pairs, *FAST, "--no_plots", "--beta", "500", "--output_dir"]
    assert main([*argv, str(tmp_path / "more"), "--model", str(workplace.lora)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "beta 500" in printed
    assert not list((tmp_path / "more").glob("*.png"))
    assert json.loads((tmp_path / "more" / "adapter_config.json").read_text())["lora_alpha"] == 6
    layers = ["--lora_target_modules", "to_q", "to_v"]
    assert main([*argv, str(tmp_path / "attention"), "--model", workplace.model, *layers]) == 0
    adapter = json.loads((tmp_path / "attention" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], sorted(adapter["target_modules"])) == (8, 8, ["to_q", "to_v"])


def test_kto_takes_pairs_apart(workplace: Workplace, tmp_path: Path, capsys) -> None:
    argv = ["lora", "--model", workplace.model, "--dataset", workplace.pairs, "--loss_type", "kto", *FAST]
    assert main([*argv, "--eval_dataset", workplace.held_out, "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Training on 12 liked or disliked images, 4 pairs held out" in printed
    assert "implicit accuracy" in printed


@pytest.mark.parametrize("streaming", [False, True])
def test_unpaired_rows_keep_soft_labels(streaming: bool) -> None:
    pairs = load_preference_pairs(red_pairs(3, preference=[1.0, 0.25, 0.5], weight=[1.0, 2.0, 3.0]))
    rows = unpair(pairs.to_iterable_dataset() if streaming else pairs)
    rows = list(rows)
    assert batch_labels(rows)["label"].tolist() == [1.0, 0.25, 0.5, 0.0, 0.75, 0.5]
    assert batch_labels(rows)["weight"].tolist() == [1.0, 2.0, 3.0] * 2
    for index, row in enumerate(rows):
        pair = pairs[index % 3]
        assert row["prompt"] == pair["prompt"]
        image = to_rgb(row["completion"], "image")  # a stream may give it encoded
        np.testing.assert_array_equal(image, pair["chosen" if index < 3 else "rejected"])


def test_rows_without_pairs_are_taken_as_they_are(tmp_path: Path) -> None:
    picture((200, 10, 10)).save(tmp_path / "red.png")
    picture((10, 10, 200)).save(tmp_path / "blue.png")
    (tmp_path / "metadata.csv").write_text("prompt,completion,label\na hat,red.png,true\na hat,blue.png,false\n")
    rows, held_out = LoraArguments("m", str(tmp_path)).load_pairs(unpaired=True)
    assert held_out is None
    assert isinstance(rows, Dataset)
    assert list(rows["label"]) == [True, False]
    assert rows[0]["completion"].getpixel((0, 0)) == picture((200, 10, 10)).getpixel((0, 0))


def test_bad_inputs_are_one_line(workplace: Workplace, tmp_path: Path, capsys) -> None:
    def error(*argv: object) -> str:
        assert main(["lora", *map(str, argv)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bt-hf lora: error: ")]
        assert len(lines) == 1, lines
        return lines[0]

    both = ["--model", workplace.model, "--dataset", workplace.pairs, "--use_cpu"]
    assert "required: --model, --dataset" in error()
    assert "loss_type" in error(*both, "--loss_type", "dpoo")
    assert "`beta`" in error(*both, "--beta", "strong")
    assert "nowhere" in error("--model", workplace.model, "--dataset", tmp_path / "nowhere")
    assert "overwrite_output_dir" in error(*both, "--output_dir", workplace.lora)
    adapter = ["--model", workplace.lora, "--dataset", workplace.pairs, "--output_dir", tmp_path]
    assert "leave out `lora_alpha`" in error(*adapter, "--lora_alpha", "2")
    assert "multiple of 8" in error(*both, "--resolution", "30", "--output_dir", tmp_path)


def test_help_teaches(capsys) -> None:
    assert main(["lora", "--help"]) == 0
    text = capsys.readouterr().out
    assert "unpair_preference_dataset" in text
    assert "--dataloader_num_workers" not in text
    assert all(option in text for option in ("--model", "--beta", "--num_noise_samples", "--lora_alpha", "--config"))
    assert main(["lora", "--help_all"]) == 0
    assert "--dataloader_num_workers" in capsys.readouterr().out
    config = parse(["--model", "m", "--dataset", "d"])[2]
    assert (config.output_dir, config.beta) == ("preference-lora", "auto")
    assert config.given_lora_options() == []
    assert parse(["--model", "m", "--dataset", "d", "--beta", "published"])[2].beta == "published"


def test_example(workplace: Workplace, tmp_path: Path, capsys) -> None:
    run = runpy.run_path(str(EXAMPLE))["main"]
    out = tmp_path / "out"
    torch.manual_seed(0)
    argv = ["--model", workplace.model, "--dataset", workplace.pairs, "--eval_dataset", workplace.held_out]
    run([*argv, "--output_dir", str(out), *FAST])
    printed = capsys.readouterr().out
    assert "eval_accuracy" in printed
    assert f'Next: pipeline.load_lora_weights("{out}")' in printed
    assert (out / "pytorch_lora_weights.safetensors").is_file()
