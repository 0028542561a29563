"""Adapters of others: exactly the tensors that the config declares for the model at hand, or one line."""

import ast
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from bt_hf import PreferenceScorer, pull_adapter
from bt_hf.diffusion.loading import load_family
from bt_hf.hub.loading import check_adapter, check_pipeline_lora, find_adapter_config, load_adapter
from bt_hf.hub.patterns import check_patterns
from hub_published import BASE
from hub_server import Hub
from tiny_models import build, picture, save
from tiny_pipelines import build as build_pipeline
from tiny_pipelines import save as save_pipeline

pytest_plugins = ["hub_fixtures"]
ROOT = Path(__file__).parents[2]
LAYERS = ["text_projection", "visual_projection"]
SINGLE = r".*vision_model\..*layers?\.[01]\..*(q_proj|fc1)"
GOOD = {
    "lora": LoraConfig(r=2, target_modules=LAYERS, lora_dropout=0.1),
    "a pattern": LoraConfig(r=2, target_modules=SINGLE, exclude_modules=r".*layers\.1.*"),
    "all linear": LoraConfig(r=2, target_modules="all-linear"),
    "ranks by pattern": LoraConfig(
        r=2, target_modules=["q_proj", *LAYERS], rank_pattern={"q_proj": 3, "^text_p.*": 5}
    ),
    "some layers": LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers"),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=LAYERS),
    "rslora": LoraConfig(r=2, use_rslora=True, target_modules=LAYERS),
    "lora's bias": LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]),
    "convolution": LoraConfig(r=2, target_modules=["patch_embedding", "token_embedding"]),
    "a whole layer": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["visual_projection"]),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=12, target_modules=LAYERS),
    "loha": LoHaConfig(r=2, target_modules=LAYERS),
    "lokr": LoKrConfig(r=2, target_modules=["fc1"]),
    "ia3": IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
}


def saved(folder: Path, config: object, model: nn.Module | None = None) -> Path:
    """An adapter of random weights, as PEFT saves it."""
    adapted = get_peft_model(model or build()[0], config)
    for value in adapted.parameters():
        if value.requires_grad:
            nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def change(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def refused(folder: Path, says: str) -> None:
    """The one gate refuses in one line, at once, and the user's own base is as it was."""
    base = build()[0]
    before = bits(base)
    started = time.monotonic()
    for load in (check_adapter, lambda folder, base: PreferenceScorer.from_pretrained(folder, base)):
        with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
            load(folder, base)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700
    assert time.monotonic() - started < 20
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter", LoraConfig(r=2, target_modules=LAYERS))


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT of the biases of a LoRA
def test_published_kinds_load_as_in_peft(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, GOOD[name])
    base = build()[0]
    before = bits(base)
    ours = load_adapter(base, folder)
    theirs = PeftModel.from_pretrained(build()[0], folder)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    kept = ours.unload() if name != "a whole layer" else None
    if kept is not None:
        assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())


# PEFT takes the masks of an AdaLoRA for ranks of modules, and says that they match none.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_ranks_that_adalora_has_dropped(tmp_path: Path) -> None:
    model = get_peft_model(build()[0], AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=LAYERS))
    masks = {f"{layer}.lora_E": [True, False, True, True] for layer in LAYERS}
    model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(tmp_path)
    ours, theirs = load_adapter(build()[0], tmp_path), PeftModel.from_pretrained(build()[0], tmp_path)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    change(tmp_path, rank_pattern={key: [True] * 9 for key in masks})
    refused(tmp_path, "9 ranks for")


FURTHER = {
    "logit_scale": ("base_model.model.logit_scale", ()),
    "base_layer": ("base_model.model.text_projection.base_layer.weight", (16, 16)),
    "bias": ("base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.bias", (16,)),
    "layer norm": ("base_model.model.vision_model.post_layernorm.weight", (16,)),
    "without a prefix": ("logit_scale", ()),
    "one more layer": ("base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", (2, 16)),
    "a layer that is not there": ("base_model.model.nowhere.lora_A.weight", (2, 16)),
    "another adapter's name": ("base_model.model.text_projection.lora_A.other.weight", (2, 16)),
    "doubled prefix": ("base_model.model.base_model.model.logit_scale", ()),
    "empty": ("base_model.model.text_projection.lora_embedding_A", (0,)),
    "a whole module": ("base_model.model.visual_projection.modules_to_save.weight", (16, 16)),
    "huge without a byte": ("base_model.model.x.lora_A.weight", (0, 2**41)),
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_tensors_are_refused(adapter: Path, name: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensor, shape = FURTHER[name]
    save_file({**load_file(file), tensor: torch.ones(shape)}, file)
    refused(adapter, "does not declare|beside what its config declares|one half|is not loaded")


@pytest.mark.parametrize("how", ["one layer", "one half", "none", "renamed", "swapped", "cut", "integers", "8 bits"])
def test_fewer_or_other_tensors_are_refused(adapter: Path, how: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if how == "one layer":
        tensors = {name: value for name, value in tensors.items() if "visual" in name}
    elif how == "one half":
        tensors = {name: value for name, value in tensors.items() if "lora_A" in name}
    elif how == "none":
        tensors = {"unet.lora_A.weight": torch.ones(2, 2)}
    elif how == "renamed":
        tensors = {name.replace("lora_A", "lora_X"): value for name, value in tensors.items()}
    elif how == "swapped":
        tensors = {name: value.T.contiguous() for name, value in tensors.items()}
    elif how == "integers":
        tensors = {name: value.to(torch.int32) for name, value in tensors.items()}
    elif how == "8 bits":
        tensors = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}
    save_file(tensors, file)
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    refused(adapter, r"lacks|one half|does not declare|tensors of rank|not a float|not a safetensors file")


CONFIGS = {
    "another type": {"peft_type": "VERA"},
    "prompt": {"peft_type": "PROMPT_TUNING"},
    "type of a list": {"peft_type": ["LORA"]},
    "language": {"task_type": "CAUSAL_LM"},
    "megatron": {"megatron_core": "antigravity"},
    "megatron config": {"megatron_config": {"a": 1}},
    "rank of 10^8": {"r": 10**8},
    "rank of 10^30": {"r": 10**30},
    "rank beside a pattern": {"r": 10**8, "rank_pattern": {"x": 2}},
    "rank in a pattern": {"rank_pattern": {"text_projection": 10**8}},
    "rank of 0": {"r": 0},
    "a negative rank": {"r": -1},
    "rank in words": {"r": "8"},
    "rank of true": {"r": True},
    "rank of 1.5": {"r": 1.5},
    "another rank": {"r": 3},
    "another rank by pattern": {"rank_pattern": {".*projection": 7}},
    "alpha": {"lora_alpha": float("nan")},
    "infinite alpha": {"lora_alpha": float("inf")},
    "alpha of a pattern": {"alpha_pattern": {"text_projection": "2"}},
    "dropout": {"lora_dropout": 2},
    "biases of the base": {"bias": "all"},
    "biases": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, some steps": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "replicated layers": {"layer_replication": [[0, 1], [0, 1]]},
    "tokens": {"trainable_token_indices": [0, 1]},
    "parameters": {"target_parameters": ["logit_scale"]},
    "invocation": {"alora_invocation_tokens": [1]},
    "a key of nobody": {"__class__": "x"},
    "another key": {"auto_map": {"AutoModel": "run.py"}},
    "code": {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
    "mapping of more": {"auto_mapping": {"base_model_class": "X", "custom": "y"}},
    "class of a path": {"auto_mapping": {"base_model_class": "../X"}},
    "no modules": {"target_modules": None},
    "modules of numbers": {"target_modules": [1, 2]},
    "modules of a dict": {"target_modules": {"a": 1}},
    "other modules": {"target_modules": ["nowhere"]},
    "fewer modules": {"target_modules": ["text_projection"]},
    "whole module": {"modules_to_save": ["vision_model"]},
    "all excluded": {"exclude_modules": LAYERS},
    "revision": {"revision": "../../main"},
    "base": {"base_model_name_or_path": ["a"]},
    "dora": {"use_dora": True},
    "dora of 1": {"use_dora": 1},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_not_ours_are_refused(adapter: Path, name: str) -> None:
    change(adapter, **CONFIGS[name])
    refused(adapter, ".")


SLOW = [
    "(a+)+$",
    "(.*a){25}",
    "(.*)*x",
    "((a|aa)+)+b",
    "(?=(.*.*.*.*.*.*)z)",
    r"(\w+\s?)*\d",
    "(x|.*)+(x|.*)+(x|.*)+!",
]


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_patterns_that_hang_are_refused(pattern: str, key: str) -> None:
    names = ["a" * 40 + "!", ".".join(["vision_model"] * 9)]
    value = pattern if key == "target_modules" else [pattern]
    started = time.monotonic()
    with pytest.raises(ValueError, match="takes longer than 0.3 s"):
        check_patterns({key: value}, names, "x", seconds=0.3)
    assert time.monotonic() - started < 5


def test_a_pattern_that_hangs_is_never_run_here(adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr("bt_hf.hub.tensors.PATTERN_SECONDS", 0.5)
    for values in (
        {"target_modules": "(([a-z_]+)+\\.?)+(([a-z_]+)+\\.?)+#"},
        {"rank_pattern": {"([a-z_.]+)+#": 2}},
        {"alpha_pattern": {"([a-z_.]+)+#": 2}},
        {"exclude_modules": "([a-z_.]+)+#"},
        {"modules_to_save": ["([a-z_.]+)+#"]},
        {"layers_pattern": ["([a-z_.]+)+#"], "layers_to_transform": [0]},
    ):
        folder = Path(shutil.copytree(adapter, adapter.parent / f"slow-{len(list(adapter.parent.iterdir()))}"))
        change(folder, **values)
        refused(folder, "takes longer than 0.5 s")
    change(adapter, target_modules="(text|visual")
    refused(adapter, "not a regular expression")


def test_a_file_that_is_no_config(adapter: Path) -> None:
    for text in ("", "[]", "null", "{", "[" * 100_000, '{"r": ' + "9" * 10_000 + "}", "\ufeff{}", '"LORA"'):
        (adapter / "adapter_config.json").write_text(text)
        refused(adapter, "not valid JSON|no `peft_type`")
    (adapter / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    refused(adapter, "not valid JSON|no `peft_type`")
    (adapter / "adapter_config.json").write_text(" " * 5_000_000)
    refused(adapter, "not valid JSON")


def test_a_lora_of_a_denoiser(tmp_path: Path) -> None:
    unet = build_pipeline("sd").unet
    folder = saved(tmp_path, LoraConfig(r=2, target_modules=["to_q", "conv1"]), build_pipeline("sd").unet)
    check_adapter(folder, unet)
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.conv_in.weight": unet.conv_in.weight.detach().clone()}, file)
    with pytest.raises(ValueError, match="conv_in"):
        check_adapter(folder, unet)
    with pytest.raises(ValueError, match="does not fit its base SiglipModel"):
        check_adapter(saved(tmp_path / "clip", GOOD["lora"]), build("siglip")[0])


def test_a_pickle_is_never_read(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "holds no adapter_model.safetensors")


def test_a_pulled_base_is_a_hub_id(hub: Hub, online: Path, bases: None, copied: Path) -> None:
    for index, base in enumerate(
        ("/etc/passwd", "../clip", "~/clip", "C:\\clip", "a/b/c", "", "file://x", "\\\\s\\x")
    ):
        change(copied, base_model_name_or_path=base)
        hub.put(f"you/local-{index}", copied)
        with pytest.raises(ValueError, match="is not a Hub id: pass `base_model`") as caught:
            pull_adapter(f"you/local-{index}")
        assert "\n" not in str(caught.value)
        assert find_adapter_config(f"you/local-{index}").base_model_name_or_path in (None, "")
        with pytest.raises(ValueError, match="does not name its base model"):
            PreferenceScorer.from_pretrained(f"you/local-{index}")
        folder = pull_adapter(f"you/local-{index}", base_model=build()[0])
        assert PreferenceScorer.from_pretrained(folder, BASE).score("a red apple", [picture((9, 9, 9))]).isfinite()


@pytest.mark.parametrize(
    "revision", ["/etc/passwd", "../x", "a/../b", "a//b", "~", "C:\\x", "x/", "", " ", "a b", "a\nb", ".", "-x", "x."]
)
def test_a_revision_is_a_name_and_never_a_path(adapter: Path, revision: str) -> None:
    for load in (
        lambda: pull_adapter("me/my-taste", revision=revision),
        lambda: find_adapter_config("me/my-taste", revision),
        lambda: PreferenceScorer.from_pretrained("me/my-taste", revision=revision),
    ):
        with pytest.raises(ValueError, match="`revision` should be a branch, a tag or a commit") as caught:
            load()
        assert "\n" not in str(caught.value)


# --- No code, and no question ---


def asks(folder: Path, file: str, **values: object) -> str:
    """A folder whose file asks to run code that ends the process."""
    (folder / "run.py").write_text("raise SystemExit('code of the repo ran')")
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**known, **values}))
    return str(folder)


CODE = {
    "model": ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "run.C", "AutoModel": "run.M"}}),
    "processor": ("processor_config.json", {"processor_class": "E", "auto_map": {"AutoProcessor": "run.P"}}),
}


@pytest.mark.parametrize("what", CODE)
@pytest.mark.parametrize("whose", ["model", "base"])
def test_code_of_a_repo_is_neither_run_nor_asked_for(what: str, whose: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked at the terminal"))
    folder = asks(Path(save(tmp_path / "clip")), CODE[what][0], **CODE[what][1])
    adapter = saved(tmp_path / "adapter", GOOD["lora"])
    change(adapter, base_model_name_or_path=folder)
    with pytest.raises(
        (ValueError, OSError), match="run code of its own|No processor was found|can't be used"
    ) as caught:
        PreferenceScorer.from_pretrained(folder if whose == "model" else adapter)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", [["my_module", "Evil"], ["antigravity", "Evil"], ["run", "Evil"]])
def test_code_of_a_pipeline_is_not_run(named: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked at the terminal"))
    save_pipeline(tmp_path / "sd", "sd")
    folder = asks(tmp_path / "sd", "model_index.json", unet=named)
    (tmp_path / "sd" / "unet" / f"{named[0]}.py").write_text("raise SystemExit('code of the repo ran')")
    with pytest.raises(ValueError, match="asks to run code of its own") as caught:
        load_family(folder)
    assert "\n" not in str(caught.value)


def test_every_call_that_loads_goes_through_one_door() -> None:
    """Models, tokenizers, processors and pipelines load by `load_pretrained`, adapters by `load_adapter`."""
    foreign = re.compile(
        r"\b(?:Auto\w+|DiffusionPipeline|\w*Pipeline\w*|PeftModel|PeftConfig|CLIP\w+|pipeline_class)\.from_pretrained\("
        r"|\bfrom_single_file\("
    )
    allowed = {"bt_hf/hub/loading.py"}
    for file in sorted((ROOT / "bt_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and foreign.match(ast.unparse(node)):
                assert file.relative_to(ROOT).as_posix() in allowed, f"{file}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_a_base_that_is_an_adapter_is_refused(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(save(tmp_path / "clip"))
    base = saved(tmp_path / "base", LoraConfig(r=2, target_modules=LAYERS), model)
    adapter = saved(tmp_path / "adapter", GOOD["lora"])
    change(adapter, base_model_name_or_path=str(base))
    with pytest.raises((OSError, ValueError), match="is an adapter itself") as caught:
        PreferenceScorer.from_pretrained(adapter)
    assert "\n" not in str(caught.value)


def test_both_copies_of_a_lora_say_the_same(hub: Hub, online: Path, made: Path, tmp_path: Path) -> None:
    def pulled(name: str, says: str) -> None:
        hub.put(f"you/{name}", folder)
        with pytest.raises(ValueError, match=says) as caught:
            pull_adapter(f"you/{name}", base_model=build_pipeline("sd").unet)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=says):
            check_pipeline_lora(folder, build_pipeline("sd").unet)

    original = made / "my-taste-lora"
    check_pipeline_lora(original, build_pipeline("sd").unet)
    with safe_open(original / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(original / "pytorch_lora_weights.safetensors")
    told = json.loads(metadata["lora_adapter_metadata"])
    first = next(iter(tensors))
    for index, (further, values, says) in enumerate(
        (
            ({"unet.conv_in.weight": torch.ones(2)}, {}, "different tensors"),
            ({"text_encoder.x.lora_A.weight": torch.ones(2, 2)}, {}, "different tensors"),
            ({first: tensors[first] + 1}, {}, "not of the same training"),
            ({}, {"unet.r": 10**8}, "but expected a rank"),
            ({}, {"unet.lora_alpha": 7}, "`lora_alpha` = 7, but adapter_config.json says 6"),
            ({}, {"unet.megatron_core": "antigravity"}, "megatron_core"),
            ({}, {"unet.target_modules": "(a+)+$"}, "`target_modules`"),
            ({}, {"unet.rank_pattern": {"x": 9}}, "`rank_pattern`"),
        )
    ):
        folder = Path(shutil.copytree(original, tmp_path / f"lora-{index}"))
        data = {**metadata, "lora_adapter_metadata": json.dumps({**told, **values})}
        save_file({**tensors, **further}, folder / "pytorch_lora_weights.safetensors", metadata=data)
        pulled(f"lora-{index}", says)
