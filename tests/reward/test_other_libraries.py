"""The folder of a reward in other libraries: zero-shot classification, sentence embeddings, merged weights."""

from pathlib import Path

import pytest
import torch
from transformers import pipeline

import tiny_models
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer
from tiny_models import FAMILIES, picture, red_pairs

SIGLIP = ("siglip", "siglip2")
LABELS, TEMPLATE = ["apple", "house", "tree"], "a {}"
PROMPTS = [TEMPLATE.format(label) for label in LABELS]
IMAGES = [picture((200, 40, 40), 1), picture((40, 40, 200), 2)]
# SigLIP reads prompts padded to their full length. Patches of 16 pixels are fixed in the processor's call.
PADDED = {"text": {"padding": "max_length"}}
PROCESSING = {"siglip": PADDED, "siglip2": {**PADDED, "image": {"patch_size": 8, "max_num_patches": 6}}}


@pytest.fixture
def folder(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tiny_models, "CONTEXT", 64)  # as SigLIP's, which the pipeline of transformers counts on
    base = tiny_models.save(tmp_path / "base", family)
    args = BradleyTerryConfig(str(tmp_path / "taste"), max_steps=3, learning_rate=1e-2, report_to="none")
    trainer = BradleyTerryTrainer(base, args, train_dataset=red_pairs(8))
    trainer.train()
    trainer.save_model()
    return args.output_dir


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_shot_classification_of_transformers(family: str, folder: str) -> None:
    scorer = PreferenceScorer.from_pretrained(folder)
    classifier = pipeline("zero-shot-image-classification", model=folder, dtype=torch.float32)
    found = classifier(IMAGES[0], candidate_labels=LABELS, hypothesis_template=TEMPLATE)
    scores = {entry["label"]: entry["score"] for entry in found}
    rewards = scorer.score(PROMPTS, [IMAGES[0]] * len(LABELS))
    if family in SIGLIP:  # each label by itself, with the bias that cancels in a comparison
        expected = (rewards + scorer.model.base_model.model.logit_bias.detach()).sigmoid()
    else:
        expected = rewards.softmax(0)
    torch.testing.assert_close(torch.tensor([scores[label] for label in LABELS]), expected, rtol=1e-4, atol=1e-6)
    assert (scorer.score(PROMPTS[0], IMAGES) - without_adapter(scorer, PROMPTS[0])).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_sentence_transformers(family: str, folder: str) -> None:
    from sentence_transformers import SentenceTransformer

    scorer = PreferenceScorer.from_pretrained(folder)
    encoder = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "processing_kwargs": PROCESSING.get(family)}
    torch.testing.assert_close(encoder.encode(PROMPTS, **options), scorer.embed_texts(PROMPTS))
    torch.testing.assert_close(encoder.encode(IMAGES, **options), scorer.embed_images(IMAGES))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_give_the_same_rewards(family: str, folder: str) -> None:
    scorer = PreferenceScorer.from_pretrained(folder)
    expected = scorer.score(PROMPTS[0], IMAGES)
    merged = scorer.model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    found = PreferenceScorer(merged, scorer.processor).score(PROMPTS[0], IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def without_adapter(scorer: PreferenceScorer, prompt: str) -> torch.Tensor:
    scorer.set_scale(0.0)
    return scorer.score(prompt, IMAGES)
