"""`PreferenceScorer` against the same numbers computed with the transformers model directly."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, CLIPVisionConfig, CLIPVisionModel

from bt_hf import PreferenceScorer
from bt_hf.reward.lora import add_adapter
from tiny_models import FAMILIES, build, picture, red_pairs, save

PROMPTS = ["a red apple", "the old house", "a photo of a small green boat", "bird"]
IMAGES = [picture((40 * i, 200 - 30 * i, 90), seed=i, size=(20 + 3 * i, 20)) for i in range(5)]
LORA = {"r": 4, "target_modules": ["text_projection", "visual_projection"]}


def save_adapter(folder: Path, base: str, config: LoraConfig | None = None) -> str:
    """An adapter that changes something, on the base at `base`."""
    model = add_adapter(AutoModel.from_pretrained(base), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def direct_rewards(model: nn.Module, folder: str, prompts: list[str], images: list) -> torch.Tensor:
    """(prompts, images), one prompt and one image at a time, as a user of transformers would."""
    processor = AutoProcessor.from_pretrained(folder)
    siglip = "Siglip" in type(processor).__name__
    rewards = torch.empty(len(prompts), len(images))
    for i, prompt in enumerate(prompts):
        for j, image in enumerate(images):
            text = processor.tokenizer(prompt, return_tensors="pt", padding="max_length" if siglip else False)
            pixels = processor.image_processor(image, return_tensors="pt")
            with torch.no_grad():
                output = model(**text, **pixels)
            cosine = (output.text_embeds * output.image_embeds).sum() / (
                output.text_embeds.norm() * output.image_embeds.norm()
            )
            rewards[i, j] = model.logit_scale.exp().squeeze() * cosine
    return rewards


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save(tmp_path / "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_against_the_model_itself(family: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", family)
    folder = save_adapter(tmp_path / "adapter", base)
    direct = direct_rewards(
        PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval(), base, PROMPTS, IMAGES
    )
    untouched = direct_rewards(AutoModel.from_pretrained(base), base, PROMPTS, IMAGES)
    assert (direct - untouched).abs().max() > 0.1  # the adapter matters
    scorer = PreferenceScorer.from_pretrained(folder, device="cpu")

    rewards = scorer.score(PROMPTS, IMAGES[:4])
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, direct[range(4), range(4)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scorer.score(PROMPTS[1], IMAGES), direct[1], atol=1e-4, rtol=1e-4)

    margin = direct[2, 0] - direct[2, 3]
    assert scorer.compare(PROMPTS[2], IMAGES[0], IMAGES[3]) == pytest.approx(margin.sigmoid().item(), abs=1e-4)
    total = scorer.compare(PROMPTS[2], IMAGES[0], IMAGES[3]) + scorer.compare(PROMPTS[2], IMAGES[3], IMAGES[0])
    assert total == pytest.approx(1)

    ranking = scorer.rank(PROMPTS[0], IMAGES)
    assert [index for index, _ in ranking] == direct[0].argsort(descending=True).tolist()
    assert [reward for _, reward in ranking] == pytest.approx(
        direct[0].sort(descending=True).values.tolist(), abs=1e-4
    )
    assert scorer.rank(PROMPTS[0], IMAGES, top_k=2) == ranking[:2]

    probabilities = scorer.classify(IMAGES, ["apple", "house"], template="the old {}")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval()
    logits = direct_rewards(model, base, ["the old apple", "the old house"], IMAGES).T
    torch.testing.assert_close(probabilities, logits.softmax(-1), atol=1e-4, rtol=1e-4)

    scorer.set_scale(0)
    torch.testing.assert_close(scorer.score(PROMPTS, IMAGES[:4]), untouched[range(4), range(4)], atol=1e-4, rtol=1e-4)


def test_batch_size_does_not_matter(base: str, tmp_path: Path) -> None:
    """Prompts of different lengths in each batch, 30 images in batches that do not divide them."""
    scorer = PreferenceScorer.from_pretrained(save_adapter(tmp_path / "adapter", base), device="cpu")
    pairs = red_pairs(30)
    expected = scorer.score(pairs["prompt"], pairs["chosen"], batch_size=30)
    for size in (1, 7, 100):
        torch.testing.assert_close(
            scorer.score(pairs["prompt"], pairs["chosen"], batch_size=size), expected, atol=1e-5, rtol=1e-5
        )


def test_images_in_any_form(base: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    IMAGES[0].save(buffer, "PNG")
    (tmp_path / "image.png").write_bytes(buffer.getvalue())
    transparent = IMAGES[0].convert("RGBA")
    forms = [IMAGES[0], buffer.getvalue(), tmp_path / "image.png", str(tmp_path / "image.png"), transparent]
    rewards = PreferenceScorer.from_pretrained(base, device="cpu").score("a red apple", forms)
    torch.testing.assert_close(rewards, rewards[:1].expand(5))


def test_numbers_of_prompts_and_images_differ(base: str) -> None:
    scorer = PreferenceScorer.from_pretrained(base, device="cpu")
    with pytest.raises(
        ValueError, match="one prompt for each image, or a single prompt, but got 2 prompts and 5 images"
    ):
        scorer.score(PROMPTS[:2], IMAGES)
    with pytest.raises(ValueError, match="at least one label"):
        scorer.classify(IMAGES, [])
    for template in ("a photo", None):
        with pytest.raises(ValueError, match="`template` should have one '{}'"):
            scorer.classify(IMAGES, ["a"], template=template)


def test_plain_dual_encoder(base: str) -> None:
    """PickScore is one: a whole CLIP that was fine-tuned."""
    scorer = PreferenceScorer.from_pretrained(base, device="cpu")
    expected = direct_rewards(build()[0], base, PROMPTS[:1], IMAGES)[0]
    torch.testing.assert_close(scorer.score(PROMPTS[0], IMAGES), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(TypeError, match="`set_scale` needs a model with a LoRA adapter"):
        scorer.set_scale(0.5)


def test_loaded_model_and_processor() -> None:
    model, processor = build()
    scorer = PreferenceScorer.from_pretrained(model.train(), processor=processor, device="cpu")
    assert not scorer.model.training
    with pytest.raises(ValueError, match="No processor was found"):
        PreferenceScorer.from_pretrained(build()[0], device="cpu")


def test_missing_base(base: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    expected = PreferenceScorer.from_pretrained(folder, device="cpu").score(PROMPTS[0], IMAGES)
    Path(base).rename(tmp_path / "moved")
    with pytest.raises(OSError, match="The base model .* can't be loaded: pass `base_model`"):
        PreferenceScorer.from_pretrained(folder, device="cpu")
    moved = PreferenceScorer.from_pretrained(
        folder, base_model=str(tmp_path / "moved"), processor=build()[1], device="cpu"
    )
    assert torch.equal(moved.score(PROMPTS[0], IMAGES), expected)
    # The processor of the base that was passed is found too.
    found = PreferenceScorer.from_pretrained(folder, base_model=str(tmp_path / "moved"), device="cpu")
    assert torch.equal(found.score(PROMPTS[0], IMAGES), expected)


def test_different_base(base: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match="does not fit SiglipModel.*: pass the `base_model` that it was trained on"):
        PreferenceScorer.from_pretrained(folder, base_model=build("siglip")[0], processor=build()[1])


def test_single_tower_is_refused(tmp_path: Path) -> None:
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=8, **config)).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="CLIPVisionModel is not a dual encoder.*These work: CLIP"):
        PreferenceScorer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(**LORA), LoraConfig(lora_alpha=32, **LORA), LoraConfig(use_rslora=True, **LORA)],
    ids=["default", "alpha", "rslora"],
)
def test_set_scale(config: LoraConfig, base: str, tmp_path: Path) -> None:
    """0 is the base, 1 is as trained, whatever alpha is; twice the same call is not a square."""
    scorer = PreferenceScorer.from_pretrained(save_adapter(tmp_path / "adapter", base, config), device="cpu")
    trained = scorer.score(PROMPTS[0], IMAGES)
    plain = PreferenceScorer.from_pretrained(base, device="cpu").score(PROMPTS[0], IMAGES)
    scorer.set_scale(0)
    assert torch.equal(scorer.score(PROMPTS[0], IMAGES), plain)
    scorer.set_scale(0.5)
    scorer.set_scale(0.5)
    half = scorer.score(PROMPTS[0], IMAGES)
    assert not torch.equal(half, plain)
    assert not torch.equal(half, trained)
    scorer.set_scale(1)
    assert torch.equal(scorer.score(PROMPTS[0], IMAGES), trained)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`scale` should be a finite number"):
            scorer.set_scale(scale)


def test_set_scale_of_dora(base: str, tmp_path: Path) -> None:
    """DoRA's magnitudes are trained too: without them, 0 would not be the base."""
    config = LoraConfig(use_dora=True, **LORA)
    model = add_adapter(AutoModel.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + torch.rand(len(parameter))
    model.save_pretrained(tmp_path / "adapter")
    scorer = PreferenceScorer.from_pretrained(tmp_path / "adapter", device="cpu")
    with pytest.raises(TypeError, match="DoRA"):
        scorer.set_scale(0)


def test_bfloat16_is_close(base: str) -> None:
    full, half = (PreferenceScorer.from_pretrained(base, device="cpu", dtype=d) for d in (None, torch.bfloat16))
    rewards = half.score(PROMPTS[0], IMAGES)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, full.score(PROMPTS[0], IMAGES), atol=0.5, rtol=0.05)


def test_long_prompts_are_warned_about(base: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="bt_hf"):
        PreferenceScorer.from_pretrained(base, device="cpu").score(["a", "red boat " * 20], IMAGES[:2])
    assert [record.getMessage() for record in caplog.records if "1 of 2 prompts are longer" in record.getMessage()]


def test_nothing_to_score(base: str) -> None:
    assert PreferenceScorer.from_pretrained(base, device="cpu").rank("a red apple", []) == []


def test_images_are_not_changed(base: str) -> None:
    image = Image.new("L", (20, 20), 90)
    PreferenceScorer.from_pretrained(base, device="cpu").score("a", [image])
    assert image.mode == "L"


@pytest.fixture(scope="module")
def scorer() -> PreferenceScorer:
    model, processor = build()
    return PreferenceScorer(model, processor)


PIXELS = np.asarray(IMAGES[0])  # (H, W, 3)
ENCODED = io.BytesIO()
IMAGES[0].save(ENCODED, "PNG")
LONE = {
    "PIL": IMAGES[0],
    "path": "image.png",
    "Path": Path("image.png"),
    "bytes": ENCODED.getvalue(),
    "bytearray": bytearray(ENCODED.getvalue()),
    "row of datasets": {"bytes": ENCODED.getvalue(), "path": None},
    "array": PIXELS,
    "greyscale array": PIXELS[:, :, 0],
    "array of floats": PIXELS / 255,
    "channels first": PIXELS.transpose(2, 0, 1),
    "tensor": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "greyscale tensor": torch.zeros(20, 20),
}


@pytest.mark.parametrize("kind", LONE)
@pytest.mark.parametrize("method", ["score", "rank", "classify", "embed_images"])
def test_a_lone_image_is_refused(method: str, kind: str, scorer: PreferenceScorer) -> None:
    """Taken apart, it would be as many images as it has rows, letters or keys."""
    call = {
        "score": lambda image: scorer.score("a", image),
        "rank": lambda image: scorer.rank("a", image),
        "classify": lambda image: scorer.classify(image, ["a", "the"]),
        "embed_images": scorer.embed_images,
    }[method]
    with pytest.raises(ValueError, match="`images` should be a list of images, but got a single one .*: put it into"):
        call(LONE[kind])


FORMS = {
    "PIL": lambda image: image,
    "bytes": lambda image: LONE["bytes"],
    "bytearray": lambda image: LONE["bytearray"],
    "row of datasets": lambda image: LONE["row of datasets"],
    "array": np.asarray,
    "array of floats": lambda image: np.asarray(image) / 255,
    "array of float32": lambda image: (np.asarray(image) / 255).astype(np.float32),
    "channels first": lambda image: np.asarray(image).transpose(2, 0, 1),
    "floats, channels first": lambda image: (np.asarray(image) / 255).transpose(2, 0, 1),
    "tensor": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    "tensor of floats": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
    "tensor of float64 with gradient": lambda image: (
        torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    ).requires_grad_(),
    "tensor, channels last": lambda image: torch.from_numpy(np.array(image)),
    "opaque": lambda image: np.asarray(image.convert("RGBA")),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_in_any_form_is_the_same(form: str, scorer: PreferenceScorer) -> None:
    value = FORMS[form](IMAGES[0])
    expected = scorer.score("a", [IMAGES[0], IMAGES[1]])
    assert torch.equal(scorer.score("a", [value, IMAGES[1]]), expected)
    assert torch.equal(scorer.score("a", (value, IMAGES[1])), expected)
    assert torch.equal(scorer.score("a", iter([value, IMAGES[1]])), expected)
    assert scorer.compare("a", value, IMAGES[1]) == scorer.compare("a", IMAGES[0], IMAGES[1])


def test_four_dimensions_are_a_batch(scorer: PreferenceScorer) -> None:
    same = [image.resize((20, 20)) for image in IMAGES]
    batch = np.stack([np.asarray(image) for image in same])
    expected = scorer.score("a", same)
    for given in (
        batch,
        batch / 255,
        batch.transpose(0, 3, 1, 2),
        torch.from_numpy(batch),
        torch.from_numpy(batch).permute(0, 3, 1, 2),
    ):
        torch.testing.assert_close(scorer.score("a", given), expected)
        assert [index for index, _ in scorer.rank("a", given)] == [index for index, _ in scorer.rank("a", same)]
    assert len(scorer.score("a", batch[:1])) == 1
    assert len(scorer.score("a", batch[:0])) == 0
    objects = np.empty(2, dtype=object)
    objects[:] = same[:2]
    torch.testing.assert_close(scorer.score("a", objects), expected[:2])


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), "int64"),
        np.full((4, 4, 3), 2.0),
        np.full((4, 4, 3), -0.1),
        np.full((4, 4, 3), np.nan),
        torch.full((3, 4, 4), float("inf")),
        np.zeros((9, 9, 7), "uint8"),
        np.zeros((1, 4, 4, 3), "uint8"),
        np.zeros((0, 4, 3), "uint8"),
        np.zeros(4, "uint8"),
        torch.zeros(()),
        [IMAGES[0]],
        None,
        3,
        "nowhere.png",
        b"",
        {},
    ],
    ids=lambda image: str(getattr(image, "shape", image))[:20],
)
def test_what_is_no_image_is_named(image: object, scorer: PreferenceScorer) -> None:
    with pytest.raises(ValueError, match="^image 1: ") as caught:
        scorer.score("a", [IMAGES[0], image])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [None, 3, 2.5, True])
def test_images_that_are_no_list(images: object, scorer: PreferenceScorer) -> None:
    with pytest.raises(TypeError, match="`images` should be a list of images"):
        scorer.score("a", images)


def test_one_text_is_one_prompt_and_no_label(scorer: PreferenceScorer) -> None:
    assert torch.equal(scorer.embed_texts("a bird"), scorer.embed_texts(["a bird"]))
    with pytest.raises(TypeError, match="`labels` should be a list of texts, but got the text 'cat': put it into a"):
        scorer.classify(IMAGES, "cat")
    assert scorer.classify(IMAGES, ["cat"]).shape == (5, 1)
    for prompts in (None, 3, b"a", {"a": 1}):
        with pytest.raises(TypeError, match="`prompts` should be a list of texts"):
            scorer.score(prompts, IMAGES)
    for item in (None, 3, b"a", ["a"]):
        with pytest.raises(TypeError, match="`prompts` should hold texts, but item 1 is"):
            scorer.score(["a", item], IMAGES[:2])
    with pytest.raises(ValueError, match="`prompts` should be valid Unicode, but item 0"):
        scorer.score("caf\udce9", IMAGES)
    texts = np.array(["a bird", "a tree"])
    assert torch.equal(scorer.score(texts, IMAGES[:2]), scorer.score(list(texts), IMAGES[:2]))


def test_nothing_gives_nothing_of_the_right_shape(scorer: PreferenceScorer) -> None:
    size = scorer.embed_texts(["a"]).shape[1]
    for nothing in ([], (), np.zeros((0, 8, 8, 3), "uint8"), torch.zeros(0, 3, 8, 8), iter(())):
        assert scorer.embed_images(nothing).shape == (0, size)
    assert scorer.embed_texts([]).shape == (0, size)
    for prompts in ([], "a"):
        empty = scorer.score(prompts, [])
        assert (empty.shape, empty.dtype) == ((0,), torch.float32)
    assert scorer.classify([], ["a", "the"]).shape == (0, 2)
    assert scorer.rank("a", []) == []
    assert scorer.rank("a", IMAGES, top_k=0) == []


def test_numbers_out_of_range(scorer: PreferenceScorer) -> None:
    for size in (0, -1, 1.5, "3"):
        with pytest.raises(ValueError, match="`batch_size` should be a whole number of at least 1, but got"):
            scorer.score("a", IMAGES, batch_size=size)
        with pytest.raises(ValueError, match="`batch_size` should be a whole number of at least 1, but got"):
            PreferenceScorer(scorer.model, scorer.processor, batch_size=size).embed_texts(["a"])
    for count in (-1, 1.5, "3"):
        with pytest.raises(ValueError, match="`top_k` should be a whole number of at least 0, but got"):
            scorer.rank("a", IMAGES, top_k=count)


@pytest.mark.parametrize("prompt", [["a"], ["a", "the"], None, b"a"], ids=repr)
def test_images_are_compared_for_one_prompt(prompt: object, scorer: PreferenceScorer) -> None:
    """Rewards of different prompts mean nothing beside each other."""
    with pytest.raises(TypeError, match="`prompt` should be one text, but got"):
        scorer.rank(prompt, IMAGES[:2])
    with pytest.raises(TypeError, match="`prompt` should be one text, but got"):
        scorer.compare(prompt, *IMAGES[:2])


class Watched(str):
    """A text that counts how often it is compared with another."""

    compared = 0
    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Watched.compared += 1
        return str.__eq__(self, other)


def test_work_grows_with_the_number_of_prompts(scorer: PreferenceScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Watched(f"prompt {number % 1000}") for number in range(2000)]
    monkeypatch.setattr(scorer, "embed_texts", lambda texts, size: torch.ones(len(texts), 1))
    monkeypatch.setattr(scorer, "embed_images", lambda images, size: torch.ones(len(images), 1))
    rewards = scorer.score(prompts, IMAGES[:1] * 2000)
    assert len(rewards) == 2000
    assert Watched.compared < 5 * 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["score", "rank", "classify", "compare", "embed_images"])
def test_what_is_not_finite_is_named(method: str, dtype: torch.dtype) -> None:
    model, processor = build()
    scorer = PreferenceScorer(model.to(dtype), processor)
    good = scorer.model.vision_model.forward

    def forward(pixel_values: torch.Tensor, *args: object, **options: object) -> object:
        output = good(pixel_values, *args, **options)
        output.pooler_output[-1] = float("nan")
        return output

    scorer.model.vision_model.forward = forward
    call = {
        "score": lambda: scorer.score("a", IMAGES),
        "rank": lambda: scorer.rank("a", IMAGES),
        "classify": lambda: scorer.classify(IMAGES, ["a", "the"]),
        "compare": lambda: scorer.compare("a", *IMAGES[:2]),
        "embed_images": lambda: scorer.embed_images(IMAGES),
    }[method]
    with pytest.raises(ValueError, match=rf"of image \d is not finite, computed in {dtype}"):
        call()


def test_a_prompt_or_scale_that_is_not_finite_is_named() -> None:
    model, processor = build()
    model.text_model.get_input_embeddings().weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="the embedding of prompt 'a bird' is not finite"):
        PreferenceScorer(model, processor).score("a bird", IMAGES)
    model, processor = build()
    model.logit_scale.data.fill_(1e4)
    with pytest.raises(ValueError, match="the reward of image 0 is not finite, computed in torch.float32"):
        PreferenceScorer(model, processor).score("a bird", IMAGES)


def test_long_prompts_are_told_once(scorer: PreferenceScorer, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        scorer.score("a tree " * 50, IMAGES[:1])
    assert caplog.text.count("are longer than the model's context") == 1
