"""Fetch a published adapter completely or not at all, and check it before use."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from bt_hf.data.atomic import write_file
from bt_hf.hub.checks import check_fit, check_weights, content_hash, expected_hash
from bt_hf.hub.contract import (
    ADAPTER_CONFIG,
    CONTRACT_FILES,
    KINDS,
    check_repo_id,
    check_revision,
    contract_files,
    find_kind,
    hub_id,
    in_contract,
)
from bt_hf.hub.peft_configs import read_config, shown
from bt_hf.hub.retries import call_hub
from bt_hf.hub.tensors import Shapes, check_tensors, file_shapes

logger = logging.getLogger(__name__)


def pull_adapter(
    repo_id: str,
    revision: str | None = None,
    token: str | None = None,
    *,
    base_model: str | Path | nn.Module | None = None,
    kind: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetch a published adapter into the cache of `huggingface_hub`, and check it. No code of the repo is run.

    Only safetensors, known text files and the card's pictures are fetched, and each is compared with the hash that the
    Hub announced. A branch or tag stands for the new files only once all of them are there and right.

    Args:
        repo_id: "owner/name".
        revision: Branch, tag or commit; default "main".
        token: Access token for the Hub; default: the one that is logged in.
        base_model: Base that the adapter will be put on: a loaded model or a folder, whose shapes are compared, or a
            Hub id, which must be the one that the adapter names.
        kind: Required kind, "reward" or "lora"; default: either.
        cache_dir: Cache folder; default: that of `huggingface_hub`.
        local_files_only: Use what is in the cache, as with `HF_HUB_OFFLINE=1`.

    Returns:
        The folder, which every loader takes in place of the id.

    Raises:
        ConnectionError: The Hub can't be reached and the cache does not have it.
        FileNotFoundError: There is no such repo or revision.
        OSError: A file that arrives is not the one that was announced.
        PermissionError: The token is wrong or may not read it.
        ValueError: It is not an adapter, or pickled, or not of this kind, or it does not fit the base.

    Example:
        ```python
        from bt_hf import PreferenceScorer, pull_adapter

        scorer = PreferenceScorer.from_pretrained(pull_adapter("me/my-taste", kind="reward"))
        ```
    """
    if kind not in (None, "reward", "lora"):
        raise ValueError(f"`kind` should be 'reward', 'lora' or None, but got {kind!r}.")
    check_repo_id(repo_id)
    if revision is not None:  # it becomes a path in the cache
        check_revision(revision)
    doing, revision = f"fetch {repo_id!r}", revision or constants.DEFAULT_REVISION
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    if local_files_only or constants.HF_HUB_OFFLINE:
        folder = _from_cache(repo_id, revision, cache)
        check_incoming(folder, repr(repo_id), base_model, kind)
        return folder
    api = HfApi(token=token)
    try:
        info = call_hub(lambda: api.model_info(repo_id, revision=revision, files_metadata=True), doing)
    except ConnectionError as error:
        try:
            folder = _from_cache(repo_id, revision, cache)
        except OSError:
            raise error from None
        logger.warning("%s This is the copy in the cache, commit %s.", error, folder.name[:8])
        check_incoming(folder, repr(repo_id), base_model, kind)
        return folder
    expected = {sibling.rfilename: expected_hash(sibling) for sibling in info.siblings or ()}
    found = find_kind(expected, repr(repo_id))
    _check_kind(found, kind, repr(repo_id))
    wanted = {name: announced for name, announced in expected.items() if in_contract(name)}
    commit = str(info.sha)
    folder = _download(repo_id, commit, wanted, token, cache, doing)
    check_incoming(folder, repr(repo_id), base_model, kind)
    if revision != commit:
        _remember(folder.parents[1], revision, commit)
    return folder


def check_incoming(folder: Path, source: str, base_model: str | Path | nn.Module | None, kind: str | None) -> None:
    """Raise a `ValueError` unless `folder` holds an adapter of this kind that fits the base; see `pull_adapter`."""
    files = contract_files(folder, links=True)
    found = find_kind((file.name for file in folder.iterdir()), source)
    _check_kind(found, kind, source)
    shapes = check_weights(files, found, source)
    if found == "model":
        return
    config = read_config(files[ADAPTER_CONFIG], source)
    named = config.get("base_model_name_or_path") or ""
    if base_model is None:
        if hub_id(named) is None:
            raise ValueError(
                f"{source} names {shown(named)} as its base, which is not a Hub id: pass `base_model` with the base, "
                "and ask its author to publish it again."
            )
        return
    if isinstance(base_model, nn.Module):
        check_tensors(config, shapes, base_model, source)
    elif Path(base_model).is_dir():
        weights = [
            file for part in (".", "unet", "transformer") for file in Path(base_model, part).glob("*.safetensors")
        ]
        base: Shapes = file_shapes(weights)
        check_fit(shapes, base, source, f"'{base_model}'")
    elif str(base_model) != named:
        raise ValueError(
            f"{source} was trained on {named!r}, not on '{base_model}': leave `base_model` out, or pass a folder or a "
            "loaded model to try another base of the same shapes."
        )


def _check_kind(found: str, wanted: str | None, source: str) -> None:
    """Raise a `ValueError` if an adapter is not of the kind that is wanted."""
    if found == "model" or wanted not in (None, found):
        use = {
            "reward": "`PreferenceScorer.from_pretrained` loads it",
            "lora": "`load_lora_weights` of a diffusers pipeline loads it",
            "model": "`AutoModel.from_pretrained` loads it",
        }
        expected = KINDS[wanted] if wanted else "an adapter"
        raise ValueError(f"{source} is {KINDS[found]}, not {expected}: {use[found]}.")


def _from_cache(repo_id: str, revision: str, cache: Path) -> Path:
    """Find the files of a revision in the cache, without asking the Hub."""
    try:
        names = [*sorted(CONTRACT_FILES), "model*.safetensors", "*_comfyui.safetensors"]
        return Path(
            snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=names, local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id!r} at {revision!r} is not in the cache, and the Hub may not be asked: fetch it once online."
        ) from error


def _download(
    repo_id: str, commit: str, wanted: Mapping[str, str | None], token: str | None, cache: Path, doing: str
) -> Path:
    """Fetch files of one commit and compare each with its hash; a damaged file is fetched once more."""
    damaged: list[str] = []
    for _ in range(2):
        folder = Path(
            call_hub(
                # By commit: a branch would point to half a state while files arrive.
                lambda: snapshot_download(
                    repo_id, revision=commit, token=token, cache_dir=cache, allow_patterns=list(wanted)
                ),
                doing,
                when_cut=False,
            )
        )
        damaged = [
            name
            for name, announced in wanted.items()
            if announced and content_hash(folder / name, announced) != announced
        ]
        for name in damaged:
            file = folder / name
            file.resolve().unlink()
            file.unlink(missing_ok=True)
        if not damaged:
            return folder
    raise OSError(
        f"Could not {doing}: {', '.join(damaged)} arrived twice with contents that do not have their hash. Nothing of "
        "it was kept; try again, or over another connection."
    )


def _remember(repo: Path, revision: str, commit: str) -> None:
    """Point a branch or tag of the cache to a commit, in one step.

    The layout is that of https://huggingface.co/docs/huggingface_hub/guides/manage-cache.

    Args:
        repo: Folder of a repo in the cache.
        revision: The branch or tag.
        commit: The commit.
    """
    for left in repo.glob(".*.tmp"):
        if time.time() - left.stat().st_mtime > 60:  # left by a pull that was killed; a younger one may be under way
            left.unlink(missing_ok=True)
    # Written beside `refs`: the client would take a file that a kill leaves there for another ref.
    write_file(repo / "refs" / revision, commit.encode(), scratch=repo)
