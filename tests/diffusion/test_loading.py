"""Train pipelines that are wrapped or adapted, load the result in unmodified diffusers, and look at what is left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from diffusers import DiffusionPipeline
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments
from trl import unpair_preference_dataset

from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer
from bt_hf.diffusion.families.sd import UNET_LAYERS
from tiny_models import red_pairs
from tiny_pipelines import SIZE, build, draw
from tiny_trainers import adapter, make


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": UNET_LAYERS, **options})


def drawn_with(folder: Path, name: str = "sd") -> torch.Tensor:
    """Draw with an unmodified pipeline and the LoRA of a folder."""
    pipeline = build(name)
    pipeline.load_lora_weights(folder)
    return draw(pipeline)


# --- Wrappers ---


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize(
    ("part", "wrap"),
    [
        ("unet", compiled),
        ("unet", nn.DataParallel),
        ("unet.mid_block", compiled),
        ("vae", nn.DataParallel),
        ("text_encoder", compiled),
    ],
)
def test_wrapped_parts_train_as_plain_ones(part: str, wrap: Any, tmp_path: Path) -> None:
    pipeline = build()
    owner, _, name = part.rpartition(".")
    owner = getattr(pipeline, owner) if owner else pipeline
    setattr(owner, name, wrap(getattr(owner, name)))
    ends = []
    for folder, model in (("plain", build()), ("wrapped", pipeline)):
        trainer = make(tmp_path / folder, model, overwrite_output_dir=True)
        trainer.train()
        trainer.save_model()
        ends.append(adapter(tmp_path / folder / "out"))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())
    images = [drawn_with(tmp_path / folder / "out") for folder in ("plain", "wrapped")]
    assert images[1].isfinite().all()
    assert torch.equal(*images)


# --- Adapters: off is the base, on is what diffusers loads ---

PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 11},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.1},
    "dropout": {"lora_dropout": 0.5},
    "rank pattern": {"rank_pattern": {"to_q": 2, "conv1": 8}, "alpha_pattern": {"to_q": 7}},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": ["to_q", "to_k"]},
    "random": {"init_lora_weights": False},
}


@pytest.mark.parametrize(
    ("name", "channels_last"), [*((name, True) for name in PLAIN), ("plain", False), ("dora", False)]
)
def test_on_is_what_diffusers_loads_and_off_is_the_base(name: str, channels_last: bool, tmp_path: Path) -> None:
    trainer = make(tmp_path, peft=lora(**PLAIN[name]), channels_last=channels_last, learning_rate=3e-2, max_steps=2)
    trainer.train()
    trainer.save_model()
    own = build()
    own.unet = trainer.pipeline.unet
    expected = draw(build())
    with trainer.model.disable_adapter():
        torch.testing.assert_close(draw(own), expected, atol=1e-5, rtol=0)
    on = draw(own)
    assert (on - expected).abs().max() > 1e-3
    torch.testing.assert_close(drawn_with(tmp_path / "out"), on, atol=1e-4, rtol=0)
    again = build()
    again.unet = PeftModel.from_pretrained(again.unet, tmp_path / "out").get_base_model()
    torch.testing.assert_close(draw(again), on, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(init_lora_weights="pissa", target_modules=["to_q"]), "`init_lora_weights='pissa'` rewrites"),
        (lora(init_lora_weights="olora", target_modules=["to_q"]), "`init_lora_weights='olora'` rewrites"),
        (AdaLoraConfig(init_r=4, target_r=2, total_step=3, target_modules=["to_q"]), "got AdaLoraConfig"),
        (LoHaConfig(r=2, target_modules=["to_q"]), "got LoHaConfig"),
        (lora(modules_to_save=["conv_in"]), "`modules_to_save`"),
        (lora(bias="all"), "bias='all'"),
    ],
    ids=["pissa", "olora", "adalora", "loha", "whole modules", "biases"],
)
@pytest.mark.parametrize("ready", [True, False], ids=["ready made", "config"])
def test_adapters_that_lose_the_base_or_the_client_are_refused(
    config: Any, message: str, ready: bool, tmp_path: Path
) -> None:
    pipeline = build()
    if ready:
        pipeline.unet = get_peft_model(pipeline.unet, config)
        with pytest.raises(ValueError, match=r"rewrites|got \w+Config|modules_to_save|bias"):
            make(tmp_path, pipeline)
        return
    expected = draw(pipeline)
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path, pipeline, peft=config)
    assert "\n" not in str(error.value)
    assert torch.equal(draw(pipeline), expected)
    make(tmp_path, pipeline)  # the same pipeline, once more


def test_a_denoiser_loaded_for_use_alone_is_trained(tmp_path: Path) -> None:
    first = make(tmp_path / "first")
    first.train()
    first.save_model()
    pipeline = build()
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, tmp_path / "first" / "out")
    second = make(tmp_path / "second", pipeline)
    second.train()
    second.save_model()
    before, after = adapter(tmp_path / "first" / "out"), adapter(tmp_path / "second" / "out")
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_names_are_compared_before_anything_is_written(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.model.base_model.model.mid_block = torch.compile(trainer.model.base_model.model.mid_block, backend="eager")
    with pytest.raises(ValueError, match="no module 'mid_block._orig_mod"):
        trainer.save_model()
    assert not list((tmp_path / "out").glob("*.safetensors"))


# --- The pipeline afterwards ---


@pytest.mark.parametrize("fails", [True, False], ids=["stopped by an error", "to its end"])
def test_the_pipeline_is_left_as_diffusers_loads_one(fails: bool, tmp_path: Path) -> None:
    pipeline = build()
    expected = draw(pipeline)
    trainer = make(tmp_path, pipeline, gradient_checkpointing=True, learning_rate=3e-2)
    if fails:
        trainer.args.max_steps = 2
        trainer.compute_loss = None  # type: ignore[method-assign]
        with pytest.raises(TypeError):
            trainer.train()
    else:
        trainer.train()
    unet = pipeline.unet
    assert not any(module.training for module in unet.modules())
    assert not unet.is_gradient_checkpointing
    assert all(value.is_contiguous() for value in unet.parameters())
    if fails:
        return
    on = draw(pipeline)
    assert pipeline.get_active_adapters() == ["default"]
    pipeline.disable_lora()
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-5, rtol=0)
    pipeline.enable_lora()
    torch.testing.assert_close(draw(pipeline), on, atol=1e-5, rtol=0)
    pipeline.set_adapters("default", 0.0)
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-5, rtol=0)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-5, rtol=0)
    assert pipeline.unet.state_dict().keys() == build().unet.state_dict().keys()


def test_training_twice_is_training_on(tmp_path: Path) -> None:
    trainer = make(tmp_path, gradient_checkpointing=True)
    for _ in range(2):
        trainer.train()
        assert not trainer.pipeline.unet.is_gradient_checkpointing
        assert not trainer.pipeline.unet.training


# --- Rows and arguments ---


@pytest.mark.parametrize(("column", "cached"), [("label", True), ("label", False), ("completion", True)])
def test_further_columns_of_pairs_are_not_mistaken(column: str, cached: bool, tmp_path: Path) -> None:
    pairs = red_pairs(4, preference=[1.0, 0.0, 0.5, 0.7])
    more = pairs.add_column(column, [0, 1, 1, 0] if column == "label" else ["no", "image", "at", "all"])
    ends = []
    for index, rows in enumerate((pairs, more)):
        trainer = make(tmp_path / str(index), pairs=rows, evaluation=rows, cache_latents=cached, max_steps=1)
        trainer.train()
        ends.append(trainer.evaluate()["eval_log_loss"])
    assert ends[0] == ends[1]


def test_kto_takes_no_pairs_that_have_a_label(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes unpaired rows"):
        make(tmp_path, pairs=red_pairs(4).add_column("label", [0, 1, 1, 0]), loss_type="kto")
    rows = unpair_preference_dataset(red_pairs(4))
    make(tmp_path, pairs=rows.add_column("note", ["x"] * 8), loss_type="kto", max_steps=1).train()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train_dataset", red_pairs(2).to_dict(), r"`train_dataset` .* got dict: make a dataset of these columns"),
        ("train_dataset", DatasetDict(train=red_pairs(2)), "`train_dataset` .* got DatasetDict: pick a split: train"),
        ("train_dataset", "pairs/", "`train_dataset` .* got str: load it by `load_preference_pairs"),
        ("eval_dataset", red_pairs(2).to_dict(), "`eval_dataset` .* got dict: make a dataset of these columns"),
        ("eval_dataset", {"new": red_pairs(2).to_dict()}, r"`eval_dataset\['new'\]` .* got dict"),
        ("args", TrainingArguments("mine", report_to="none"), r"`PreferenceLoRAConfig\('mine', ...\)`"),
        ("args", "mine", "should be a `PreferenceLoRAConfig`, but got str"),
    ],
)
def test_arguments_of_another_kind_are_named(name: str, value: Any, message: str, tmp_path: Path) -> None:
    args = PreferenceLoRAConfig(str(tmp_path), report_to="none", resolution=SIZE[0], use_cpu=True)
    arguments = {"args": args, "train_dataset": red_pairs(2), name: value}
    with pytest.raises(TypeError, match=message) as error:
        PreferenceLoRATrainer(build(), **arguments)
    assert "\n" not in str(error.value)


def test_one_prompt_is_one_prompt(tmp_path: Path) -> None:
    options = {"validation_images": 1, "validation_inference_steps": 1, "max_steps": 1}
    trainer = make(tmp_path, validation_prompts="a cat", **options)
    assert trainer.args.validation_prompts == trainer.validation.prompts == ["a cat"]


@pytest.mark.parametrize(
    ("name", "part"),
    [("sdxl", "text_encoder_2"), ("sdxl", "tokenizer_2"), ("sd3", "text_encoder_2"), ("flux", "text_encoder_2")],
)
def test_a_missing_second_encoder_is_named(name: str, part: str, tmp_path: Path) -> None:
    pipeline: DiffusionPipeline = build(name)
    pipeline.register_modules(**{part: None})
    with pytest.raises(ValueError, match=f"was loaded without {part}"):
        make(tmp_path, pipeline)
