"""`bt-hf reward` in this process: what it prints and saves, and errors of one line."""

import json

from bt_hf.cli import main
from bt_hf.cli.reward import parse
from bt_hf.reward.lora import add_adapter
from bt_hf.reward.scorer import PreferenceScorer
from command_line import Workplace, lines_of_error


def test_reward_says_what_it_found_and_where_it_is(workplace: Workplace) -> None:
    assert "2-fold cross-validation of 12 pairs" in workplace.printed
    assert "8 held-out pairs:" in workplace.printed
    assert f"Saved to {workplace.reward}" in workplace.printed
    files = {file.name for file in workplace.reward.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files
    assert "training_curve.png" in files
    assert "reliability.png" not in files  # 8 pairs would show noise
    assert "No reliability diagram: 8 pairs are too few" in workplace.printed


def test_reward_takes_options_from_yaml_and_from_the_command_line(workplace: Workplace) -> None:
    adapter = json.loads((workplace.reward / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["task_type"]) == (2, 2, None)
    card = (workplace.reward / "README.md").read_text()
    assert "epochs: 2" in card
    assert "peak learning rate: 0.001" in card
    assert "8 held-out pairs" in card
    assert "Cross-validated" in card


def test_reward_goes_on_from_an_adapter_without_cross_validating(workplace: Workplace, tmp_path, capsys) -> None:
    argv = ["reward", "--model", str(workplace.reward), "--dataset", workplace.pairs, "--output_dir", str(tmp_path)]
    assert main([*argv, "--max_steps", "1", "--no_plots", "--disable_tqdm", "True", "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    assert "No cross-validation: the model has an adapter already" in printed
    assert not list(tmp_path.glob("*.png"))


def test_reward_lora_options(workplace: Workplace) -> None:
    argv = ["--model", "m", "--dataset", "d"]
    model = PreferenceScorer.from_pretrained(workplace.model).model
    config = parse(argv)[2]
    assert config.given_lora_options() == []
    assert config.output_dir == "reward-adapter"
    config = parse([*argv, "--lora_alpha", "3", "--lora_target_modules", "q_proj", "v_proj"])[2]
    lora = add_adapter(model, None, config).peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (8, 3, {"q_proj", "v_proj"})


def test_reward_bad_inputs(workplace: Workplace, tmp_path, capsys) -> None:
    def error(*argv: object) -> str:
        lines = lines_of_error(capsys, "reward", *argv)
        assert len(lines) == 1, lines
        assert lines[0].startswith("bt-hf reward: error: ")
        return lines[0]

    (tmp_path / "bad.yaml").write_text("modell: typo\n")
    both = ["--model", workplace.model, "--dataset", workplace.pairs]
    assert "required: --model, --dataset" in error()
    assert "unknown option modell, did you mean model?" in error("--config", tmp_path / "bad.yaml", *both)
    assert "nowhere.yaml" in error("--config", tmp_path / "nowhere.yaml")
    assert "expected one argument" in error(*both, "--config")
    assert "label_smoothing" in error(*both, "--label_smoothing", "3")
    assert "at least 2 folds" in error(*both, "--cross_validate", "1")
    assert "nowhere" in error("--model", workplace.model, "--dataset", tmp_path / "nowhere")
    assert "overwrite_output_dir" in error(*both, "--output_dir", workplace.reward)
    adapter = ["--model", workplace.reward, "--dataset", workplace.pairs, "--output_dir", tmp_path / "out"]
    assert "leave out `lora_r`" in error(*adapter, "--lora_r", "2")
    full = [*both, "--output_dir", tmp_path / "out", "--full_finetuning"]
    assert "`full_finetuning` excludes `lora_r`" in error(*full, "--lora_r", "2", "--cross_validate", "0")
    assert "`lora_r` should be a whole number of at least 1" in error(*both, "--lora_r", "0")
