"""Encode once: what the files depend on, what is reused, and what a failed build leaves behind."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from tiny_models import picture, red_pairs
from tiny_pipelines import SIZE, build, save
from tiny_trainers import logged, make

from bt_hf.diffusion.cache import cache_pairs
from bt_hf.diffusion.collator import DiffusionCollator
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.family import find_family

TESTS = Path(__file__).parent


def encoder(sample: bool = False) -> PairEncoder:
    pipeline = build("sd")
    return PairEncoder(find_family(pipeline), pipeline, DiffusionCollator(SIZE), sample, torch.device("cpu"))


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
            torch.testing.assert_close(other[name], value, atol=1e-3, rtol=1e-2)


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


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    pairs = red_pairs(20)
    tiny = Dataset.from_list(
        [{"prompt": "a dog", "chosen": picture((9, 9, 9), 1, (3, 3)), "rejected": picture((1, 2, 3))}]
    )
    rows = [*pairs, *tiny]
    with pytest.raises(ValueError, match=r"`chosen` of row 20: image too small: 3x3"):
        make(tmp_path, pairs=Dataset.from_list(rows, features=pairs.features), cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*/*"))


def test_fixed_draws_use_cached_errors_and_change_nothing_else(tmp_path: Path) -> None:
    # 8 pairs in batches of 4: draws 0, 1, 0 of two steps each.
    options = {"max_steps": 6, "per_device_train_batch_size": 4}
    cached = make(tmp_path / "cached", noise_draws=2, **options)
    cached.train()
    assert cached.train_dataset.reference.shape == (8, 2, 2)
    computed = make(tmp_path / "computed", noise_draws=2, cache_latents=False, **options)
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


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code that caches 40 pairs in `folder`, in a fresh process."""
    start = f"""
        import os, resource, signal, sys
        sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
        import torch
        torch.set_num_threads(1)
        from test_latent_cache import cache_pairs, encoder, red_pairs
        own = encoder()
        """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code).format(folder=str(folder))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_killed_build_is_made_again(tmp_path: Path) -> None:
    code = """
        encode, calls = own.encode_images, []
        def kill_at_third(*args):
            calls.append(args)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*args)
        own.encode_images = kill_at_third
        cache_pairs(red_pairs(40), own, {folder!r}, "Encoding")
        """
    assert run(code, tmp_path).returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*/images.arrow"))
    cached = cache_pairs(red_pairs(40), encoder(), str(tmp_path), "Encoding")
    assert len(cached.images) == 80
    assert not list(tmp_path.glob("*/tmp*"))  # what the killed one left is gone
    # Another process finds the files.
    again = run("cache_pairs(red_pairs(40), own, {folder!r}, 'Encoding')", tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(list(tmp_path.glob("*/*.arrow"))) == 2


def test_a_full_disk_is_told_and_leaves_no_half_cache(tmp_path: Path) -> None:
    code = """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cache_pairs(red_pairs(40), own, {folder!r}, "Encoding")
        """
    ended = run(code, tmp_path)
    assert ended.returncode == 1
    assert "no space left to cache 80 rows" in ended.stderr.splitlines()[-1]
    assert "cache_latents=False" in ended.stderr.splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
