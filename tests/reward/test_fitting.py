"""The model is believed before its description: context length, vocabulary and image size come from its towers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    BertConfig,
    MPNetConfig,
    RobertaConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    XLMRobertaConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer, cross_validate
from bt_hf.hub.contract import VOCABULARIES
from bt_hf.reward import encoders
from bt_hf.reward.cache import FeatureCache
from bt_hf.reward.collator import PreferenceCollator
from bt_hf.reward.fitting import fit_processor, text_positions
from bt_hf.reward.lora import add_adapter
from tiny_models import CONTEXT, FAMILIES, SIZE, WIDTH, bert_tokenizer, build, picture, red_pairs, save

VISION = {**WIDTH, "image_size": SIZE, "patch_size": 8}
TEXT = {**WIDTH, "vocab_size": len(bert_tokenizer()), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Text towers that a VisionTextDualEncoder may have; some keep the first positions for padding.
TEXT_TOWERS = {
    "bert": lambda: BertConfig(**TEXT, max_position_embeddings=CONTEXT),
    "albert": lambda: AlbertConfig(**TEXT, embedding_size=8, max_position_embeddings=CONTEXT),
    "roberta": lambda: RobertaConfig(**TEXT, max_position_embeddings=CONTEXT + 2, pad_token_id=1),
    "xlm_roberta": lambda: XLMRobertaConfig(**TEXT, max_position_embeddings=CONTEXT + 1, pad_token_id=0),
    "mpnet": lambda: MPNetConfig(**TEXT, max_position_embeddings=CONTEXT + 2, pad_token_id=1),
}


def dual_encoder(text: str) -> tuple[nn.Module, VisionTextDualEncoderProcessor]:
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**VISION), TEXT_TOWERS[text](), projection_dim=12
    )
    images = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    model = VisionTextDualEncoderModel(config).eval()
    tokenizer = bert_tokenizer()
    if getattr(config.text_config, "pad_token_id", 0) == 1:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    return model, VisionTextDualEncoderProcessor(images, tokenizer)


MODELS: dict[str, Callable] = {
    **{family: lambda family=family: build(family) for family in FAMILIES},
    **{f"vision-text {name}": lambda name=name: dual_encoder(name) for name in TEXT_TOWERS},
}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_as_many_positions_as_the_tower_takes(name: str) -> None:
    """One token more is an error in the depth of transformers."""
    model, processor = MODELS[name]()
    assert text_positions(model.text_model) == CONTEXT

    def embed(length: int) -> None:
        inputs = {"input_ids": torch.full((1, length), 7), "attention_mask": torch.ones(1, length).long()}
        with torch.no_grad():
            model.get_text_features(**inputs)

    embed(CONTEXT)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        embed(CONTEXT + 1)


@every_model
@pytest.mark.parametrize("limit", [10**30, 512, 7])
def test_context_is_the_towers(name: str, limit: int, caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer without a limit, with a larger one, or with one that its owner has made smaller."""
    model, processor = MODELS[name]()
    processor.tokenizer.model_max_length = limit
    scorer = PreferenceScorer(model, processor)
    expected = min(limit, CONTEXT)
    prompts = ["a bird " * 40, "a"]
    inputs = encoders.tokenize(scorer.processor, prompts)
    assert inputs["input_ids"].shape[1] == expected
    with caplog.at_level(logging.WARNING, logger="bt_hf"):
        assert scorer.embed_texts(prompts).isfinite().all()
    assert f"1 of 2 prompts are longer than the model's context of {expected} tokens" in caplog.text
    assert processor.tokenizer.model_max_length == limit  # the caller's own


@every_model
def test_cached_features_are_those_of_the_model(name: str) -> None:
    model, processor = MODELS[name]()
    processor.tokenizer.model_max_length = 10**30
    pairs = red_pairs(3)
    prompts = [pairs[0]["prompt"], "a bird " * 40, "a"]
    pairs = pairs.remove_columns("prompt").add_column("prompt", prompts)
    adapted = add_adapter(model, None) if name in FAMILIES else model.requires_grad_(False)
    collator = PreferenceCollator(encoders.find_processor(model, model, processor))
    cache = FeatureCache(adapted, collator)
    batch = cache.collate(list(cache.add(pairs)))
    with (
        torch.no_grad(),
        cache.recall({k: v for k, v in batch.items() if k not in ("preference", "weight")}) as inputs,
    ):
        found = adapted(**inputs).text_embeds
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            alone = adapted.get_text_features(**encoders.tokenize(collator.processor, [prompt])).pooler_output
            torch.testing.assert_close(found[row], nn.functional.normalize(alone, dim=-1)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("door", ["scorer", "trainer", "folds"])
def test_every_door_fits_the_processor(door: str, tmp_path: Path) -> None:
    model, processor = build()
    processor.tokenizer.model_max_length = 512
    pairs = red_pairs(4)
    pairs = pairs.remove_columns("prompt").add_column("prompt", ["a bird " * 40, "a", "the", "a tree"])
    args = BradleyTerryConfig(
        str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    if door == "scorer":
        assert PreferenceScorer(model, processor).score(pairs["prompt"][:], pairs["chosen"]).isfinite().all()
    elif door == "trainer":
        trainer = BradleyTerryTrainer(model, args, train_dataset=pairs, processing_class=processor)
        trainer.train()
        trainer.save_model()
        saved = encoders.load_processor(tmp_path / "out").tokenizer
        assert saved.model_max_length == CONTEXT  # an unmodified client cuts there
    else:
        cross_validate(model, pairs, args, processing_class=processor, folds=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_its_vocabulary_is_refused(family: str, tmp_path: Path) -> None:
    """Transformers makes up a tokenizer of a few special tokens, for which all prompts are alike."""
    folder = save(tmp_path / "base", family)
    for name in VOCABULARIES:
        (tmp_path / "base" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"base'.*text tower of \w+ has \d+ tokens, but \w+ has \d,"):
        PreferenceScorer.from_pretrained(folder, device="cpu")


def test_another_models_tokens_are_refused() -> None:
    model, processor = build()
    processor.tokenizer.add_tokens("<new>")
    with pytest.raises(ValueError, match="has 113 tokens, but CLIPTokenizer has 114, with ids up to 113"):
        PreferenceScorer(model, processor)
    model.text_model.resize_token_embeddings(114)
    assert PreferenceScorer(model, processor).embed_texts(["<new>"]).isfinite().all()
    model, processor = build()
    model.text_model.eos_token_id = 3
    with pytest.raises(ValueError, match="looks for the end of a prompt by token 3, but CLIPTokenizer ends it with"):
        PreferenceScorer(model, processor)


def test_rounded_vocabularies_pass() -> None:
    model, processor = build()
    model.text_model.resize_token_embeddings(120)
    assert fit_processor(model, processor) is processor


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "binary": lambda text: "\0\xff\0",
    "other words": lambda text: json.dumps({"a": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_processor_is_not_the_bases(file: str, damage: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    model = add_adapter(encoders.load_dual_encoder(base), None)
    model.save_pretrained(tmp_path / "adapter")
    build()[1].save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / file
    path.write_text(DAMAGES[damage](path.read_text()))
    found = error = None
    try:
        found = PreferenceScorer.from_pretrained(tmp_path / "adapter", device="cpu")
    except ValueError as refusal:
        error = str(refusal)
    assert error is None or ("adapter" in error and "\n" not in error)
    if found is not None:  # the rest of the folder says what the file lost: nothing differs
        whole = PreferenceScorer.from_pretrained(base, device="cpu")
        prompts = ["a red apple", "The Old House", "zzz " * 40]
        assert torch.equal(found.embed_texts(prompts), whole.embed_texts(prompts))
        assert torch.equal(found.embed_images([picture((200, 9, 9))]), whole.embed_images([picture((200, 9, 9))]))


@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": "red"},
        {"image_std": [0.0, 0.0, 0.0]},
        {"image_mean": [0.5]},
        {"rescale_factor": "big"},
        {"size": {"shortest_edge": -3}},
        {"crop_size": {"height": SIZE * 2, "width": SIZE * 2}},
        {"do_center_crop": False},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_settings_that_make_no_images_for_the_tower_are_refused(options: dict, tmp_path: Path) -> None:
    folder = save(tmp_path / "base")
    path = tmp_path / "base" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= options
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="base' can't be used: ") as caught:
        PreferenceScorer.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip", "metaclip_2", "altclip"])
def test_images_of_another_size_are_refused(family: str) -> None:
    model, processor = build(family)
    for name in ("size", "crop_size"):
        if getattr(processor.image_processor, name, None):
            setattr(processor.image_processor, name, {"height": 8, "width": 24})
    with pytest.raises(ValueError, match=f"images of 8 x 24 pixels, but the vision tower of .* reads {SIZE} x {SIZE}"):
        PreferenceScorer(model, processor)


def test_half_a_processor_is_refused() -> None:
    model, processor = build()
    for part in (processor.tokenizer, processor.image_processor):
        with pytest.raises(ValueError, match="has no `(tokenizer|image_processor)`"):
            PreferenceScorer(model, part)


def test_prompts_are_padded_on_the_right() -> None:
    """A tokenizer that pads on the left would shift the positions of short prompts."""
    model, processor = build()
    processor.tokenizer.padding_side = "left"
    scorer = PreferenceScorer(model, processor)
    prompts = ["a", "a photo of a small green boat"]
    together = scorer.embed_texts(prompts)
    alone = torch.cat([scorer.embed_texts([prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
