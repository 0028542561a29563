"""Drawing and ranking: the right pairs of a real tiny pipeline, whatever is bad, and going on after being killed."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import tiny_models
import tiny_pipelines
from bt_hf import PreferenceScorer, best_of_n, generate_preference_pairs, load_preference_pairs
from bt_hf.diffusion.generation.candidates import draw, image_seed

PROMPTS = ["a red apple", "the old house", "a photo of a boat"]
FAST: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}


class Redness:
    """The truth of these tests: how much more red than green and blue an image has. Counts what it was shown."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        assert len(prompts) == len(images)
        self.seen += prompts
        return torch.tensor([redness(image) for image in images])


def redness(image: Image.Image) -> float:
    red, green, blue = np.asarray(image).reshape(-1, 3).mean(0)
    return float(red - (green + blue) / 2)


@pytest.fixture
def pipeline() -> Any:
    return tiny_pipelines.build("sd")


def generate(pipeline: Any, prompts: list[str] | None = None, scorer: Any = None, **kwargs: Any) -> Dataset:
    return generate_preference_pairs(pipeline, prompts or PROMPTS, scorer or Redness(), **{**FAST, **kwargs})


def spoil(pipeline: Any, monkeypatch: pytest.MonkeyPatch, spoilt: dict[int, float], seed: int = 0) -> None:
    """Lets the VAE fill the images of these places (of the first prompt) with one value."""
    seeds = {image_seed(seed, 0, place): value for place, value in spoilt.items()}
    decode = pipeline.vae.decode

    def broken(latents: torch.Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
        (images,) = decode(latents, *args, generator=generator, **kwargs)
        for place, own in enumerate(generator):
            if own.initial_seed() in seeds:
                images[place] = seeds[own.initial_seed()]
        return (images,)

    monkeypatch.setattr(pipeline.vae, "decode", broken)


def same(first: Dataset, second: Dataset) -> bool:
    """The same rows, images by their pixels."""

    def plain(dataset: Dataset) -> list[dict]:
        return [{k: v.tobytes() if isinstance(v, Image.Image) else v for k, v in row.items()} for row in dataset]

    return first.features == second.features and plain(first) == plain(second)


# --- What is paired ---


def test_best_meets_worst(pipeline: Any) -> None:
    """Drawn by hand, image by image from its seed, the candidates rank as the pairs say."""
    pairs = generate(pipeline, PROMPTS[:2], candidates=4, pairs_per_prompt=2, seed=3)
    assert len(pairs) == 4
    assert pairs["prompt"] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert set(pairs["preference"]) == {1.0}
    for place, prompt in enumerate(PROMPTS[:2]):
        images = {
            seed: pipeline(prompt, generator=torch.Generator().manual_seed(seed), **FAST).images[0]
            for seed in (image_seed(3, place, index) for index in range(4))
        }
        ranking = sorted(images, key=lambda seed: -redness(images[seed]))
        rows = pairs.select([2 * place, 2 * place + 1])
        assert rows["chosen_seed"] == ranking[:2]
        assert rows["rejected_seed"] == [ranking[3], ranking[2]]
        for row in rows:
            for name in ("chosen", "rejected"):
                difference = np.asarray(row[name], dtype=int) - np.asarray(images[row[f"{name}_seed"]], dtype=int)
                assert abs(difference).max() <= 1  # the rounding of another batch size
                assert row[f"{name}_reward"] == pytest.approx(redness(row[name]), abs=1e-4)


def test_schema_is_the_row_contract(pipeline: Any) -> None:
    pairs = generate(pipeline, PROMPTS[:1], candidates=2)
    assert {name: str(getattr(feature, "dtype", "")) for name, feature in pairs.features.items()} == {
        "prompt": "string",
        "chosen": "PIL.Image.Image",
        "rejected": "PIL.Image.Image",
        "preference": "float64",
        "chosen_prompt": "string",
        "rejected_prompt": "string",
        "chosen_seed": "int64",
        "rejected_seed": "int64",
        "chosen_reward": "float32",
        "rejected_reward": "float32",
    }
    assert len(load_preference_pairs(pairs)) == 1


def test_templates_vary_what_is_drawn_but_not_what_is_asked(pipeline: Any) -> None:
    """Candidates take turns, and each image comes back from its own text and seed."""
    templates, scorer = ["{prompt}", "a photo of {prompt}, {red}"], Redness()
    pairs = generate(pipeline, PROMPTS[:2], scorer, candidates=4, pairs_per_prompt=2, prompt_templates=templates)
    assert scorer.seen == [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    assert pairs["prompt"] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    for row in pairs:
        drawn = [row["prompt"], f"a photo of {row['prompt']}, {{red}}"]
        place = PROMPTS.index(row["prompt"])
        for side in ("chosen", "rejected"):
            text, seed = row[f"{side}_prompt"], row[f"{side}_seed"]
            assert text == drawn[[image_seed(0, place, index) for index in range(4)].index(seed) % 2]
            image = pipeline(text, generator=torch.Generator().manual_seed(seed), **FAST).images[0]
            assert abs(np.asarray(row[side], dtype=int) - np.asarray(image, dtype=int)).max() <= 1
    assert len({*pairs["chosen_prompt"], *pairs["rejected_prompt"]}) == 4


def test_batch_size_changes_nothing_but_rounding(pipeline: Any) -> None:
    one, three, many = (generate(pipeline, batch_size=size, candidates=3) for size in (1, 3, 9))
    for other in (three, many):
        assert other["chosen_seed"] == one["chosen_seed"]
        assert other["rejected_seed"] == one["rejected_seed"]
        np.testing.assert_allclose(other["chosen_reward"], one["chosen_reward"], atol=0.05)


def test_seeds() -> None:
    seeds = [image_seed(seed, place, index) for seed in range(3) for place in range(12) for index in range(12)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    # Written down once: results of older versions can be drawn again.
    assert image_seed(0, 0, 0) == 1404714976


def test_seed_and_options_reach_the_pipeline(pipeline: Any) -> None:
    pairs = generate(pipeline, PROMPTS[:1], candidates=2)
    assert same(pairs, generate(pipeline, PROMPTS[:1], candidates=2))
    assert pairs["chosen_seed"] != generate(pipeline, PROMPTS[:1], candidates=2, seed=1)["chosen_seed"]
    for options in ({"guidance_scale": 1.0}, {"negative_prompt": "a red bird"}, {"num_inference_steps": 3}):
        assert not same(pairs, generate(pipeline, PROMPTS[:1], candidates=2, **options))
    assert generate(pipeline, PROMPTS[:1], candidates=2, width=48)[0]["chosen"].size == (48, 32)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "flux2"])
def test_other_families(name: str) -> None:
    options = {} if name == "flux2" else {"negative_prompt": "a lamp"}  # FLUX.2 takes no such text
    pairs = generate(tiny_pipelines.build(name), candidates=2, num_inference_steps=1, **options)
    assert len(pairs) == 3
    assert all(more > less for more, less in zip(pairs["chosen_reward"], pairs["rejected_reward"], strict=True))


def test_an_option_that_the_pipeline_has_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"Flux2KleinPipeline takes no negative_prompt: leave it out"):
        generate(tiny_pipelines.build("flux2"), negative_prompt="blurry")


def test_soft_labels(pipeline: Any) -> None:
    (row,) = generate(pipeline, PROMPTS[:1], soft_labels=True)
    assert row["preference"] == pytest.approx(1 / (1 + math.exp(row["rejected_reward"] - row["chosen_reward"])))


def test_a_real_scorer_and_a_pipeline_from_its_folder(tmp_path: Path) -> None:
    scorer = PreferenceScorer(*tiny_models.build("clip"))
    pairs = generate(tiny_pipelines.save(tmp_path / "sd"), scorer=scorer)
    assert len(pairs) == 3
    for row in pairs:
        assert row["chosen_reward"] > row["rejected_reward"]
        assert scorer.compare(row["prompt"], row["chosen"], row["rejected"]) > 0.5


def test_the_progress_bar_comes_back(pipeline: Any) -> None:
    pipeline.set_progress_bar_config(desc="mine", disable=False)
    generate(pipeline, PROMPTS[:1], candidates=2)
    assert pipeline._progress_bar_config == {"desc": "mine", "disable": False}
    del pipeline._progress_bar_config
    with pytest.raises(ValueError, match="finite"):
        generate(pipeline, PROMPTS[:1], Infinite())
    assert not hasattr(pipeline, "_progress_bar_config")


# --- What is left out ---


class Infinite(Redness):
    def score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        return super().score(prompts, images) * math.inf


class Indifferent(Redness):
    def score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        rewards = super().score(prompts, images)
        return torch.where(torch.tensor([prompt == PROMPTS[0] for prompt in prompts]), 0.0, rewards)


def test_bad_images_are_left_out_and_counted_once(pipeline: Any, monkeypatch, caplog) -> None:
    """One of four candidates is NaN and one black, so the pair is of the other two."""
    spoil(pipeline, monkeypatch, {1: math.nan, 2: -1.0})
    scorer = Redness()
    with caplog.at_level(logging.WARNING, logger="bt_hf"):
        pairs = generate(pipeline, scorer=scorer)
    assert len(pairs) == 3
    assert {pairs[0]["chosen_seed"], pairs[0]["rejected_seed"]} == {image_seed(0, 0, 0), image_seed(0, 0, 3)}
    assert len(scorer.seen) == 10
    assert [record.getMessage() for record in caplog.records] == [
        "3 pairs from 3 prompts; left out: images not finite: 1, images of one colour: 1."
    ]


def test_a_prompt_with_one_usable_image_is_dropped(pipeline: Any, monkeypatch, caplog) -> None:
    spoil(pipeline, monkeypatch, {0: -1.0, 1: -1.0, 2: 1.0})
    pairs = generate(pipeline)
    assert pairs["prompt"] == PROMPTS[1:]
    assert "prompts with fewer than 2 usable images: 1" in caplog.text


def test_bad_images_can_raise(pipeline: Any, monkeypatch) -> None:
    spoil(pipeline, monkeypatch, {1: math.nan})
    with pytest.raises(ValueError, match=f"'a red apple' with seed {image_seed(0, 0, 1)} is not finite"):
        generate(pipeline, on_bad_images="raise")


def test_equal_rewards_make_no_pair(pipeline: Any, caplog) -> None:
    assert generate(pipeline, scorer=Indifferent())["prompt"] == PROMPTS[1:]
    assert "pairs of equal rewards: 1" in caplog.text


def test_identical_images_make_no_pair(pipeline: Any, monkeypatch, caplog) -> None:
    """A scorer that tells two copies apart: by the order in which they stand."""
    monkeypatch.setattr("bt_hf.diffusion.generation.generate.image_seed", lambda seed, place, index: place)
    scorer = Redness()
    monkeypatch.setattr(scorer, "score", lambda prompts, images: torch.arange(len(images)))
    with pytest.raises(ValueError, match=r"No usable pair from 3 prompts \(pairs of identical images: 3\)"):
        generate(pipeline, scorer=scorer)


def test_nothing_usable(pipeline: Any, monkeypatch) -> None:
    spoil(pipeline, monkeypatch, dict.fromkeys(range(4), math.nan))
    with pytest.raises(ValueError, match=r"No usable pair from 1 prompt \(images not finite: 4, prompts with fewer"):
        generate(pipeline, PROMPTS[:1])


# --- In a folder ---


def test_a_folder_is_a_dataset(pipeline: Any, tmp_path: Path) -> None:
    pairs = generate(pipeline, output_dir=tmp_path / "pairs", soft_labels=True)
    assert same(pairs, generate(pipeline, soft_labels=True))  # as in memory
    loaded = load_preference_pairs(tmp_path / "pairs")
    assert loaded["prompt"] == PROMPTS
    assert loaded["preference"] == pairs["preference"]
    assert loaded["chosen_seed"] == pairs["chosen_seed"]
    for row, own in zip(loaded, pairs, strict=True):
        assert row["chosen"].tobytes() == own["chosen"].tobytes()
        assert row["rejected"].tobytes() == own["rejected"].tobytes()
    # And as the Hub would show it.
    plain = datasets.load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(plain[0]["chosen"], Image.Image)
    assert plain["prompt"] == PROMPTS


class Killed(BaseException):
    pass


class Mortal(Redness):
    """Is killed before it judges the second group of prompts."""

    def score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        if self.seen:
            raise Killed
        return super().score(prompts, images)


def test_goes_on_where_it_was_killed(pipeline: Any, tmp_path: Path) -> None:
    folder, options = tmp_path / "pairs", {"candidates": 3, "batch_size": 3}
    whole = generate(pipeline, output_dir=tmp_path / "whole", **options)
    scorer = Redness()  # the same class, as the folder remembers it
    calls = Mortal()
    scorer.score = calls.score  # type: ignore[method-assign]
    with pytest.raises(Killed):
        generate(pipeline, scorer=scorer, output_dir=folder, **options)
    assert not (folder / "metadata.jsonl").exists()
    with (folder / "progress.jsonl").open("a") as file:
        file.write('{"place": 1, "rows": [')  # killed again, as it wrote a line

    scorer = Redness()
    assert same(generate(pipeline, scorer=scorer, output_dir=folder, **options), whole)
    assert set(scorer.seen) == set(PROMPTS[1:])
    for name in ("metadata.jsonl", "progress.jsonl", "settings.json"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    scorer = Redness()
    assert same(generate(pipeline, scorer=scorer, output_dir=folder, **options), whole)
    assert scorer.seen == []
    assert not [file for file in folder.rglob("*") if file.name.endswith(".tmp")]


def test_half_a_group_is_drawn_as_it_would_have_been(pipeline: Any, tmp_path: Path) -> None:
    """Two prompts in a batch, of which only the first was written."""
    whole = generate(pipeline, candidates=4, batch_size=8, output_dir=tmp_path)
    lines = (tmp_path / "progress.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "progress.jsonl").write_text(lines[0])
    assert same(generate(pipeline, candidates=4, batch_size=8, output_dir=tmp_path), whole)
    assert (tmp_path / "progress.jsonl").read_text() == "".join(lines)


def test_other_settings_are_named(pipeline: Any, tmp_path: Path) -> None:
    generate(pipeline, output_dir=tmp_path, candidates=2)
    with pytest.raises(ValueError, match=r"other settings \(seed was 0, is 5\). Give the same ones to go on, or name"):
        generate(pipeline, output_dir=tmp_path, candidates=2, seed=5)
    for options, name in (
        ({"prompts": PROMPTS[::-1]}, "prompts"),
        ({"num_inference_steps": 3}, "options"),
        ({"prompt_templates": ["a photo of {prompt}"]}, "prompt_templates"),
        ({"scorer": Indifferent()}, "scorer"),
        ({"pipeline": tiny_pipelines.build("sd", seed=1)}, "pipeline_weights"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({name} was"):
            generate(**{"pipeline": pipeline, "output_dir": tmp_path, "candidates": 2, **options})
    with pytest.raises(ValueError, match="candidates was 2, is 4; pairs_per_prompt was 1, is 2"):
        generate(pipeline, output_dir=tmp_path, candidates=4, pairs_per_prompt=2)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"other settings \(scheduler was"):
        generate(pipeline, output_dir=tmp_path, candidates=2)


def test_scorers_are_told_apart_by_their_weights(pipeline: Any, tmp_path: Path) -> None:
    scorers = [PreferenceScorer(*tiny_models.build("clip", seed=seed)) for seed in (0, 1)]
    generate(pipeline, scorer=scorers[0], output_dir=tmp_path, candidates=2)
    with pytest.raises(ValueError, match=r"other settings \(scorer was"):
        generate(pipeline, scorer=scorers[1], output_dir=tmp_path, candidates=2)


def test_settings_are_the_same_in_another_process(pipeline: Any, tmp_path: Path) -> None:
    """Where sets have another order, in which diffusers lists the options of a scheduler that were left out."""
    assert len(pipeline.scheduler.config["_use_default_values"]) > 1
    whole = generate(pipeline, PROMPTS[:1], candidates=2, output_dir=tmp_path)
    pipeline.scheduler.register_to_config(_use_default_values=pipeline.scheduler.config["_use_default_values"][::-1])
    assert same(generate(pipeline, PROMPTS[:1], candidates=2, output_dir=tmp_path), whole)


def test_settings_publish_no_path(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    generate(tiny_pipelines.save(tmp_path / "my-model"), PROMPTS[:1], candidates=2, output_dir=folder)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["pipeline"] == "StableDiffusionPipeline my-model"
    assert settings["options"] == FAST
    for name in ("settings.json", "metadata.jsonl", "progress.jsonl"):
        assert str(tmp_path) not in (folder / name).read_text()


def test_other_folders_are_left_alone(pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has files and no settings.json: name another folder"):
        generate(pipeline, output_dir=tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        generate(pipeline, output_dir=tmp_path / "notes.txt")


# --- Bad inputs ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": []}, ValueError, "at least one prompt"),
        ({"prompts": "a red apple"}, ValueError, "put it into a list"),
        ({"prompts": ["a red apple", " "]}, ValueError, "number 1 is ' '"),
        ({"candidates": 1}, ValueError, "`candidates` should be a whole number of at least 2, but got 1"),
        ({"candidates": 3, "pairs_per_prompt": 2}, ValueError, "twice `pairs_per_prompt` = 2"),
        ({"prompt_templates": []}, ValueError, "where the prompt goes.*but it is empty"),
        ({"prompt_templates": "{prompt}, flat"}, ValueError, "put it into a list"),
        ({"prompt_templates": ["{prompt}", "oil painting"]}, ValueError, "but one is 'oil painting'"),
        ({"pairs_per_prompt": 0}, ValueError, "at least 1, but got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"on_bad_images": "ignore"}, ValueError, "'skip' or 'raise', but got 'ignore'"),
        ({"scorer": 3}, TypeError, "a method `score"),
        ({"pipeline": 3}, TypeError, "but got int"),
        ({"generator": None}, ValueError, "The options generator of the pipeline are set here"),
        ({"num_images_per_prompt": 2, "output_type": "pil"}, ValueError, "num_images_per_prompt, output_type"),
    ],
)
def test_bad_inputs(options: dict, error: type[Exception], message: str) -> None:
    arguments = {"pipeline": print, "prompts": PROMPTS, "scorer": Redness(), **options}
    with pytest.raises(error, match=message):
        generate_preference_pairs(**arguments)


def test_scorers_must_answer_for_each_image(pipeline: Any, monkeypatch) -> None:
    scorer = Redness()
    monkeypatch.setattr(scorer, "score", lambda prompts, images: torch.zeros(3))
    with pytest.raises(ValueError, match=r"should give 8 finite rewards, one for each image, but gave shape \(3,\)"):
        generate(pipeline, scorer=scorer)


# --- The best of several ---


def test_best_of_n(pipeline: Any) -> None:
    image, ranking = best_of_n(pipeline, PROMPTS[0], Redness(), candidates=5, batch_size=2, **FAST)
    rewards = [reward for _, reward, _ in ranking]
    assert len(ranking) == 5
    assert rewards == sorted(rewards, reverse=True)
    assert image is ranking[0][0]
    assert rewards == pytest.approx([redness(image) for image, _, _ in ranking])
    again = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(ranking[0][2]), **FAST).images[0]
    assert abs(np.asarray(again, dtype=int) - np.asarray(image, dtype=int)).max() <= 1


def test_best_of_n_bad_inputs(pipeline: Any, monkeypatch) -> None:
    with pytest.raises(ValueError, match="`prompt` should be a text, but got list"):
        best_of_n(pipeline, PROMPTS, Redness())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`candidates` should be a whole number of at least 1"):
        best_of_n(pipeline, PROMPTS[0], Redness(), candidates=0)
    spoil(pipeline, monkeypatch, {0: math.nan, 1: -1.0})
    with pytest.raises(
        ValueError, match=r"None of 2 images is usable \(images not finite: 1, images of one colour: 1\)"
    ):
        best_of_n(pipeline, PROMPTS[0], Redness(), candidates=2, **FAST)


def test_candidates_keep_the_prompt_that_was_asked_for() -> None:
    """Z-Image writes its chat into the list of prompts that it is given."""
    drawn = draw(tiny_pipelines.build("z_image"), PROMPTS[:2], [1, 2], 2, **FAST, guidance_scale=0.0)
    assert [one.prompt for one in drawn] == PROMPTS[:2]


def test_pipelines_of_videos_are_refused_before_they_draw() -> None:
    with pytest.raises(ValueError, match="WanPipeline draws videos, and images alone are ranked"):
        best_of_n(tiny_pipelines.build("wan"), "a red apple", Redness())
