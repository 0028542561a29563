"""`bt-hf pairs` in this process: what it draws is what the library draws, and errors are one line."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
import tiny_pipelines
from bt_hf import PreferenceScorer, generate_preference_pairs, load_preference_pairs
from bt_hf.cli import main
from bt_hf.cli.pairs import load_pipeline, read_prompts
from bt_hf.diffusion.families.base import find_family

PROMPTS = ["a red apple", "the old house"]


class Workplace(NamedTuple):
    """A pipeline, a reward, prompts in a file, pairs of which one column is prompts, and a LoRA, all folders."""

    model: str
    reward: str
    prompts: str
    pairs: str
    lora: str

    def argv(self, *options: object) -> list[str]:
        fast = ["--steps", "2", "--height", "32", "--width", "32", "--device", "cpu", "--candidates", "3"]
        return ["pairs", self.model, "--scorer", self.reward, *fast, *map(str, options)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("cli-pairs")
    model = tiny_pipelines.save(folder / "model")
    reward = tiny_models.save(folder / "reward")
    (folder / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n  {PROMPTS[1]} \n", encoding="utf-8")
    tiny_models.red_pairs(6).save_to_disk(folder / "pairs")
    pipeline = tiny_pipelines.build("sd")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
    find_family(pipeline).save_lora(adapted, folder / "lora")
    adapted.save_pretrained(folder / "lora")
    return Workplace(model, reward, str(folder / "prompts.txt"), str(folder / "pairs"), str(folder / "lora"))


def line_of_error(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bt-hf pairs: error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_draws_what_the_library_draws(workplace: Workplace, tmp_path: Path, capsys) -> None:
    out = tmp_path / "my-pairs"
    argv = workplace.argv("--prompts", workplace.prompts, "--output_dir", out, "--soft_labels", "--guidance_scale", 2)
    assert main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "2 pairs, of 2 of 2 prompts, from 3 images for each.",
        f"Saved to {out}",
        f"Next: bt-hf lora --model {workplace.model} --dataset {out} --output_dir my-taste-lora",
    ]
    expected = generate_preference_pairs(
        workplace.model,
        PROMPTS,
        PreferenceScorer.from_pretrained(workplace.reward),
        candidates=3,
        soft_labels=True,
        num_inference_steps=2,
        height=32,
        width=32,
        guidance_scale=2.0,
    )
    pairs = load_preference_pairs(out)
    for name in ("prompt", "chosen_seed", "rejected_seed", "preference", "chosen_reward"):
        assert list(pairs[name]) == list(expected[name])
    assert pairs[0]["chosen"].tobytes() == expected[0]["chosen"].tobytes()
    # Once more is done already, and with another option something else.
    assert main(argv) == 0
    assert "other settings (seed was 0, is 1)" in line_of_error(capsys, [*argv, "--seed", "1"])


def test_prompts_of_a_dataset(workplace: Workplace, tmp_path: Path) -> None:
    argv = workplace.argv("--dataset", workplace.pairs, "--split", "train", "--output_dir", tmp_path / "pairs")
    assert main([*argv, "--batch_size", "9", "--negative_prompt", "a lamp"]) == 0
    assert sorted(set(load_preference_pairs(tmp_path / "pairs")["prompt"])) == sorted(tiny_models.prompts(6))


def test_a_lora_changes_what_is_drawn(workplace: Workplace, tmp_path: Path, capsys) -> None:
    plain = load_pipeline(workplace.model, None, torch.float32, "cpu")
    adapted = load_pipeline(workplace.model, workplace.lora, torch.float32, "cpu")
    plain.set_progress_bar_config(disable=True)
    adapted.set_progress_bar_config(disable=True)
    assert (tiny_pipelines.draw(plain) - tiny_pipelines.draw(adapted)).abs().max() > 0.01
    argv = workplace.argv("--prompts", workplace.prompts, "--output_dir", tmp_path / "pairs")
    assert main(argv) == 0
    assert "other settings (pipeline_weights was" in line_of_error(capsys, [*argv, "--lora", workplace.lora])


def test_dtype(workplace: Workplace) -> None:
    assert load_pipeline(workplace.model, None, torch.bfloat16, "cpu").unet.dtype == torch.bfloat16


def test_read_prompts(workplace: Workplace, tmp_path: Path) -> None:
    assert read_prompts(workplace.prompts, None, "prompt", None) == PROMPTS
    table = tmp_path / "table.csv"
    table.write_text("text,number\na red apple,1\nthe old house,2\na red apple,3\n,4\n")
    assert read_prompts(None, str(table), "text", None) == PROMPTS
    with pytest.raises(ValueError, match="no column 'prompt'; name one of text, number in --column"):
        read_prompts(None, str(table), "prompt", None)
    assert read_prompts(None, str(table), "number", None) == ["1", "2", "3", "4"]
    (tmp_path / "table.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(ValueError, match="'number' should hold texts, but has int"):
        read_prompts(None, str(tmp_path / "table.jsonl"), "number", None)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="expected at least one prompt, but found none"):
        read_prompts(str(tmp_path / "empty.txt"), None, "prompt", None)
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="should be a text file in UTF-8"):
        read_prompts(str(tmp_path / "image.txt"), None, "prompt", None)


def test_bad_inputs(workplace: Workplace, tmp_path: Path, capsys) -> None:
    def error(*options: Any, **changed: str) -> str:
        return line_of_error(capsys, workplace._replace(**changed).argv("--output_dir", tmp_path / "out", *options))

    file = ("--prompts", workplace.prompts)
    assert "one of the arguments --prompts --dataset is required" in error()
    assert "not allowed with" in error(*file, "--dataset", workplace.pairs)
    assert "nowhere.txt" in error("--prompts", "nowhere.txt")
    assert "at least twice --pairs_per_prompt, but got 3" in error(*file, "--pairs_per_prompt", 2)
    assert "at least 1, but got '0'" in error(*file, "--steps", 0)
    assert "nowhere" in error(*file, model=str(tmp_path / "nowhere"))
    assert "nowhere" in error(*file, reward=str(tmp_path / "nowhere"))
    assert "nowhere" in error(*file, "--lora", tmp_path / "nowhere")
    assert "no such local file" in error("--dataset", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
