"""Kinds of saving, with a fault at each of their writes, and a judge of what there is afterwards.

    python tests/test_kills.py --long [KIND ...]

prints a line of JSON for each kind and fault. Each fault meets a process that was forked from this one, which has all
in memory and computes no gradients, as threads would not survive that.
"""

import json
import logging
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PIL
from safetensors import safe_open

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.data.atomic import SCRATCH
from bt_hf.data.cache import encode_once, read_tensors
from bt_hf.data.images import to_rgb
from bt_hf.diffusion.generation.pair_folder import FEATURES, PairFolder
from bt_hf.hub import pull
from bt_hf.hub.contract import contract_files
from bt_hf.hub.pull import pull_adapter
from bt_hf.training.lock import LOCK
from hub_server import TOKEN, Account, Hub, serving
from kills import FULL_DISK, KILL, Outcome, each_fault, forked, touches
from tiny_models import build, picture, red_pairs
from tiny_trainers import make

QUIET = {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
WORDS = "My own words about it."
Digest = dict[str, Any]


# --- What a folder holds ---


def digest(file: Path) -> Any:
    """The content of a file; of safetensors without the order of its header, which changes from run to run."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name).numpy().tobytes() for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata()
    if file.name == "adapter_config.json":
        config = json.loads(file.read_text())
        return {name: sorted(value) if isinstance(value, list) else value for name, value in config.items()}
    return file.read_bytes()


def digests(folder: Path) -> Digest:
    files = [path for path in folder.rglob("*") if path.is_file() and SCRATCH not in path.parts]
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def essential(name: str) -> bool:
    return name not in ("README.md", LOCK) and not name.endswith(".png")


def state_of(found: Digest, old: Digest, new: Digest) -> str:
    """Say which of two states a folder is in; fail if in neither. Its card may be renewed after the rest."""
    parts = [{name: value for name, value in state.items() if essential(name)} for state in (found, old, new)]
    if parts[0] not in parts[1:]:
        changed = sorted(name for name in {*parts[0], *parts[2]} if parts[0].get(name) != parts[2].get(name))
        raise AssertionError(f"a mixture: {changed} are not the new ones, the others not the old ones")
    assert found.get("README.md") in (old.get("README.md"), new.get("README.md")), "the card is neither"
    return "old" if parts[0] == parts[1] else "new"


# --- Kinds of saving: each makes the old state, saves, and judges what there is ---


class Kind:
    """A kind of saving.

    Args:
        root: An empty folder; what is watched is `root / "saved"`.
    """

    faults = 12  # tried of each sort, unless it runs long

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.template = root, root / "saved", root / "template"
        self.folder.mkdir()

    def before(self) -> None:
        """Make the old state."""

    def work(self) -> Any:
        """Save."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Keep the old and the new state."""
        outcome = forked(self.before)
        assert outcome.error is None, outcome.error
        shutil.copytree(self.folder, self.template, symlinks=True)
        self.old = digests(self.folder)
        self.count, self.result = touches(self.work, self.template, self.folder)
        self.new = digests(self.folder)

    def judge(self, outcome: Outcome) -> str:
        """Say "old" or "new"; fail otherwise."""
        raise NotImplementedError


class SaveOver(Kind):
    """`save_model` over an older adapter of another config, with the owner's words in its card."""

    def __init__(self, root: Path, kind: str, over: bool = True) -> None:
        super().__init__(root)
        self.kind, self.over = kind, over
        self.trainers = [self.trainer(name, alpha) for name, alpha in (("old", 4), ("saved", 8))]

    def trainer(self, name: str, alpha: int) -> Any:
        options: dict[str, Any] = {"overwrite_output_dir": True, "lora_alpha": alpha}
        if self.kind == "lora":
            trainer: Any = make(self.root, **options)
            trainer.args.output_dir = str(self.root / name)
        else:
            model, processor = build("clip")
            args = BradleyTerryConfig(str(self.root / name), **QUIET, **options)
            trainer = BradleyTerryTrainer(model, args, red_pairs(8), processing_class=processor)
        with torch.no_grad():
            for number, weight in enumerate(trainer.model.parameters()):
                if weight.requires_grad:
                    weight.normal_(generator=torch.Generator().manual_seed(alpha * 1000 + number))
        return trainer

    def before(self) -> None:
        if self.over:
            self.trainers[0].save_model(str(self.folder))
            with (self.folder / "README.md").open("a") as card:
                card.write(f"\n{WORDS}\n")

    def work(self) -> None:
        self.trainers[1].save_model(str(self.folder))

    def judge(self, outcome: Outcome) -> str:
        # First as programs see it that know nothing of us.
        seen = digests(self.folder)
        for client in (
            ("adapter_config.json", "adapter_model.safetensors"),
            ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
        ):
            found = [seen.get(name) for name in client]
            if None not in found:
                states = [[state.get(name) for name in client] for state in (self.old, self.new)]
                assert found in states, f"{' and '.join(client)} are not of one save"
        if "README.md" in self.old:
            assert WORDS in seen["README.md"].decode()
        contract_files(self.folder)  # any way of ours to open it
        assert not (self.folder / SCRATCH).exists()
        return state_of(digests(self.folder), self.old, self.new)


class Card(SaveOver):
    """The card is written anew, with fields and the owner's words."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "reward")

    def before(self) -> None:
        self.trainers[1].save_model(str(self.folder))
        with (self.folder / "README.md").open("a") as card:
            card.write(f"\n{WORDS}\n")

    def work(self) -> None:
        self.trainers[1].create_model_card(license="mit")

    def judge(self, outcome: Outcome) -> str:
        super().judge(outcome)
        return "new" if b"license: mit" in (self.folder / "README.md").read_bytes() else "old"


class Checkpoints(Kind):
    """A training that writes a checkpoint at each step; afterwards it goes on to the same bits."""

    faults = 4
    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.trainer = self.make_trainer()
        self.known: dict[tuple[str, ...], str] = {}

    def make_trainer(self) -> Any:
        model, processor = build("clip")
        options = {**QUIET, **self.options, "per_device_train_batch_size": 4, "save_total_limit": 2}
        args = BradleyTerryConfig(str(self.folder), **options)
        return BradleyTerryTrainer(model, args, red_pairs(8), processing_class=processor)

    def work(self, resume: bool | None = None) -> dict[str, bytes]:
        self.trainer.train(resume_from_checkpoint=resume)
        weights = self.trainer.model.named_parameters()
        return {name: value.detach().numpy().tobytes() for name, value in weights if value.requires_grad}

    def judge(self, outcome: Outcome) -> str:
        weights = ("adapter_model.safetensors", "best_adapter.safetensors", "pytorch_lora_weights.safetensors")
        there = sorted(path.name for path in self.folder.glob("checkpoint-*"))
        for name in there:
            files = {path.name for path in (self.folder / name).iterdir()}
            assert {"optimizer.pt", "rng_state.pth", "trainer_state.json", weights[0]} <= files, f"{name} is not whole"
            assert not [path for path in files if path.startswith(".")]
            for file in weights:
                wanted = self.kept.get(f"{name}/{file}")
                assert wanted is None or digest(self.folder / name / file) == wanted
        key = tuple(sorted(self.seen_paths()))
        if key not in self.known:
            resumed = forked(lambda: self.work(bool(there)))
            assert resumed.error is None, resumed.error
            assert resumed.result == self.result, "the resumed training ends elsewhere"
            assert not (self.folder / SCRATCH).exists()
            assert not (self.folder / LOCK).exists()
            self.known[key] = "new" if f"checkpoint-{self.options['max_steps']}" in there else "old"
        return self.known[key]

    def seen_paths(self) -> list[str]:
        """Paths and sizes, by which a state of the folder is known again, without what is random in names."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return [
            re.sub(r"\.[0-9a-f]{8}\.", ".", f"{path.relative_to(self.folder)} {path.stat().st_size}") for path in paths
        ]

    def prepare(self) -> None:
        self.trainer.args.save_total_limit = None
        super().prepare()
        self.kept = self.new  # every checkpoint
        self.trainer.args.save_total_limit = 2
        self.count, self.result = touches(self.work, self.template, self.folder)


class BestAdapter(Checkpoints):
    """The same for a LoRA, with the overfitting guard's best adapter in each checkpoint."""

    faults = 4

    def make_trainer(self) -> Any:
        self.options = {**self.options, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
        trainer = make(self.root, evaluation=red_pairs(4, seed=1), pairs=red_pairs(4), **self.options)
        trainer.args.output_dir = str(self.folder)
        trainer.args.save_total_limit = 2
        return trainer

    def judge(self, outcome: Outcome) -> str:
        for path in self.folder.glob("checkpoint-*"):
            assert (path / "best_adapter.safetensors").is_file(), f"{path.name} has no best adapter"
        return super().judge(outcome)


class Cache(Kind):
    """Encoder outputs on the disk; afterwards another run finds or makes the same."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
        rows = [
            {"prompt": f"a {n % 2}", "chosen": picture([n * 40, 0, 0]), "rejected": picture([0, n * 40, 0])}
            for n in range(4)
        ]
        self.pairs = Dataset.from_list(rows, features=features)

    def work(self) -> Any:
        def images(values: list[Any], names: list[str]) -> dict[str, torch.Tensor]:
            return {"latents": torch.stack([torch.tensor(to_rgb(value).getpixel((0, 0))).float() for value in values])}

        def prompts(values: list[str]) -> dict[str, torch.Tensor]:
            return {"embeds": torch.tensor([[float(len(value)), float(ord(value[-1]))] for value in values])}

        found = encode_once(self.pairs, ("chosen", "rejected"), images, prompts, "m", str(self.folder), "Cache")
        tensors = [read_tensors(part, list(range(len(part)))) for part in found[1:]]
        return [{name: value.tolist() for name, value in part.items()} for part in tensors], found[0].to_dict()

    def judge(self, outcome: Outcome) -> str:
        left = len(list(self.folder.glob("*/*.arrow")))
        again = forked(self.work)
        assert again.error is None, again.error
        assert again.result == self.result
        return "new" if left == 2 else "old"


class Pairs(Kind):
    """Pairs that were drawn; afterwards another run goes on to the same folder."""

    def work(self) -> int:
        pairs = PairFolder(self.folder)
        pairs.begin({"prompts": 2})
        for place in range(2):
            if place not in pairs.finished:
                row = dict.fromkeys(FEATURES)
                row |= {"chosen": PIL.new("RGB", (4, 4), "red"), "rejected": PIL.new("RGB", (4, 4)), "prompt": "a"}
                pairs.add(place, "a", [row], {})
        return len(pairs.end())

    def judge(self, outcome: Outcome) -> str:
        state = "new" if (self.folder / "metadata.jsonl").exists() else "old"
        again = forked(self.work)
        assert again.error is None, again.error
        assert digests(self.folder) == self.new
        return state


class Pull(Kind):
    """A pull of a branch that has moved on; afterwards the branch in the cache is of the old commit or of the new."""

    faults = 12

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.stack = ExitStack()
        self.hub = self.stack.enter_context(serving(Hub()))
        self.hub.accounts[TOKEN] = Account("me")
        over = SaveOver(Path(tempfile.mkdtemp(dir=root)), "reward")
        for number, trainer in enumerate(over.trainers):
            outcome = forked(lambda number=number, trainer=trainer: trainer.save_model(str(root / f"v{number}")))
            assert outcome.error is None, outcome.error
            config = root / f"v{number}" / "adapter_config.json"  # a base built in code has no name
            named = json.loads(config.read_text()) | {"base_model_name_or_path": "me/base"}
            config.write_text(json.dumps(named))

    def online(self) -> None:
        """Let the client of this process, which is a forked one, talk to the hub."""
        values = {"ENDPOINT": self.hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        values["HUGGINGFACE_CO_URL_TEMPLATE"] = self.hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        # One file at a time, so that the same touch is the same moment in each run.
        pull.snapshot_download = partial(huggingface_hub.snapshot_download, max_workers=1)
        for name, value in values.items():
            setattr(huggingface_hub.constants, name, value)
        huggingface_hub.hf_api.api.endpoint = self.hub.endpoint

    def before(self) -> None:
        self.work()

    def prepare(self) -> None:
        self.hub.put("me/my-taste", self.root / "v0")
        self.states = {"old": digests(self.root / "v0")}
        outcome = forked(self.before)
        assert outcome.error is None, outcome.error
        shutil.copytree(self.folder, self.template, symlinks=True)
        self.hub.put("me/my-taste", self.root / "v1")
        self.states["new"] = digests(self.root / "v1")
        self.count, self.result = touches(self.work, self.template, self.folder)

    def work(self) -> str:
        self.online()
        return str(pull_adapter("me/my-taste", token=TOKEN, cache_dir=self.folder))

    def judge(self, outcome: Outcome) -> str:
        def cached() -> str:
            return str(pull_adapter("me/my-taste", cache_dir=self.folder, local_files_only=True))

        found = forked(cached)
        assert found.error is None, found.error
        state = state_of(digests(Path(found.result)), self.states["old"], self.states["new"])
        refs = [path.name for path in self.folder.glob("models--*/refs/*")]
        assert refs == ["main"]
        again = forked(self.work)
        assert again.error is None, again.error
        assert state_of(digests(Path(again.result)), self.states["new"], self.states["new"])
        return state


MAKE: dict[str, Callable[[Path], Kind]] = {
    "reward over old": lambda root: SaveOver(root, "reward"),
    "lora over old": lambda root: SaveOver(root, "lora"),
    "new folder": lambda root: SaveOver(root, "lora", over=False),
    "card": Card,
    "checkpoint": Checkpoints,
    "best adapter": BestAdapter,
    "cache": Cache,
    "pair folder": Pairs,
    "pull": Pull,
}


# --- The run ---


def check_error(text: str | None) -> None:
    """A full disk ends the work with one line that names it."""
    assert text is not None, "the disk was full, and nobody said so"
    assert "\n" not in text.strip(), text
    assert "o space left" in text or "could not be written" in text, text


def run(name: str, fault: str, long: bool) -> dict[str, Any]:
    """Try a fault at each touch of one kind of saving."""
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        kind = MAKE[name](Path(root))
        kind.prepare()
        seen: Counter[str] = Counter()
        problems = []
        most = None if long else kind.faults if fault == KILL else kind.faults // 2
        for at, outcome in each_fault(kind.work, kind.template, kind.folder, fault, kind.count, most):
            try:
                if fault == FULL_DISK and not (outcome.error is None and outcome.result == kind.result):
                    check_error(outcome.error)
                seen[kind.judge(outcome)] += 1
            except Exception as error:
                seen["neither"] += 1
                problems.append(f"{at} of {kind.count}: {type(error).__name__}: {error}")
    return {"kind": name, "fault": fault, "touches": kind.count, "seen": dict(seen), "problems": problems}


def main(arguments: list[str]) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = [name for name in arguments if not name.startswith("--")] or list(MAKE)
    for name in names:
        for fault in (KILL, FULL_DISK):
            if fault == FULL_DISK and name in ("cache", "pull"):  # their own tests have it
                continue
            began = time.monotonic()
            row = run(name, fault, "--long" in arguments)
            print(json.dumps(row | {"seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
