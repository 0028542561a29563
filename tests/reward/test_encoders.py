"""Loading, checking and using dual encoders of every family."""

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel

from bt_hf.data.checks import warn_of_truncation
from bt_hf.hub.loading import find_adapter_config
from bt_hf.reward import encoders
from bt_hf.reward.collator import PreferenceCollator
from bt_hf.reward.encoders import (
    check_dual_encoder,
    embed_images,
    embed_texts,
    find_processor,
    load_dual_encoder,
    logit_scale,
    tokenize,
)
from bt_hf.reward.lora import add_adapter
from tiny_models import CONTEXT, FAMILIES, WORDS, build, clip_tokenizer, red_pairs, save


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_forward(family: str) -> None:
    model, processor = build(family)
    inputs = PreferenceCollator(processor)(list(red_pairs(3)))
    images = {name: value for name, value in inputs.items() if name.startswith(("pixel", "spatial"))}
    texts = {name: value for name, value in inputs.items() if name.startswith(("input", "attention", "token"))}
    with torch.no_grad():
        output = model(**texts, **images)
        torch.testing.assert_close(embed_texts(model, texts), output.text_embeds)
        torch.testing.assert_close(embed_images(model, images), output.image_embeds)
        torch.testing.assert_close(output.text_embeds, normalize(output.text_embeds, dim=-1))
        # Reward and the model's own logits are one thing; SigLIP adds a bias to all of them.
        logits = logit_scale(model) * embed_texts(model, texts) @ embed_images(model, images).T
        bias = getattr(model, "logit_bias", torch.zeros(1))
        torch.testing.assert_close(logits + bias, output.logits_per_text, atol=1e-5, rtol=1e-5)
    assert output.image_embeds.shape == (6, output.text_embeds.shape[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_was_saved(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path / family, family)
    loaded = load_dual_encoder(folder)
    expected = build(family)[0].state_dict()
    assert not loaded.training
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    texts = ["a red apple", "the boat"]
    saved, own = (tokenize(processor, texts) for processor in (find_processor(folder, loaded), build(family)[1]))
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_padded_as_in_pretraining(family: str) -> None:
    """SigLIP pools its last token, so its prompts fill the context; others are as long as the longest."""
    ids = tokenize(build(family)[1], ["a", "the old house"])["input_ids"]
    assert (ids.shape[1] == CONTEXT) == family.startswith("siglip")
    longest = tokenize(build(family)[1], ["zzz" * 30])["input_ids"]
    assert longest.shape == (1, CONTEXT)


def test_adapter_on_its_base(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    model = add_adapter(load_dual_encoder(base), None)
    torch.nn.init.normal_(model.get_base_model().text_projection.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    inputs = tokenize(build()[1], ["a red apple"])
    with torch.no_grad():
        expected = embed_texts(model, inputs)
        for given in (None, base, load_dual_encoder(base)):
            loaded = load_dual_encoder(tmp_path / "adapter", given)
            assert isinstance(loaded, PeftModel)
            assert not any(parameter.requires_grad for parameter in loaded.parameters())
            assert torch.equal(embed_texts(loaded, inputs), expected)
    trainable = load_dual_encoder(tmp_path / "adapter", is_trainable=True)
    assert sum(parameter.requires_grad for parameter in trainable.parameters()) == 4
    assert find_adapter_config(str(tmp_path / "adapter")).base_model_name_or_path == base
    assert find_adapter_config(base) is None


def test_base_is_missing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    add_adapter(load_dual_encoder(save(base)), None).save_pretrained(tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"The base model '.*base' of the adapter '.*adapter' can't be loaded: pass"):
        load_dual_encoder(tmp_path / "adapter")
    assert load_dual_encoder(tmp_path / "adapter", str(tmp_path / "elsewhere"))


def test_base_is_not_named(tmp_path: Path) -> None:
    add_adapter(build()[0], None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not name its base model: pass `base_model`"):
        load_dual_encoder(tmp_path)
    assert load_dual_encoder(tmp_path, build()[0])


@pytest.mark.parametrize("other", ["siglip", "siglip2"])
def test_adapter_of_another_family(other: str, tmp_path: Path) -> None:
    add_adapter(build("clip")[0], None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"does not fit {type(build(other)[0]).__name__}.*: pass the `base_model`"):
        load_dual_encoder(tmp_path, build(other)[0])


def test_adapter_of_another_size(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    add_adapter(build()[0], None).save_pretrained(tmp_path)
    config = CLIPConfig.from_dict({**build()[0].config.to_dict(), "projection_dim": 20})
    with pytest.raises(ValueError, match="does not fit CLIPModel.*size mismatch"):
        load_dual_encoder(tmp_path, CLIPModel(config))


def test_base_of_a_whole_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`base_model` is for adapters, but .* has no adapter_config.json"):
        load_dual_encoder(save(tmp_path), build()[0])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_dual_encoder(tmp_path / "nowhere")


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
SINGLE_TOWERS = {
    "BertModel": lambda: BertModel(BertConfig(vocab_size=9, **SMALL)),
    "CLIPVisionModel": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=8, **SMALL)),
}


@pytest.mark.parametrize("name", SINGLE_TOWERS)
def test_single_towers_are_refused(name: str, tmp_path: Path) -> None:
    model = SINGLE_TOWERS[name]()
    model.save_pretrained(tmp_path)
    expected = rf"{name} is not a dual encoder.*These work: CLIP, SigLIP, SigLIP 2, MetaCLIP 2, AltCLIP, Chinese-CLIP"
    for refuse in (lambda: check_dual_encoder(model), lambda: load_dual_encoder(tmp_path)):
        with pytest.raises(TypeError, match=expected):
            refuse()


def test_adapted_model_is_still_a_dual_encoder() -> None:
    check_dual_encoder(add_adapter(build()[0], LoraConfig(target_modules=["q_proj"])))


def test_no_processor() -> None:
    with pytest.raises(ValueError, match=r"No processor was found for CLIPModel .*built in code.*: pass one"):
        find_processor(build()[0], build()[0])


def test_processor_beside_the_adapter_comes_first(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    model = add_adapter(load_dual_encoder(base), None)
    model.save_pretrained(tmp_path / "adapter")
    assert find_processor(tmp_path / "adapter", model).tokenizer.model_max_length == CONTEXT  # the base's
    processor = build()[1]
    processor.tokenizer.model_max_length = 7
    processor.save_pretrained(tmp_path / "adapter")
    assert find_processor(tmp_path / "adapter", model).tokenizer.model_max_length == 7


def test_half_precision_scores_in_float32(tmp_path: Path) -> None:
    model = load_dual_encoder(save(tmp_path), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert embed_texts(model, tokenize(build()[1], ["a"])).dtype == torch.float32
    assert encoders.logit_scale(model).dtype == torch.float32


def test_truncated_prompts_are_counted_a_few_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, seen = clip_tokenizer(), []

    def watched(texts: list[str], **kwargs: object) -> object:
        seen.append(texts)
        return tokenizer(texts, **kwargs)

    short = [" ".join(words) for words in itertools.product(WORDS, repeat=3)][:2500]
    long = " ".join(["a"] * 18)  # 20 tokens, with the one before and the one behind
    prompts = [*short, long, *short, long, long]
    assert warn_of_truncation(watched, prompts, CONTEXT, "the model") == 3
    assert [len(texts) for texts in seen] == [1000, 1000, 501]
    assert f"3 of 5003 prompts are longer than the model's context of {CONTEXT} tokens" in caplog.text
    assert "(the longest: 20)" in caplog.text
