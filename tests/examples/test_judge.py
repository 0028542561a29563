"""Judge of generated emoji: knows styles and captions that it was not trained on, and stays small."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"


@pytest.fixture(autouse=True)
def emoji_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EMOJI))


@pytest.fixture
def judge():
    from judge import JUDGE_FOLDER, Judge

    return Judge.from_pretrained(JUDGE_FOLDER)


def test_knows_styles_and_captions_of_new_concepts(judge) -> None:
    from judge import evaluate
    from pretrain_clip import EmojiCorpus

    corpus = EmojiCorpus("held_out")
    figures = evaluate(judge, corpus.pixels.float() / 255, corpus.captions)
    assert figures["confusion"].sum(1) == pytest.approx([1.0] * 5)
    assert figures["confusion"].diagonal().mean() > 0.91
    assert (figures["confusion"].diagonal() > 0.85).all()
    assert figures["recall@5"].mean() > 0.33  # by chance 5 / 96


def test_trains_on_training_concepts_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import judge as module

    seen = []
    monkeypatch.setattr(module, "EmojiCorpus", lambda split: seen.append(split))
    monkeypatch.setattr(module, "train", lambda corpus, *args: module.Judge(widths=(4, 4, 4), buckets=8))
    monkeypatch.setattr(module, "report", lambda model: None)
    monkeypatch.setattr(sys, "argv", ["judge.py", "--output_dir", str(tmp_path)])
    module.main()
    assert seen == ["train"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_one_step_of_training() -> None:
    from judge import train
    from pretrain_clip import EmojiCorpus

    model = train(EmojiCorpus("held_out"), steps=1, concepts=4, learning_rate=1e-3)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_folder_is_small_and_holds_nothing_else() -> None:
    files = {path.name: path.stat().st_size for path in (EMOJI / "judge").iterdir()}
    assert set(files) == {"config.json", "model.safetensors"}
    assert sum(files.values()) <= 600_000


def test_judges_pictures_of_any_size_and_mode(judge) -> None:
    from emoji import STYLES, load_emoji

    rows = load_emoji("train")[:10]
    images = [image.resize((128, 128)).convert("RGBA") for image in rows["image"]]
    probabilities = judge.style_probabilities(images)
    assert probabilities.shape == (10, len(STYLES))
    assert torch.allclose(probabilities.sum(1), torch.ones(10), atol=1e-5)
    embeddings = judge.embed_images(images)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(10), atol=1e-5)
    # One alone is judged as among others.
    assert torch.allclose(judge.embed_images(images[3:4])[0], embeddings[3], atol=1e-5)


def test_caption_ranks_count_the_nearer_captions(judge, monkeypatch: pytest.MonkeyPatch) -> None:
    # Captions lie along the axes and images between them, in the order in which they should be found:
    # (0.9, 0.3, 0) is nearest to a, then b; its own caption is b, so one is nearer. Repeated captions count once.
    axes = {"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0], "c": [0.0, 0.0, 1.0]}
    monkeypatch.setattr(judge, "embed_captions", lambda captions: torch.tensor([axes[text] for text in captions]))
    monkeypatch.setattr(judge, "embed_images", lambda images: torch.tensor(images))
    images = [[0.9, 0.3, 0.0], [0.9, 0.3, 0.0], [0.5, 0.4, 0.3], [0.1, 0.2, 0.9]]
    assert judge.caption_ranks(images, ["a", "b", "c", "c"]).tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="one for each of 4 images, but got 1"):
        judge.caption_ranks(images, ["a"])


def test_captions_beat_chance_and_order_does_not_matter(judge) -> None:
    from emoji import load_emoji

    rows = load_emoji("train").select(range(0, 6630, 650))  # one style of eleven concepts
    images, captions = list(rows["image"]), list(rows["caption"])
    ranks = judge.caption_ranks(images, captions)
    assert (ranks == 0).float().mean() > 0.5
    assert torch.equal(judge.caption_ranks(images[::-1], captions[::-1]), ranks.flip(0))
    assert judge.caption_ranks(images[:1], captions[:1]).tolist() == [0]


def test_texts_share_parts_of_words(judge) -> None:
    apple, apples, zebra = judge.embed_captions(["apple", "apples", "zebra"])
    assert apple @ apples > apple @ zebra
    assert torch.equal(judge.embed_captions(["Red  APPLE!"]), judge.embed_captions(["red apple"]))
    assert judge.embed_captions([""]).isfinite().all()


def test_degraded_drawings_stay_drawings() -> None:
    from judge import blur, degrade

    white = torch.ones(4, 3, 64, 64)
    assert degrade(white).min() > 0.8
    dot = torch.zeros(2, 3, 64, 64)
    dot[:, :, 32, 32] = 1
    sharp, soft = blur(dot, torch.tensor([0.3, 1.5]))
    assert sharp[0, 32, 32] > 0.95 > 0.2 > soft[0, 32, 32]
    assert soft[0].sum() == pytest.approx(1.0, abs=1e-4)


def test_images_are_resized_with_an_average() -> None:
    from judge import to_pixels

    image = Image.new("RGB", (128, 128), "white")
    image.putpixel((0, 0), (0, 0, 0))
    assert to_pixels([image])[0, 0, 0, 0] == pytest.approx(0.75, abs=0.01)
