"""The default base on a frozen ImageNet tower: loads offline, knows new drawings, and how it was trained."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = EXAMPLES / "icons" / "base"


@pytest.fixture(autouse=True)
def icons_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("emoji", "icons"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))


@pytest.fixture
def pretrain() -> ModuleType:
    import pretrain

    return pretrain


@pytest.fixture(scope="module")
def encoder():
    sys.path[:0] = [str(EXAMPLES / "emoji"), str(EXAMPLES / "icons")]
    try:
        from evaluate_base import load_encoder
    finally:
        del sys.path[:2]
    return load_encoder(BASE)


def test_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 12_000_000


def test_knows_new_drawings_and_names_their_looks(encoder) -> None:
    from emoji import STYLES, load_emoji
    from evaluate_base import figures

    emoji = load_emoji("held_out")
    found = figures(encoder, emoji.select(range(200)))  # 40 of 234 concepts
    assert set(found) == {"recall@1", "recall@5", "look by name", "bare caption prefers"}
    assert all(len(values) == len(STYLES) for values in found.values())
    assert sum(found["recall@5"]) / 5 > 0.65  # by chance 5 / 40
    assert sum(found["look by name"]) / 5 > 0.6  # by chance 0.2
    assert all(0.3 < share < 0.7 for share in found["bare caption prefers"])


def test_the_library_takes_it(encoder) -> None:
    from bt_hf import PreferenceScorer
    from emoji import load_emoji

    rows = load_emoji("held_out").select(range(0, 100, 5))
    images, captions = list(rows["image"]), list(rows["caption"])
    scorer = PreferenceScorer.from_pretrained(BASE)
    scale = encoder.model.logit_scale.exp()
    expected = scale * (encoder.texts(captions) * encoder.images(images)).sum(1)
    scores = torch.stack([scorer.score(text, [image])[0] for text, image in zip(captions, images, strict=True)])
    assert torch.allclose(scores, expected.detach(), atol=1e-3)


def test_a_caption_fits_what_has_its_name_and_all_looks_that_it_tells(pretrain: ModuleType) -> None:
    looks = [["line", "red"], ["filled"], ["line"], ["line", "red"]]
    drawings = pretrain.Drawings(torch.zeros(4, 8), ["bell", "bell", "bell", "apple"], looks, [[]] * 4)
    same_name, fits = pretrain.Captions(drawings).fitting([0, 0, 3], [[], ["red", "line"], ["line"]], [0, 1, 2, 3])
    assert same_name.tolist() == [[True, True, True, False]] * 2 + [[False, False, False, True]]
    assert fits.tolist() == [[True, True, True, False], [True, False, False, False], [False, False, False, True]]


def test_captions_tell_looks_of_their_drawing(pretrain: ModuleType) -> None:
    drawings = pretrain.Drawings(torch.zeros(1, 8), ["bell"], [["tabler icon", "line", "red"]], [["ring", "alarm"]])
    captions = pretrain.Captions(drawings)
    for _ in range(200):
        text, told = captions.write(0)
        assert set(told) <= {"tabler icon", "line", "red"}
        assert all(look in text for look in told)
        assert any(word in text for word in ("bell", "ring", "alarm"))


def test_captions_name_the_house_as_often_as_told(pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [["tabler icon", "line", "outline", "red"]]
    captions = pretrain.Captions(pretrain.Drawings(torch.zeros(1, 8), ["bell"], looks, [[]]))
    for share, expected in ((1.0, 1.0), (0.0, 0.5)):  # one, two or three of four looks hold the house in 6 of 12 draws
        monkeypatch.setattr("captions.HOUSE_FIRST", share)
        told = [found for _, found in (captions.write(0) for _ in range(3000)) if found]
        named = sum("tabler icon" in found for found in told) / len(told)
        assert named == pytest.approx(expected, abs=0.05)


def test_emoji_are_drawn_oftener(pretrain: ModuleType, tmp_path: Path) -> None:
    looks = [["noto", "emoji"]] * 2 + [["line"]] * 8
    drawings = pretrain.Drawings(torch.randn(10, 1280), ["bell"] * 2 + ["apple"] * 8, looks, [[]] * 10)
    shares = pretrain.Pretraining(drawings, 1.0, tmp_path / "checkpoint.pt").shares
    assert shares == [2 * pretrain.EMOJI_SHARE, 6]


def test_contrast_is_cross_entropy_with_what_fits(pretrain: ModuleType) -> None:
    # Row 0: both of two equal logits fit, log 3 remains of three equal ones. Row 1 fits nothing, and counts nothing.
    logits = torch.zeros(2, 3)
    fits = torch.tensor([[True, True, False], [False, False, False]])
    assert pretrain.contrast(logits, fits).item() == pytest.approx(torch.tensor(3.0).log().item())
    # Within the name, the third is another one: both that are left fit, so the row tells nothing.
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    same_name = torch.tensor([[True, True, False]])
    expected = torch.nn.functional.cross_entropy(logits[:, :2], torch.tensor([0])).item()
    found = pretrain.contrast_within(logits, torch.tensor([[True, False, False]]), same_name)
    assert found.item() == pytest.approx(expected)


def test_training_goes_on_from_its_checkpoint(pretrain: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [f"thing {number}" for number in range(40)] * 2
    looks = [["line"]] * 40 + [["filled"]] * 40
    drawings = pretrain.Drawings(torch.randn(80, 1280), names, looks, [[]] * 80)
    pretrain.OTHERS, others = 16, pretrain.OTHERS
    try:
        first = pretrain.Pretraining(drawings, 1e-3, tmp_path / "checkpoint.pt")
        first.run()
        first.save_checkpoint()
        second = pretrain.Pretraining(drawings, 1e-3, tmp_path / "checkpoint.pt")
    finally:
        pretrain.OTHERS = others
    assert (second.step, second.passed) == (first.step, first.passed)
    assert first.step > 0
    for name, value in first.average.module.state_dict().items():
        assert torch.equal(value, second.average.module.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_assembled_model_embeds_as_the_trained_side(pretrain: ModuleType) -> None:
    from transformers import MobileNetV2Config, MobileNetV2Model

    from tower import image_processor

    torch.manual_seed(0)
    tokenizer = pretrain.train_tokenizer(["red apple", "green pear", "a bell"] * 3, vocab_size=600)
    side = pretrain.TextSide(tokenizer, torch.rand(1280) + 0.5).eval()
    config = MobileNetV2Config(tf_padding=False, finegrained_output=True, hidden_size=1280)
    tower = MobileNetV2Model(config).eval()
    encoder = pretrain.Encoder(pretrain.assemble(tower, side), None)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = tower(pixels).pooler_output
        expected = side.embed_images(features)
        found = torch.nn.functional.normalize(encoder.model.get_image_features(pixels).pooler_output, dim=-1)
        assert torch.allclose(found, expected, atol=1e-5)
        tokens = tokenizer(["red apple", "a green pear and a bell"], padding=True, return_tensors="pt")
        text = torch.nn.functional.normalize(encoder.model.get_text_features(**tokens).pooler_output, dim=-1)
        ids = tokenizer(["red apple", "a green pear and a bell"])["input_ids"]
        assert torch.allclose(text, side.embed_texts(ids, tokenizer.pad_token_id), atol=1e-5)
    assert image_processor().size == {"height": 128, "width": 128}


def test_training_can_start_from_a_base(pretrain: ModuleType, encoder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    drawings = pretrain.Drawings(torch.rand(20, 1280), ["red apple"] * 20, [["line"]] * 20, [[]] * 20)
    started = pretrain.Pretraining(drawings, 1.0, tmp_path / "checkpoint.pt", start=BASE)
    texts = ["red apple", "a drawing of two bells, line", "noto emoji of zebra"]
    tokens = started.tokenizer(texts)["input_ids"]
    with torch.no_grad():
        found = started.model.eval().embed_texts(tokens, started.tokenizer.pad_token_id)
        assert torch.allclose(found, encoder.texts(texts), atol=1e-5)
        expected = torch.nn.functional.normalize(encoder.model.visual_projection(drawings.features), dim=-1)
        assert torch.allclose(started.model.embed_images(drawings.features), expected, atol=1e-5)
    assert torch.equal(started.model.logit_scale, encoder.model.logit_scale)


def test_a_base_that_saw_all_concepts_is_not_validated(
    pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "folder", "--validate", "--start", str(BASE)])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "concepts that the base of --start has seen" in capsys.readouterr().err


def test_pretraining_leaves_out_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", ModuleType("resvg_py"))  # draws; a CI run lacks it
    import render

    assert not {name.split("@")[0] for name in render.SETS} & set(render.LEFT_OUT)
    with pytest.raises(ValueError, match="ph@1.2.2 is for measuring, not for pretraining"):
        next(render.render_set("ph@1.2.2", tmp_path, None))
    assert render.describe("mdi@1.2.3", "red-apple-outline") == (
        "red apple", ["material design icon", "line", "outline"]
    )  # fmt: skip
    assert render.describe("mdi@1.2.3", "bell") == ("bell", ["material design icon", "filled", "solid"])


def test_readme_names_every_set_and_licence() -> None:
    text = (EXAMPLES / "icons" / "README.md").read_text(encoding="utf-8")
    for file in ("render.py", "build_looks.py"):
        source = (EXAMPLES / "icons" / file).read_text(encoding="utf-8")
        sets = re.findall(r'"([a-z0-9-]+)@([\d.]+)"', source)
        assert sets
        for name, version in sets:
            assert f"`{name}` {version}" in text, name
    for file in (EXAMPLES / "icons" / "LICENSES").iterdir():
        assert f"LICENSES/{file.name}" in text
