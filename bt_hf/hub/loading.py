"""Load models and adapters: run no code of a repo, ask nobody, and apply no tensor before it is checked."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn

from bt_hf.data.atomic import recover
from bt_hf.hub.checks import check_lora_metadata, check_same_lora
from bt_hf.hub.contract import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LORA_WEIGHTS, check_revision, hub_id
from bt_hf.hub.peft_configs import read_config
from bt_hf.hub.tensors import adapter_shapes, check_tensors


def load_pretrained(cls: Any, name_or_path: str | Path, revision: str | None = None, **options: Any) -> Any:
    """Call `cls.from_pretrained` without running code of the repo, and without a question at the terminal.

    Args:
        cls: A class of transformers or diffusers, such as `AutoModel` or `DiffusionPipeline`.
        name_or_path: Hub id or folder.
        revision: Branch, tag or commit.
        options: Further arguments.

    Raises:
        ValueError: It can't be loaded without running code of its own, or `revision` is not the name of one.
    """
    if revision is not None:
        check_revision(revision)
        options["revision"] = revision
    if cls.__name__.startswith("AutoModel") and _find_file(
        name_or_path, ADAPTER_CONFIG, revision, options.get("token")
    ):
        # transformers would load it, and its base, unchecked.
        raise ValueError(f"'{name_or_path}' is an adapter itself, where a whole model is needed: name its base.")
    try:
        return cls.from_pretrained(str(name_or_path), trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"'{name_or_path}' asks to run code of its own, which this library never does: load it yourself, if you "
            "trust it, and pass the loaded object."
        ) from None


def find_adapter_config(name_or_path: str, revision: str | None = None, token: str | None = None) -> PeftConfig | None:
    """Load the adapter's config if `name_or_path` holds a PEFT adapter; `None` for a whole model.

    A fetched adapter that names a local path as its base, which would be its author's, names none then.

    Raises:
        ValueError: The config is not one that this library publishes.
    """
    file = _find_file(name_or_path, ADAPTER_CONFIG, revision, token)
    if file is None:
        return None
    config = read_config(file, repr(str(name_or_path)))
    base = config.get("base_model_name_or_path")
    if base and _is_fetched(file) and hub_id(base) is None:
        config["base_model_name_or_path"] = None
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config["peft_type"])]
    known = set(cls.__dataclass_fields__) - {"peft_type", "runtime_config"}
    return cls(**{key: value for key, value in config.items() if key in known})


def check_adapter(
    name_or_path: str | Path, model: nn.Module, revision: str | None = None, token: str | None = None
) -> Path:
    """Check an adapter against its base, from the config and the header of its file, before any tensor is read.

    Args:
        name_or_path: Hub id or folder.
        model: Base.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.

    Returns:
        Folder that holds the adapter.

    Raises:
        FileNotFoundError: There is no adapter, or its weights are not safetensors.
        ValueError: Its config is not one that this library publishes, or its tensors are not exactly those that the
            config declares for this model.
    """
    source = repr(str(name_or_path))
    config, weights = (_find_file(name_or_path, name, revision, token) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    if config is None or weights is None:
        missing = ADAPTER_CONFIG if config is None else ADAPTER_WEIGHTS
        raise FileNotFoundError(f"{source} holds no {missing}: save the adapter again, as safetensors.")
    check_tensors(read_config(config, source), adapter_shapes(weights, source), model, source)
    return config.parent


def load_adapter(
    model: nn.Module,
    name_or_path: str | Path,
    revision: str | None = None,
    token: str | None = None,
    is_trainable: bool = False,
) -> PeftModel:
    """Put an adapter on its base, after `check_adapter`, whose arguments and errors these are."""
    folder = check_adapter(name_or_path, model, revision, token)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)


def check_pipeline_lora(name_or_path: str | Path, model: nn.Module) -> None:
    """Check a LoRA before diffusers loads it, if it is one of ours; others have no config to check against.

    Args:
        name_or_path: Hub id or folder of a LoRA.
        model: Denoiser of the pipeline.

    Raises:
        ValueError: As `check_adapter`; or the file that diffusers reads holds something else than the adapter.
    """
    config, lora = (_find_file(name_or_path, name, None, None) for name in (ADAPTER_CONFIG, LORA_WEIGHTS))
    if config is None or lora is None:
        return
    folder = check_adapter(name_or_path, model)
    source = repr(str(name_or_path))
    check_same_lora(folder / ADAPTER_WEIGHTS, lora, source)
    check_lora_metadata(read_config(config, source), lora, source)


def _find_file(name_or_path: str | Path, file: str, revision: str | None, token: str | None) -> Path | None:
    """Find a file of a folder or of a repo on the Hub; `None` if there is none, or the Hub can't be reached."""
    if revision is not None:
        check_revision(revision)
    folder = Path(name_or_path)
    if folder.is_dir():
        recover(folder)
        return folder / file if (folder / file).is_file() else None
    try:
        return Path(hf_hub_download(str(name_or_path), file, revision=revision, token=token))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None


def _is_fetched(file: Path) -> bool:
    """True for a file in the cache of `huggingface_hub`: "models--owner--name/snapshots/commit/file"."""
    return file.parent.parent.name == "snapshots"
