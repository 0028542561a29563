"""Publication of the adapters that `tests/hub/conftest.py` makes, and folders that are spoilt on purpose."""

import json
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from safetensors.torch import load_file, save_file

from bt_hf import push_adapter
from hub_server import TOKEN

BASE, PIPELINE = "me/tiny-clip", "me/tiny-sd"
TASTE, LORA = "me/my-taste", "me/my-taste-lora"
QUIET = {"disable_tqdm": True, "use_cpu": True, "report_to": "none", "max_steps": 2}


def push(made: Path, repo_id: str = TASTE, **options: object) -> CommitInfo:
    base = PIPELINE if "lora" in repo_id else BASE
    folder = made / ("my-taste-lora" if "lora" in repo_id else "my-taste")
    return push_adapter(folder, repo_id, **{"base_model": base, **options})


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
