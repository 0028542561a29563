"""Quantised bases: the option, a LoRA that learns beside one, and unmodified diffusers that draws with it."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from peft import PeftModel
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig

from bt_hf import PreferenceLoRAConfig
from bt_hf.cli import main
from bt_hf.diffusion.loading import load_family
from bt_hf.diffusion.quantization import check_unsharded, model_quantization, read_quantization
from tiny_models import red_pairs
from tiny_pipelines import build, draw, save
from tiny_trainers import adapter, logged, make

TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
}


def quantised(folder: str, part: str = "transformer", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A pipeline as diffusers documents it: quantised by whoever loads it."""
    mapping = {part: TorchAoConfig(Int8WeightOnlyConfig())}
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    pipeline = DiffusionPipeline.from_pretrained(folder, quantization_config=config, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def packed(model: Any) -> list[str]:
    return [name for name, value in model.named_parameters() if isinstance(value.data, Int8Tensor)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "part"), [("sd", "unet"), ("sd3", "transformer"), ("qwen", "transformer")])
def test_lora_learns_beside_a_quantised_base(name: str, part: str, checkpointing: bool, tmp_path: Path) -> None:
    """And a LoRA trained on a pipeline that was loaded quantised is the same."""
    base = save(tmp_path / "base", name)
    options = {"max_steps": 30, "learning_rate": 3e-3, "num_noise_samples": 1, "gradient_checkpointing": checkpointing}
    trainer = make(tmp_path / "named", base, quantization_config="torchao", **options)
    assert packed(trainer.pipeline.components[part])
    trained = {value.dtype for value in trainer.model.parameters() if value.requires_grad}
    assert trained == {torch.float32}
    trainer.train()
    trainer.save_model()
    losses = logged(trainer, "loss")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert "- quantisation of the base: torchao\n" in (tmp_path / "named" / "out" / "README.md").read_text()

    given = make(tmp_path / "given", quantised(base, part), **options)
    given.train()
    given.save_model()
    one, other = (adapter(tmp_path / folder / "out") for folder in ("named", "given"))
    assert all(torch.equal(other[key], value) for key, value in one.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unmodified_diffusers_draws_with_it(dtype: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", "sd3")
    trainer = make(tmp_path, base, quantization_config="torchao", dtype=dtype, learning_rate=3e-2)
    trainer.train()
    trainer.save_model()
    fresh = quantised(base, dtype=getattr(torch, dtype))
    before = draw(fresh)
    fresh.load_lora_weights(tmp_path / "out")
    with_lora = draw(fresh)
    # In bfloat16 diffusers rounds the LoRA, too, which the trainer holds in float32.
    close = {"atol": 1e-5 if dtype == "float32" else 0.03, "rtol": 0}
    assert not torch.allclose(with_lora, before, atol=0.02)
    own = quantised(base, dtype=getattr(torch, dtype))
    own.transformer = trainer.pipeline.transformer
    torch.testing.assert_close(draw(own), with_lora, **close)
    with trainer.model.disable_adapter():
        torch.testing.assert_close(draw(own), before, atol=1e-5, rtol=0)
    again = quantised(base, dtype=getattr(torch, dtype))
    again.transformer = PeftModel.from_pretrained(again.transformer, tmp_path / "out").get_base_model()
    torch.testing.assert_close(draw(again), with_lora, **close)
    # The base as it was published draws with it, too, but for what quantisation has rounded.
    plain = build("sd3")
    plain.load_lora_weights(tmp_path / "out")
    assert (draw(plain) - with_lora).abs().max() < 0.3 * (with_lora - before).abs().max()


def test_training_goes_on_from_a_lora(tmp_path: Path) -> None:
    first = make(tmp_path / "first", save(tmp_path / "base", "sd3"), quantization_config="torchao", max_steps=1)
    first.train()
    first.save_model()
    second = make(tmp_path / "second", str(tmp_path / "first" / "out"), quantization_config="torchao", max_steps=1)
    assert packed(second.pipeline.transformer)
    second.train()
    second.save_model()
    assert not torch.equal(*(next(iter(adapter(tmp_path / run / "out").values())) for run in ("first", "second")))


def test_only_the_denoiser_is_quantised(tmp_path: Path) -> None:
    family, _ = load_family(save(tmp_path, "sd3"), quantization=TORCHAO)
    parts = {name: part for name, part in family.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert [name for name, part in parts.items() if packed(part)] == ["transformer"]


def test_a_pipeline_saved_quantised_is_one(tmp_path: Path) -> None:
    quantised(save(tmp_path / "base", "sd3")).save_pretrained(tmp_path / "small")
    trainer = make(tmp_path, str(tmp_path / "small"), max_steps=1)
    assert packed(trainer.pipeline.transformer)
    trainer.train()


def test_from_the_command_line(tmp_path: Path) -> None:
    """The file of `--bnb_quantization_config_path` is one for bitsandbytes; here it is torchao's."""
    (tmp_path / "int8.json").write_text(json.dumps(TORCHAO))
    base, pairs = save(tmp_path / "base", "sd3"), tmp_path / "pairs"
    pairs.mkdir()
    red_pairs(4).to_parquet(pairs / "train.parquet")
    argv = ["lora", "--model", base, "--dataset", str(pairs), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    argv += ["--max_steps", "1", "--resolution", "32", "--quantization_config", str(tmp_path / "int8.json")]
    assert main([*argv, "--cache_dir", str(tmp_path / "cache"), "--no_plots", "--report_to", "none"]) == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


# --- The option ---


def test_every_spelling_is_one_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TORCHAO))
    spelt = ["torchao", TORCHAO, json.dumps(TORCHAO), str(tmp_path / "config.json"), tmp_path / "config.json"]
    assert all(read_quantization(one) == TORCHAO for one in spelt)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    for option in (*spelt, config):
        values = PreferenceLoRAConfig(str(tmp_path), report_to="none", quantization_config=option).quantization_config
        json.dumps(values)  # it goes into logs
        made = model_quantization(values, "float32")
        assert made.to_dict() == config.to_dict()


def test_bitsandbytes_computes_in_the_dtype_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of bitsandbytes runs here: its config asks for the version alone."""
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.50" if name == "bitsandbytes" else known(name))
    made = model_quantization(read_quantization("bitsandbytes_4bit"), "bfloat16")
    expected = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    assert made.to_dict() == expected.to_dict()
    given = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_use_double_quant": True}
    made = model_quantization(given, "bfloat16")
    assert made.bnb_4bit_compute_dtype == torch.float16
    assert made.bnb_4bit_use_double_quant
    made = model_quantization(read_quantization(expected), "float32")
    assert made.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("4bits", "should be bitsandbytes_4bit, bitsandbytes_8bit, torchao, .* but got '4bits'"),
        ("[1]", "should be bitsandbytes_4bit"),
        ('{"load_in_4bit": ', "should be bitsandbytes_4bit"),
        (["torchao"], "should be a JSON object"),
        (8, "should be a JSON object"),
        ({"quant_type": torch.int8}, "not JSON serializable"),
    ],
)
def test_options_that_are_none(option: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PreferenceLoRAConfig(str(tmp_path), report_to="none", quantization_config=option)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, "no `quant_method` attribute"),
        ({"quant_method": "gptq"}, "Unknown quantization type, got gptq"),
        ({"quant_method": "torchao"}, "quant_type"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int7", "_data": {}}}}, "Int7"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "only one can be used"),
    ],
)
def test_values_that_no_backend_takes(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        model_quantization(values, "float32")
    assert "\n" not in str(error.value)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is for a pipeline given by its name"):
        make(tmp_path, "sd", quantization_config="torchao")
    base = save(tmp_path / "base", "sd3")
    loaded = quantised(base).transformer
    check_unsharded(loaded, sharded=False)
    check_unsharded(build("sd3").transformer, sharded=True)
    with pytest.raises(ValueError, match="FSDP or DeepSpeed"):
        check_unsharded(loaded, sharded=True)

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match="`pip install bitsandbytes`"):
        make(tmp_path, base, quantization_config="bitsandbytes_4bit")
