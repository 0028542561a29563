"""Encode once: what the files depend on, what is reused, and what a failed build leaves behind."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import DiffusionPipeline
from tokenizers.normalizers import NFC

from bt_hf.data import cache as encoded
from bt_hf.diffusion.cache import cache_pairs
from tiny_models import picture, red_pairs
from tiny_pipelines import PIPELINES, SIZE, build, encoder, save
from tiny_trainers import logged, make

ROOT = Path(__file__).parents[2]


def test_cached_and_streamed_training_are_the_same(tmp_path: Path) -> None:
    pairs = red_pairs(8)
    options = {"per_device_train_batch_size": 8, "learning_rate": 1e-3}  # Adam makes much of rounding
    cached = make(tmp_path / "cached", pairs=pairs, **options)
    plain = make(tmp_path / "plain", pairs=pairs, cache_latents=False, **options)
    stream = make(tmp_path / "stream", pairs=pairs.to_iterable_dataset(), **options)
    results = []
    for trainer in (cached, plain, stream):
        trainer.train()
        results.append({name: value for name, value in trainer.model.named_parameters() if "lora_" in name})
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, atol=2e-3, rtol=1e-2)


def test_encoders_run_once_and_leave_memory(tmp_path: Path) -> None:
    folder, calls = save(tmp_path / "base", "sd"), []
    pairs = red_pairs(6)
    rows = [pairs[i] for i in (0, 1, 2, 0, 1, 2)]  # three distinct prompts, six distinct images
    pairs = Dataset.from_list(rows, features=pairs.features)
    for run in range(2):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        vae, text = pipeline.vae, pipeline.text_encoder
        vae.encoder.register_forward_hook(lambda module, args, output: calls.append(len(output)))
        text.register_forward_hook(lambda module, args, output: calls.append(-len(output[0])))
        trainer = make(tmp_path / str(run), pipeline, pairs=pairs, cache_dir=str(tmp_path / "cache"))
        trainer.train()
        if run == 0:
            # Each once, and the first once more to learn its shape.
            assert sum(n for n in calls if n > 0) == 6 + 1
            assert -sum(n for n in calls if n < 0) == 3 + 1
            calls.clear()
        assert trainer.pipeline.vae is None
        assert trainer.pipeline.text_encoder is None
        assert pipeline.vae is vae  # the caller's own pipeline is whole
    assert calls == []  # a second run finds the files


def test_cache_depends_on_content_and_model(tmp_path: Path) -> None:
    def built(pairs: Dataset, seed: int = 0, **options: int) -> int:
        make(tmp_path / "x", build("sd", seed=seed), pairs=pairs, cache_dir=str(tmp_path / "cache"), **options)
        return len(list((tmp_path / "cache").glob("*/images.arrow")))

    pairs = red_pairs(4)
    assert built(pairs) == 1
    assert built(red_pairs(4)) == 1  # the same content
    assert built(red_pairs(4, seed=1)) == 2
    assert built(pairs, seed=1) == 3  # another VAE
    assert built(pairs, resolution=SIZE[0] // 2) == 4


def test_statistics_that_are_no_parameters_count() -> None:
    """FLUX.2's latents are standardised by buffers of its VAE."""
    own = encoder(name="flux2")
    before = own.fingerprint()
    own.pipeline.vae.bn.running_var += 0.1
    assert own.fingerprint() != before


def test_tokenizers_and_configs_count() -> None:
    own = encoder()
    tokenizer, prints = own.pipeline.tokenizer, [own.fingerprint()]
    tokenizer.model_max_length = 6
    prints.append(own.fingerprint())
    tokenizer.padding_side = "left"
    prints.append(own.fingerprint())
    tokenizer.pad_token = "a"
    prints.append(own.fingerprint())
    own.pipeline.text_encoder.config.hidden_act = "gelu"
    prints.append(own.fingerprint())
    tokenizer.backend_tokenizer.normalizer = NFC()  # no longer in small letters, with the same vocabulary
    prints.append(own.fingerprint())
    assert len(set(prints)) == 6


@pytest.mark.parametrize("name", PIPELINES)
def test_an_encoder_that_was_used_finds_the_same_files(name: str) -> None:
    own = encoder(name=name)
    before = own.fingerprint()
    own.encode_prompts(["a red apple", "a bird"])
    assert own.fingerprint() == before


def test_files_of_another_format_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_pairs(red_pairs(2), encoder(), str(tmp_path), "Encoding")
    monkeypatch.setattr(encoded, "FORMAT", encoded.FORMAT + 1)
    cache_pairs(red_pairs(2), encoder(), str(tmp_path), "Encoding")
    assert len(list(tmp_path.glob("*/images.arrow"))) == 2


def test_a_failed_build_leaves_no_half_file(tmp_path: Path) -> None:
    pairs = red_pairs(20)
    tiny = Dataset.from_list(
        [{"prompt": "a dog", "chosen": picture((9, 9, 9), 1, (3, 3)), "rejected": picture((1, 2, 3))}]
    )
    rows = [*pairs, *tiny]
    with pytest.raises(ValueError, match=r"`chosen` of row 20: image too small: 3x3"):
        make(tmp_path, pairs=Dataset.from_list(rows, features=pairs.features), cache_dir=str(tmp_path / "cache"))
    assert {path.name for path in (tmp_path / "cache").glob("*/*")} == {"images.lock"}


def test_a_build_that_waits_for_one_that_fails_takes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, items = tmp_path / "shard" / "images.arrow", Dataset.from_dict({"first": range(20)})
    caplog.set_level(logging.DEBUG, logger="filelock")

    def zeros(batch: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros(len(batch["first"]), 4)}

    with ThreadPoolExecutor() as pool:
        waiting: list[Future] = []

        def fail_at_tenth(batch: dict[str, list[int]]) -> dict[str, torch.Tensor]:
            if 10 in batch["first"]:
                waiting.append(pool.submit(encoded._build, path, items, zeros, "test", True))
                while "waiting" not in caplog.text:  # says the lock
                    time.sleep(0.01)
                raise ValueError("a bad image")
            return zeros(batch)

        with pytest.raises(ValueError, match="a bad image"):
            encoded._build(path, items, fail_at_tenth, "test", True)
        waiting[0].result()
    assert len(Dataset.from_file(str(path))) == 20


def test_fixed_noise_samples_use_cached_errors_and_change_nothing_else(tmp_path: Path) -> None:
    # 8 pairs in batches of 4: samples 0, 1, 0 of two steps each.
    options = {"max_steps": 6, "per_device_train_batch_size": 4}
    cached = make(tmp_path / "cached", num_noise_samples=2, **options)
    cached.train()
    assert cached.get_train_dataloader().dataset.reference.shape == (8, 2, 2)
    computed = make(tmp_path / "computed", num_noise_samples=2, cache_latents=False, **options)
    computed.train()
    assert logged(cached, "loss") == pytest.approx(logged(computed, "loss"), rel=1e-2)


@pytest.mark.parametrize("sample", [False, True])
def test_cached_batches_are_those_encoded_at_every_step(sample: bool, tmp_path: Path) -> None:
    pairs, own = red_pairs(5, preference=[1.0, 0.5, 0.0, 0.7, 1.0]), encoder(sample)
    cached = cache_pairs(pairs, own, str(tmp_path), "Encoding")
    found = cached.collate([cached[index] for index in (3, 0, 4)])
    expected = own.encode(own.collator([pairs[index] for index in (3, 0, 4)]))
    assert found.keys() == expected.keys()
    assert found.pop("prompt") == expected.pop("prompt") == [pairs[index]["prompt"] for index in (3, 0, 4)]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    assert found["latents"].shape[0] == 6  # the chosen, then the rejected
    assert ("std" in found) == sample


def start(code: str, folder: Path) -> subprocess.Popen:
    """Run code that caches 40 pairs in `folder`, in a fresh process."""
    begin = f"""
        import os, resource, signal, sys
        sys.path[:0] = [{str(ROOT / "tests" / "support")!r}, {str(ROOT)!r}]
        import torch
        torch.set_num_threads(1)
        from bt_hf.data import cache as encoded
        from bt_hf.diffusion.cache import cache_pairs
        from tiny_models import red_pairs
        from tiny_pipelines import encoder
        own = encoder()
        encode, calls = own.encode_images, []
        """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(code).format(folder=str(folder))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_build_goes_on_and_processes_share_it(tmp_path: Path) -> None:
    kill = """
        encoded.SHARD = 16  # each in two batches, after one image that tells the shape
        def kill_at_eighth(*args):
            calls.append(args)
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*args)
        own.encode_images = kill_at_eighth
        cache_pairs(red_pairs(40), own, {folder!r}, "Encoding")
        """
    killed = start(kill, tmp_path)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    whole = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/images.arrow")}
    assert len(whole) == 2
    share = """
        encoded.SHARD = 16
        own.encode_images = lambda images, names: (calls.extend(names), encode(images, names))[1]
        cached = cache_pairs(red_pairs(40), own, {folder!r}, "Encoding")
        print(len(cached.images), len(calls))
        """
    both = [start(share, tmp_path) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    found = [[int(number) for number in out.split()] for out, _ in ended]
    assert [images for images, _ in found] == [80, 80]
    assert sum(calls for _, calls in found) == 3 * (16 + 1)  # the missing ones, once, whoever encoded them
    assert all(path.stat().st_mtime_ns == time for path, time in whole.items())
    assert not list(tmp_path.glob("*/tmp*"))  # left by the killed one


def test_rows_that_are_added_leave_the_files_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "SHARD", 8)
    pairs, own = red_pairs(12), encoder()
    few = cache_pairs(pairs.select(range(8)), own, str(tmp_path), "Encoding")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/images.arrow")}
    assert len(files) == 2
    many = cache_pairs(pairs, own, str(tmp_path), "Encoding")
    assert len(list(tmp_path.glob("*/images.arrow"))) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    for index in range(8):
        one, other = few.collate([few[index]]), many.collate([many[index]])
        torch.testing.assert_close(one["latents"], other["latents"], rtol=0, atol=0)
    fresh = own.encode(own.collator([pairs[11], pairs[9]]))
    torch.testing.assert_close(
        many.collate(many.__getitems__([11, 9]))["latents"], fresh["latents"], atol=1e-5, rtol=0
    )


def test_an_image_file_that_has_changed_is_encoded_anew(tmp_path: Path) -> None:
    for name, colour in (("a", (200, 0, 0)), ("b", (0, 200, 0))):
        picture(colour).save(tmp_path / f"{name}.png")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "a dog", "chosen": str(tmp_path / "a.png"), "rejected": str(tmp_path / "b.png")})
    )

    def latents() -> torch.Tensor:
        # On the disk, with a fingerprint that knows of the paths alone.
        rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "datasets"))
        for name in ("chosen", "rejected"):
            rows = rows.cast_column(name, Image())
        pairs = cache_pairs(rows, encoder(), str(tmp_path / "cache"), "Encoding")
        return pairs.collate([pairs[0]])["latents"]

    before = latents()
    torch.testing.assert_close(latents(), before, rtol=0, atol=0)
    picture((0, 0, 250)).save(tmp_path / "a.png")
    after = latents()
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


def test_images_on_the_disk_stay_there(tmp_path: Path) -> None:
    """Looking for what is new to the cache reads images a few at a time, however many there are."""
    noise = np.random.default_rng(0).bytes(100_000)
    rows = {"prompt": ["a red apple"], "chosen": [{"bytes": noise}], "rejected": [{"bytes": noise}]}
    features = Features({"prompt": Value("string"), "chosen": Image(decode=False), "rejected": Image(decode=False)})
    pairs = Dataset.from_generator(
        lambda: ({name: values[0] for name, values in rows.items()} for _ in range(600)),
        features,
        cache_dir=str(tmp_path),
        writer_batch_size=10,
    )  # 120 MB, half of them in each column
    system = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(system)
    pa.set_memory_pool(counted)
    try:
        found = encoded._digests(pairs, ("chosen", "rejected"), tmp_path, "test")
    finally:
        pa.set_memory_pool(system)
    assert len(found["chosen"]) == 600
    assert counted.max_memory() < 40e6  # a batch of 100 rows


def test_a_full_disk_is_told_and_leaves_no_half_cache(tmp_path: Path) -> None:
    code = """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cache_pairs(red_pairs(40), own, {folder!r}, "Encoding")
        """
    process = start(code, tmp_path)
    message = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == 1
    assert "no space left to cache 80 rows" in message
    assert "or turn the cache off" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PIPELINES)
def test_padding_on_either_side_gives_the_same_numbers(name: str, side: str, tmp_path: Path) -> None:
    """Cached, and encoded alone or beside longer prompts."""
    own = encoder(name=name)
    for part, tokenizer in own.pipeline.components.items():
        if part.startswith("tokenizer") and tokenizer is not None:
            getattr(tokenizer, "tokenizer", tokenizer).padding_side = side
    pairs = red_pairs(5)
    cached = cache_pairs(pairs, own, str(tmp_path), "Encoding")
    for rows in ([3, 0, 4], [2]):
        found = cached.collate([cached[row] for row in rows])
        expected = own.encode(own.collator([pairs[row] for row in rows]))
        assert found.keys() == expected.keys()
        for key in (key for key in expected if key.startswith("condition_")):
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("cached", [True, False])
def test_a_format_changes_neither_noise_nor_files(cached: bool, tmp_path: Path) -> None:
    pairs = red_pairs(4)

    def losses(pairs: Dataset) -> list[float]:
        trainer = make(tmp_path, pairs=pairs, evaluation=pairs, max_steps=1, cache_latents=cached)
        trainer.train()
        return [*logged(trainer, "loss"), trainer.evaluate()["eval_loss"]]

    expected = losses(pairs)
    files = set((tmp_path / "latents").rglob("*.arrow"))
    assert bool(files) == cached
    for name in ("numpy", "torch", "arrow", "pandas"):
        assert losses(pairs.with_format(name)) == expected
    assert set((tmp_path / "latents").rglob("*.arrow")) == files


def test_a_transform_is_applied_at_every_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn: list[int] = []

    def augment(batch: dict[str, list]) -> dict[str, list]:
        drawn.append(len(batch["prompt"]))
        return batch

    trainer = make(tmp_path, pairs=red_pairs(8).with_transform(augment), max_steps=3, per_device_train_batch_size=8)
    assert "has a transform (`with_transform`)" in caplog.text
    assert not list((tmp_path / "latents").rglob("*.arrow"))
    drawn.clear()
    trainer.train()
    assert sum(drawn) >= 3 * 8


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_of_the_same_tokens_are_encoded_once(name: str, tmp_path: Path) -> None:
    """The tokenizer decides: CLIP's reads small letters and single spaces, T5's single spaces."""
    own = encoder(name=name)
    texts = ["a red apple", "a  red  apple", "a RED apple", "a boat"]
    pairs = red_pairs(4).remove_columns("prompt").add_column("prompt", texts)
    distinct = len(set(own.tokens_of(texts)))
    cached = cache_pairs(pairs, own, str(tmp_path), "Encoding")
    assert len(cached.prompts) == distinct
    assert distinct == (2 if name in ("sd", "sdxl") else distinct)
    found = cached.collate(list(cached))
    expected = own.encode(own.collator(list(pairs)))
    for key in (key for key in expected if key.startswith("condition_")):
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5, check_dtype=False)
    assert torch.equal(found["row"], expected["row"])  # noise goes by the text, cached or not


@pytest.mark.parametrize("vectors", [1, 2])
def test_a_textual_inversion_of_another_vector_is_encoded_anew(vectors: int) -> None:
    """The same word, with a vector that somebody else has learnt."""

    def print_of(value: float) -> str:
        own = encoder()
        width = own.pipeline.text_encoder.config.hidden_size
        vector = torch.full((vectors, width), 0.1)
        vector[-1, 5] = value
        own.pipeline.load_textual_inversion({"<taste>": vector}, token="<taste>")
        return own.fingerprint()

    assert print_of(0.1) == print_of(0.1)
    assert len({print_of(0.1), print_of(0.2), encoder().fingerprint()}) == 3


def test_switches_of_the_pipeline_count() -> None:
    own = encoder(name="sdxl")
    before = own.fingerprint()
    own.pipeline.register_to_config(force_zeros_for_empty_prompt=not own.pipeline.config.force_zeros_for_empty_prompt)
    assert own.fingerprint() != before
