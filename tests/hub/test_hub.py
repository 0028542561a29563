"""Publishing and fetching: the unmodified client of huggingface_hub against the Hub of `hub_server`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer, pull_adapter, push_adapter
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.diffusion.card import write_lora_card
from bt_hf.diffusion.families.base import find_family
from bt_hf.hub.card_sections import keep_owner_text, owner_text
from bt_hf.hub.checks import CONTRACT
from bt_hf.reward.card import write_reward_card
from hub_server import READ_TOKEN, STRANGER, TOKEN, Hub, environment
from tiny_models import build, picture, red_pairs, save
from tiny_pipelines import build as build_pipeline
from tiny_pipelines import draw
from tiny_pipelines import save as save_pipeline
from tiny_trainers import make

METRICS = ("accuracy", "accuracy_low", "accuracy_high", "log_loss")
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
pytest_plugins = ["hub_fixtures"]
BASE, PIPELINE = "me/tiny-clip", "me/tiny-sd"
TASTE, LORA = "me/my-taste", "me/my-taste-lora"
QUIET = {"disable_tqdm": True, "use_cpu": True, "report_to": "none", "max_steps": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases and what was trained on them: `tiny-clip`, `my-taste`, `tiny-sd`, `my-taste-lora`."""
    folder = tmp_path_factory.mktemp("made")
    args = BradleyTerryConfig(str(folder / "my-taste"), **QUIET)
    trainer = BradleyTerryTrainer(save(folder / "tiny-clip"), args, red_pairs(8), red_pairs(4, seed=1))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    Image.new("RGB", (8, 8)).save(folder / "my-taste" / "reliability.png")
    (folder / "my-taste" / ".cache").mkdir()
    (folder / "my-taste" / ".cache" / "secret.json").write_text("{}")
    (folder / "my-taste" / "notes.txt").write_text("not of the contract")

    save_pipeline(folder / "tiny-sd", "sd")
    pipeline = build_pipeline("sd")
    family = find_family(pipeline)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=family.target_modules)
        model = get_peft_model(pipeline.unet, config)
    model.peft_config["default"].base_model_name_or_path = str(folder / "tiny-sd")
    model.save_pretrained(folder / "my-taste-lora", save_embedding_layers=False)
    family.save_lora(model, folder / "my-taste-lora")
    Image.new("RGB", (8, 8)).save(folder / "my-taste-lora" / "before_after.png")
    write_lora_card(folder / "my-taste-lora", object())
    return folder


@pytest.fixture
def bases(hub: Hub, made: Path) -> None:
    """The bases, published by somebody else's tools."""
    hub.put(BASE, made / "tiny-clip")
    hub.put(PIPELINE, made / "tiny-sd")


def push(made: Path, repo_id: str = TASTE, **options: object) -> CommitInfo:
    base = PIPELINE if "lora" in repo_id else BASE
    folder = made / ("my-taste-lora" if "lora" in repo_id else "my-taste")
    return push_adapter(folder, repo_id, **{"base_model": base, **options})


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of the reward that a test may spoil."""
    return Path(shutil.copytree(made / "my-taste", tmp_path / "my-taste"))


# --- Publishing ---


def test_push_publishes_the_contract_in_one_commit(hub: Hub, online: Path, bases: None, made: Path) -> None:
    commit = push(made)
    assert commit.commit_url.startswith(hub.endpoint + "/me/my-taste/commit/")
    assert hub.titles(TASTE) == ["Upload a reward adapter"]
    assert hub.repos[TASTE].private
    files = hub.files(TASTE)
    assert set(files) <= CONTRACT
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "reliability.png"} < set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert (made / "my-taste" / "adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == (BASE, "adapter")
    local = ModelCard.load(made / "my-taste" / "README.md").data.eval_results
    assert local is not None
    assert card.data.eval_results == local
    for line in (
        f'PreferenceScorer.from_pretrained("{TASTE}"',
        f'base = AutoModel.from_pretrained("{BASE}")',
        f'PeftModel.from_pretrained(base, "{TASTE}")',
    ):
        assert line in card.text
    assert "local folder" not in card.text
    assert str(made).encode() not in hub.everything()
    # The folder of the trainer is as it was.
    assert str(made) in (made / "my-taste" / "adapter_config.json").read_text()


def test_push_of_a_lora_names_its_base_everywhere(hub: Hub, online: Path, bases: None, made: Path) -> None:
    folder = Path(shutil.copytree(made / "my-taste-lora", online.parent / "leaky-lora"))
    # As diffusers' own scripts write it: the config beside the weights has the path.
    weights = folder / "pytorch_lora_weights.safetensors"
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.base_model_name_or_path": str(made / "tiny-sd")})
    save_file(load_file(weights), weights, metadata={"format": "pt", "lora_adapter_metadata": config})
    push_adapter(folder, LORA, base_model=PIPELINE)
    assert str(made).encode() not in hub.everything()
    files = hub.files(LORA)
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "before_after.png",
        "pytorch_lora_weights.safetensors",
    }
    assert f'pipe.load_lora_weights("{LORA}"' in files["README.md"].decode()
    assert f'DiffusionPipeline.from_pretrained("{PIPELINE}")' in files["README.md"].decode()
    assert b'"unet.lora_alpha\\": 6' in files["pytorch_lora_weights.safetensors"]


def test_two_halves_of_a_lora_are_of_one_training(hub: Hub, online: Path, bases: None, made: Path) -> None:
    folder = Path(shutil.copytree(made / "my-taste-lora", online.parent / "mixed-lora"))
    weights = folder / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="are not of the same training"):
        push_adapter(folder, LORA, base_model=PIPELINE)
    assert hub.state(LORA) is None


def test_push_again_changes_what_has_changed(hub: Hub, online: Path, bases: None, copied: Path) -> None:
    first = push_adapter(copied, TASTE, base_model=BASE)
    assert push_adapter(copied, TASTE, base_model=BASE).oid == first.oid  # no empty commit
    (copied / "reliability.png").unlink()
    weights = load_file(copied / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, copied / "adapter_model.safetensors")
    second = push_adapter(copied, TASTE, base_model=BASE, commit_message="Twice as much")
    assert hub.titles(TASTE) == ["Twice as much", "Upload a reward adapter"]
    assert "reliability.png" not in hub.files(TASTE)
    assert hub.repos[TASTE].commits[second.oid].parent == first.oid


def test_push_public_branch_tag_and_pull_request(hub: Hub, online: Path, bases: None, copied: Path) -> None:
    def again(**options: object) -> CommitInfo:
        with (copied / "README.md").open("a") as card:
            card.write("\nMore.\n")
        return push_adapter(copied, "my-taste", base_model=BASE, **options)

    first = again(private=False, tag="v1")
    assert not hub.repos[TASTE].private
    assert hub.repos[TASTE].tags == {"v1": first.oid}
    second = again(revision="mild", tag="v2")
    assert hub.repos[TASTE].branches["mild"] == second.oid
    assert hub.repos[TASTE].branches["main"] == first.oid
    proposed = again(create_pr=True)
    assert proposed.pr_url == f"{hub.endpoint}/{TASTE}/discussions/1"
    assert hub.repos[TASTE].pull_requests == {"refs/pr/1": proposed.oid}
    assert hub.repos[TASTE].branches["main"] == first.oid
    with (copied / "README.md").open("a") as card:
        card.write("\nBy you.\n")
    push_adapter(copied, TASTE, base_model=BASE, create_pr=True, token=STRANGER)
    assert set(hub.repos[TASTE].pull_requests) == {"refs/pr/1", "refs/pr/2"}
    with pytest.raises(FileNotFoundError, match="no repo 'me/nothing' that a pull request"):
        push_adapter(copied, "me/nothing", base_model=BASE, create_pr=True)
    assert hub.state("me/nothing") is None
    with pytest.raises(FileExistsError, match="has a tag 'v1' already"):
        again(tag="v1")
    assert hub.repos[TASTE].branches["main"] == first.oid
    with pytest.raises(ValueError, match="leave out `revision` and `tag`"):
        again(create_pr=True, tag="v3")
    with pytest.raises(ValueError, match="exists and is public, but `private=True`"):
        again(private=True)


def test_pairs_go_up_only_when_asked(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    push(made)
    assert "pairs.parquet" not in hub.files(TASTE)
    push(made, pairs=red_pairs(3))
    (tmp_path / "pairs.parquet").write_bytes(hub.files(TASTE)["pairs.parquet"])
    pairs = load_preference_pairs(tmp_path / "pairs.parquet")
    assert pairs["prompt"][:] == red_pairs(3)["prompt"][:]
    assert np.array_equal(np.asarray(pairs[0]["chosen"]), np.asarray(red_pairs(3)[0]["chosen"]))
    assert "pairs.parquet" not in {file.name for file in pull_adapter(TASTE).iterdir()}


# --- Checks before anything leaves the machine ---


def spoil(folder: Path, how: str) -> None:
    weights, config, card = (
        folder / name for name in ("adapter_model.safetensors", "adapter_config.json", "README.md")
    )
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "nan":
        save_file({name: value * float("nan") for name, value in load_file(weights).items()}, weights)
    elif how == "shape":
        wrong = {name: value[:, :5] if "lora_A" in name else value for name, value in load_file(weights).items()}
        save_file({name: value.contiguous() for name, value in wrong.items()}, weights)
    elif how in ("rank", "type"):
        wrong = {"r": 3} if how == "rank" else {"peft_type": "MAGIC"}
        config.write_text(json.dumps({**json.loads(config.read_text()), **wrong}))
    elif how == "pickle":
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()
    elif how == "language model":
        config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "CAUSAL_LM"}))
    elif how == "other layers":
        save_file({f"base_model.model.model.layers.{i}.lora_A.weight": torch.zeros(2, 2) for i in range(2)}, weights)
    elif how == "code":
        mapping = {"base_model_class": "Evil", "parent_library": "os.path"}
        config.write_text(json.dumps({**json.loads(config.read_text()), "auto_mapping": mapping}))
    elif how == "no card":
        card.unlink()
    elif how == "draft":
        card.write_text(card.read_text() + "\n[More Information Needed]\n")
    elif how == "metadata":
        card.write_text(card.read_text().replace("tags:\n", "tags: [unclosed\n"))
    elif how == "rejected metadata":
        card.write_text(card.read_text().replace("library_name:", "license: {a: b}\nlibrary_name:"))
    elif how == "token":
        card.write_text(card.read_text() + "\nlogin with hf_abcdefghijklmnopqrstuvwxyz\n")
    elif how == "own token":
        (folder / "tokenizer_config.json").write_text(json.dumps({"auth": TOKEN}))
    elif how == "path":
        card.write_text(card.read_text() + "\nTrained on /data/me/clicks.\n")
    elif how == "path in json":
        (folder / "processor_config.json").write_text(json.dumps({"name_or_path": "C:\\Users\\me\\clip"}))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "is no safetensors file .*: save the adapter again"),
        ("nan", "not finite in .*: it was cut or diverged"),
        ("shape", "_projection is 12 x 16 there, but the adapter was made for inputs of 5"),
        ("rank", "has tensors of rank 8, but its adapter_config.json says r = 3"),
        ("type", "has no `peft_type` that PEFT knows"),
        ("pickle", "as a pickle .*, which may run code"),
        ("language model", "another kind of model .task type CAUSAL_LM"),
        ("other layers", "not those of a dual encoder"),
        ("code", "asks for code of 'os.path'"),
        ("no card", "has no README.md"),
        ("draft", 'says "More Information Needed"|says ".More Information Needed.'),
        ("metadata", "metadata that can't be read"),
        ("rejected metadata", "does not take the metadata of README.md"),
        ("token", "README.md contains what looks like a token"),
        ("own token", "tokenizer_config.json contains what looks like a token"),
        ("path", "README.md names a path of this machine ./data/me/clicks"),
        ("path in json", "processor_config.json names a path of this machine"),
    ],
    ids=lambda value: value if len(value) < 18 else "",
)
def test_failed_check_is_one_line_and_creates_nothing(
    hub: Hub, online: Path, bases: None, copied: Path, how: str, says: str
) -> None:
    spoil(copied, how)
    with pytest.raises(ValueError, match=says) as caught:
        push_adapter(copied, TASTE, base_model=BASE)
    assert "\n" not in str(caught.value)
    assert hub.state(TASTE) is None
    changing = [path for method, path, _ in hub.requests if method != "GET" and "validate-yaml" not in path]
    assert not changing


def test_a_local_base_has_to_be_named(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names the local path .*tiny-clip' as its base.*pass `base_model`"):
        push(made, base_model=None)
    with pytest.raises(ValueError, match="`base_model` should be the Hub id"):
        push(made, base_model=str(made / "tiny-clip"))
    with pytest.raises(ValueError, match="has no model 'me/nothing'"):
        push(made, base_model="me/nothing")
    hub.put("me/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    push(made, "me/unsure", base_model="me/old")  # whose shapes nobody can look at
    hub.put("me/other", Path(save(tmp_path / "other", "siglip")))
    with pytest.raises(ValueError, match="does not fit its base 'me/other'"):
        push(made, base_model="me/other")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        push_adapter(tmp_path / "nowhere", TASTE)
    with pytest.raises(ValueError, match="holds no adapter"):
        push_adapter(tmp_path, TASTE)
    with pytest.raises(ValueError, match="`repo_id` should be"):
        push(made, "me/my taste")
    assert hub.state(TASTE) is None


@pytest.mark.parametrize(
    ("token", "repo_id", "says"),
    [
        (None, TASTE, "not logged in"),
        ("hf_nobodys", TASTE, "does not know this token"),
        (READ_TOKEN, TASTE, "may not do that. Take one with write access"),
        (STRANGER, TASTE, "may not do that"),
    ],
    ids=["none", "unknown", "may only read", "of somebody else"],
)
def test_push_without_the_right_token(
    hub: Hub, online: Path, bases: None, made: Path, monkeypatch, token: str | None, repo_id: str, says: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=says) as caught:
        push(made, repo_id, token=token)
    assert "\n" not in str(caught.value)
    assert hub.state(TASTE) is None


# --- Fetching ---


def test_pull_gives_what_was_pushed(hub: Hub, online: Path, bases: None, made: Path) -> None:
    commit = push(made, tag="v1")
    folder = pull_adapter(TASTE)
    assert folder.name == commit.oid
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == hub.files(TASTE)
    assert pull_adapter(TASTE, revision="v1") == pull_adapter(TASTE, revision=commit.oid) == folder
    pull_adapter(TASTE, kind="reward", base_model=BASE)
    pull_adapter(TASTE, base_model=made / "tiny-clip")
    pull_adapter(TASTE, base_model=build("clip")[0])
    assert snapshot_download(TASTE) == str(folder)  # the client finds it too


def test_pull_offline_from_the_cache(hub: Hub, online: Path, bases: None, made: Path, monkeypatch) -> None:
    push(made)
    with pytest.raises(FileNotFoundError, match="is not in the cache"):
        pull_adapter(TASTE, local_files_only=True)
    folder = pull_adapter(TASTE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert pull_adapter(TASTE) == folder
    assert not hub.requests
    with pytest.raises(ConnectionError, match="offline mode is on"):
        push(made)


def test_private_repo_needs_its_owners_token(hub: Hub, online: Path, bases: None, made: Path) -> None:
    push(made)
    for token in (STRANGER, False):
        with pytest.raises(FileNotFoundError, match="no such repo, or it is private"):
            pull_adapter(TASTE, token=token)
    with pytest.raises(PermissionError, match="does not know this token"):
        pull_adapter(TASTE, token="hf_nobodys")
    assert pull_adapter(TASTE, token=READ_TOKEN).is_dir()
    with pytest.raises(FileNotFoundError, match="no such revision"):
        pull_adapter(TASTE, revision="v9")
    with pytest.raises(ValueError, match="`revision` should be"):
        pull_adapter(TASTE, revision="../v9")


def test_pull_refuses_what_is_no_adapter(hub: Hub, online: Path, bases: None, made: Path, copied: Path) -> None:
    def refused(repo_id: str, says: str, **options: object) -> None:
        with pytest.raises(ValueError, match=says) as caught:
            pull_adapter(repo_id, **options)
        assert "\n" not in str(caught.value)

    push(made)
    push(made, LORA)
    refused(LORA, "is a preference LoRA, not a reward adapter: `load_lora_weights`", kind="reward")
    refused(TASTE, "is a reward adapter, not a preference LoRA: `PreferenceScorer", kind="lora")
    refused(TASTE, "`kind` should be", kind="model")
    refused(TASTE, "was trained on 'me/tiny-clip', not on 'me/tiny-sd'", base_model=PIPELINE)
    refused(TASTE, "none of the layers", base_model=made / "tiny-sd")
    refused(BASE, "is a whole model, not an adapter: `AutoModel")
    refused(PIPELINE, "holds no adapter")
    for index, (how, says) in enumerate(
        {
            "cut": "no safetensors file",
            "pickle": "may run code",
            "language model": "task type CAUSAL_LM",
            "other layers": "not those of a dual encoder",
            "code": "asks for code of 'os.path'",
        }.items()
    ):
        spoiled = Path(shutil.copytree(copied, copied.parent / f"spoiled-{index}"))
        spoil(spoiled, how)
        hub.put(f"you/spoiled-{index}", spoiled)
        refused(f"you/spoiled-{index}", says)


def test_pull_fetches_no_other_files(hub: Hub, online: Path, bases: None, made: Path) -> None:
    push(made)
    hub.put(TASTE, {"optimizer.pt": b"pickle", "run.py": b"raise SystemExit", "deep/adapter_model.bin": b"pickle"})
    folder = pull_adapter(TASTE)
    assert {file.name for file in folder.rglob("*")} <= CONTRACT
    assert not [path for _, path, _ in hub.requests if path.endswith((".pt", ".py", ".bin"))]


# --- Loading what was published ---

SCORES = """
import json, sys
from pathlib import Path
sys.path = [path for path in sys.path if not (Path(path) / "bt_hf").is_dir()]
try:
    import bt_hf
except ImportError:
    pass
else:
    sys.exit("bt_hf is here")
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
base, taste, *images = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), taste).eval()
processor = AutoProcessor.from_pretrained(taste)
images = [Image.open(path).convert("RGB") for path in images]
inputs = processor(text=["a red apple"], images=images, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    print(json.dumps(model(**inputs).logits_per_text[0].tolist()))
"""
IMAGES = """
import sys
from pathlib import Path
sys.path = [path for path in sys.path if not (Path(path) / "bt_hf").is_dir()]
try:
    import bt_hf
except ImportError:
    pass
else:
    sys.exit("bt_hf is here")
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
base, lora, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(lora)
options = dict(height=32, width=32, num_inference_steps=2, guidance_scale=1.0, output_type="pt")
save_file({"image": pipe("a red apple", generator=torch.Generator().manual_seed(0), **options).images[0]}, out)
"""


def run_fresh(code: str, hub: Hub, home: Path, *argv: object) -> str:
    """Run code in a process that has neither bt_hf nor anything in its cache."""
    home.mkdir()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, argv)],
        cwd=home,
        env=environment(hub, home / "hf"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_reward_loads_anywhere_and_scores_the_same(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path
) -> None:
    push(made)
    images = [tmp_path / "first.png", tmp_path / "second.png"]
    picture((220, 40, 40)).save(images[0])
    picture((40, 40, 220)).save(images[1])
    scorer = PreferenceScorer.from_pretrained(made / "my-taste")
    expected = scorer.score("a red apple", images).tolist()
    printed = run_fresh(SCORES, hub, tmp_path / "home", BASE, TASTE, *images)
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)
    published = PreferenceScorer.from_pretrained(TASTE)
    assert published.score("a red apple", images).tolist() == expected
    assert TOKEN.encode() not in b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_lora_loads_anywhere_and_draws_the_same(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path
) -> None:
    push(made, LORA)
    pipeline = build_pipeline("sd")
    plain = draw(pipeline)
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, made / "my-taste-lora").get_base_model()
    expected = draw(pipeline)
    run_fresh(IMAGES, hub, tmp_path / "home", PIPELINE, LORA, tmp_path / "image.safetensors")
    image = load_file(tmp_path / "image.safetensors")["image"]
    assert torch.allclose(image, expected, atol=1e-5)
    assert not torch.allclose(image, plain, atol=1e-2)


def test_code_of_the_published_cards_runs(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    push(made)
    push(made, LORA)
    monkeypatch.chdir(tmp_path)
    picture((220, 40, 40)).save("first.png")
    picture((40, 40, 220)).save("second.png")
    ours, plain = CODE.findall(hub.files(TASTE)["README.md"].decode())
    capsys.readouterr()
    exec(ours, {})
    compared = float(capsys.readouterr().out.splitlines()[0])
    exec(plain, {})
    assert float(capsys.readouterr().out) == pytest.approx(compared, abs=1e-5)
    _, peft = CODE.findall(hub.files(LORA)["README.md"].decode())
    # The tiny pipeline is made for small images.
    exec(peft.replace('"a red apple", ', '"a red apple", height=32, width=32, num_inference_steps=2, '), {})
    with_lora, without = (np.asarray(Image.open(f"{name}.png"), dtype=float) for name in ("with", "without"))
    assert np.abs(with_lora - without).mean() > 1


def test_lora_training_goes_on_from_a_published_id(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path
) -> None:
    push(made, LORA)
    trainer = make(tmp_path, LORA, validation_prompts=["a red apple"], validation_inference_steps=1, max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    assert hub.titles("me/out") == ["End of training"]
    files = hub.files("me/out")
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
    assert set(files) == expected | {"before_after.png"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == PIPELINE
    assert "](before_after.png)" in files["README.md"].decode()
    assert pull_adapter("me/out", kind="lora", base_model=made / "tiny-sd").is_dir()


def test_whole_models_are_published_too(hub: Hub, online: Path, made: Path, tmp_path: Path) -> None:
    args = BradleyTerryConfig(str(tmp_path / "whole"), **QUIET, full_finetuning=True, save_strategy="no")
    trainer = BradleyTerryTrainer(str(made / "tiny-clip"), args, red_pairs(4))
    trainer.push_to_hub()
    assert {"config.json", "model.safetensors", "README.md"} < set(hub.files("me/whole"))
    assert str(made).encode() not in hub.everything()
    assert 'AutoModel.from_pretrained("me/whole")' in hub.files("me/whole")["README.md"].decode()
    assert PreferenceScorer.from_pretrained("me/whole").score("a red apple", [picture((9, 9, 9))]).isfinite().all()


def test_training_goes_on_from_a_published_id(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    push(made)
    trainer = BradleyTerryTrainer(TASTE, BradleyTerryConfig(str(tmp_path / "more"), **QUIET), red_pairs(8))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" in name}
    assert any(value.abs().sum() > 0 for name, value in before.items() if "lora_B" in name)
    trainer.train()
    trainer.save_model()
    push_adapter(tmp_path / "more", TASTE)  # the base's id has come along
    assert len(hub.titles(TASTE)) == 2


# --- The trainer ---


def trainer_for(made: Path, folder: Path, **options: object) -> BradleyTerryTrainer:
    arguments = {**QUIET, "push_to_hub": True, "hub_token": TOKEN, "save_steps": 1, "max_steps": 2, **options}
    trainer = BradleyTerryTrainer(str(made / "tiny-clip"), BradleyTerryConfig(str(folder), **arguments), red_pairs(8))
    trainer.hub_base_model = BASE
    return trainer


def test_trainer_publishes_the_contract(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    trainer = trainer_for(made, tmp_path / "taste", push_to_hub=False, save_strategy="no")
    trainer.train()
    commit = trainer.push_to_hub(license="mit", tags=["mine"], tag="v1", model_name="ignored")
    assert hub.titles("me/taste") == ["End of training"]
    assert hub.repos["me/taste"].private
    assert hub.repos["me/taste"].tags == {"v1": commit.oid}
    files = hub.files("me/taste")
    assert set(files) <= CONTRACT
    data = ModelCard(files["README.md"].decode()).data
    assert (data.license, data.tags[0], data.tags[-1]) == ("mit", "bt_hf", "mine")
    assert "training_args.bin" not in {file.name for file in (tmp_path / "taste").iterdir()}


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_trainer_with_every_strategy(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path, strategy: str
) -> None:
    trainer = trainer_for(
        made,
        tmp_path / "taste",
        hub_strategy=strategy,
        hub_private_repo=False,
        hub_model_id=TASTE,
        hub_revision="run-1",
        hub_always_push=True,
    )
    assert hub.state(TASTE) is None  # nothing before there is something
    trainer.train()
    trainer.save_model()
    checkpoints = [] if strategy == "end" else ["Training in progress, step 2", "Training in progress, step 1"]
    titles = hub.titles(TASTE, "run-1")
    assert titles[-len(checkpoints) :] == checkpoints if checkpoints else titles == ["Model save"]
    assert not hub.repos[TASTE].private
    assert not hub.titles(TASTE, "main")
    folders = {name.split("/")[0] for name in hub.files(TASTE, "run-1") if "/" in name}
    assert folders == ({"checkpoint-1", "checkpoint-2"} if strategy == "all_checkpoints" else set())
    assert {name.split("/")[-1] for name in hub.files(TASTE, "run-1")} <= CONTRACT
    assert str(made).encode() not in hub.everything()


def test_training_survives_a_hub_that_refuses(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path, caplog
) -> None:
    trainer = trainer_for(made, tmp_path / "taste", hub_always_push=True)
    hub.accounts.clear()
    trainer.train()
    assert "The checkpoint of step 1 was not published: Could not publish" in caplog.text
    with pytest.raises(PermissionError, match="does not know this token"):
        trainer.save_model()
    assert (tmp_path / "taste" / "adapter_model.safetensors").is_file()
    with pytest.raises(PermissionError, match="does not know this token"):
        trainer_for(made, tmp_path / "other")


# --- Cards ---


def test_own_text_of_a_card_is_kept(hub: Hub, online: Path, bases: None, copied: Path) -> None:
    push_adapter(copied, TASTE, base_model=BASE)
    # On the Hub's page.
    text = hub.files(TASTE)["README.md"].decode()
    edited = text.replace("<!-- begin usage -->", "## My cat\n\nShe likes red.\n\n<!-- begin usage -->")
    edited = edited.replace("library_name:", "license: mit\nlibrary_name:")
    hub.put(TASTE, {"README.md": edited.replace("- seed: 42", "- seed: wrong").encode()})
    push_adapter(copied, TASTE, base_model=BASE)
    text = hub.files(TASTE)["README.md"].decode()
    assert "She likes red." in text
    assert "- seed: 42" in text
    assert ModelCard(text).data.license == "mit"
    assert owner_text(text) == "## My cat\n\nShe likes red."
    # In the folder.
    card = copied / "README.md"
    card.write_text(card.read_text() + "\nA dog too.\n")
    push_adapter(copied, TASTE, base_model=BASE)
    assert "A dog too." in hub.files(TASTE)["README.md"].decode()


def test_card_shows_the_diagram_that_is_there(tmp_path: Path) -> None:
    evaluation = {f"eval_{who}{key}": 0.5 for who in ("", "base_") for key in METRICS}
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=[evaluation]))
    write_reward_card(tmp_path, trainer)
    assert "reliability.png" not in (tmp_path / "README.md").read_text()
    (tmp_path / "reliability.png").touch()
    write_reward_card(tmp_path, trainer)
    assert "](reliability.png)" in (tmp_path / "README.md").read_text()


def test_renewing_a_card() -> None:
    old = "---\ntags:\n- a\n- x\n---\n<!-- begin summary; tags: a -->\n1\n<!-- end summary -->\nmine\n"
    new = (
        "---\ntags:\n- b\n---\n<!-- begin summary; tags: b -->\n2\n<!-- end summary -->\n"
        "<!-- begin usage -->\n3\n<!-- end usage -->\n"
    )
    kept = keep_owner_text(new, old)
    assert ModelCard(kept).data.tags == ["b", "x"]  # what was generated goes, what was added stays
    assert kept.endswith("<!-- begin summary; tags: b -->\n2\n<!-- end summary -->\nmine\n")  # what was taken out, too
    assert keep_owner_text(new, new) == new
    assert keep_owner_text(new, "My own card.") == "My own card."
    assert keep_owner_text(new, "# Draft\n[More Information Needed]\n") == new
    assert keep_owner_text(new, "---\nlicense: mit\n---\n").count("license: mit") == 1


def test_saving_again_keeps_the_owners_text(made: Path, tmp_path: Path) -> None:
    args = BradleyTerryConfig(str(tmp_path / "taste"), **QUIET, save_strategy="no")
    trainer = BradleyTerryTrainer(str(made / "tiny-clip"), args, red_pairs(8))
    trainer.save_model()
    card = tmp_path / "taste" / "README.md"
    assert "- steps: 2" not in card.read_text()
    card.write_text(card.read_text() + "\nMine.\n")
    trainer.train()
    trainer.save_model()
    assert "- steps: 2" in card.read_text()
    assert "hardware: " in card.read_text()
    assert card.read_text().endswith("\nMine.\n")


def test_no_token_is_written_anywhere(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    push(made, tag="v1")
    pull_adapter(TASTE)
    written = [file for file in [*tmp_path.rglob("*"), *made.rglob("*")] if file.is_file()]
    for token in (TOKEN, READ_TOKEN, STRANGER):
        assert token.encode() not in hub.everything()
        assert not [file for file in written if token.encode() in file.read_bytes()]
    assert not [path for _, path, authorized in hub.requests if authorized and path.startswith("/storage/")]
    assert HfApi().whoami()["name"] == "me"
    assert os.environ["HF_TOKEN"] == TOKEN
