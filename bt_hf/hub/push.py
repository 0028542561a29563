"""Publish an adapter on the Hugging Face Hub completely or not at all, after checks on this machine."""

import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bt_hf.hub.card_sections import address_card, has_parts, keep_owner_text, owner_text, plain_line, show_pictures
from bt_hf.hub.checks import Shapes, check_card, check_fit, check_weights, content_hash, expected_hash
from bt_hf.hub.contract import (
    CARD,
    KINDS,
    PAIRS,
    PICTURES,
    Content,
    check_repo_id,
    check_revision,
    contract_files,
    find_kind,
    hub_id,
    in_contract,
    read_content,
)
from bt_hf.hub.pairs import publishable_pairs, to_parquet
from bt_hf.hub.privacy import check_privacy, check_text, known_tokens, plain_pictures, with_base
from bt_hf.hub.retries import call_hub, one_line, raise_readable

logger = logging.getLogger(__name__)


def push_adapter(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    *,
    base_model: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    pairs: Dataset | None = None,
) -> CommitInfo:
    """Publish a folder that a trainer wrote, in one commit, after checks that run before anything leaves the machine.

    Only the folder contract goes up: adapter, processor, card and its pictures. Files that were published before and
    are not in the folder any more are deleted in the same commit. After a cut connection, call it again: large files
    that have arrived are not sent twice, and nothing changes for readers before all have.

    Args:
        folder: Folder that `trainer.save_model` wrote.
        repo_id: "name" or "owner/name".
        private: If only its owner sees the repo. A new repo is private unless `private=False`; an existing one
            stays as it is, and a contradiction is an error.
        revision: Branch to commit to, made if there is none; default "main".
        token: Access token for the Hub; default: the one that is logged in.
        base_model: Hub id of the base, if the adapter was trained from a local folder.
        create_pr: Propose the commit as a pull request, instead of committing.
        commit_message: Title of the commit; default "Upload a reward adapter", or what else it is.
        tag: Name for the new commit, such as "v1".
        pairs: Pairs to publish beside the adapter, as `pairs.parquet`; default: none, they are personal.

    Returns:
        The commit, with its `commit_url`, and `pr_url` of a pull request.

    Raises:
        ConnectionError: The Hub can't be reached, or fails time and again.
        FileExistsError: The tag is taken.
        FileNotFoundError: There is no such folder or repo.
        OSError: The Hub refuses for another reason.
        PermissionError: The token is missing or wrong, or may not write there.
        ValueError: A check failed; nothing was created or changed on the Hub.

    Example:
        ```python
        from bt_hf import push_adapter

        push_adapter("my-taste", "me/my-taste", base_model="openai/clip-vit-base-patch32", tag="v1")
        ```
    """
    files: dict[str, Content] = dict(contract_files(folder))
    find_kind((file.name for file in Path(folder).iterdir()), f"'{folder}'")
    if pairs is not None:
        files[PAIRS] = to_parquet(publishable_pairs(pairs, token))
    return publish(files, str(folder), repo_id, private, revision, token, base_model, create_pr, commit_message, tag)


def publish(
    files: Mapping[str, Content],
    source: str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    also_in: str | None = None,
) -> CommitInfo:
    """Publish files without a folder. The other arguments, results and errors are those of `push_adapter`.

    Args:
        files: Files of the folder contract, by name.
        source: Their name in an error.
        also_in: Folder of the repo that gets a copy without the card, such as "checkpoint-100".
    """
    if create_pr and (revision or tag):
        raise ValueError("A pull request goes to `main` and is not a commit yet: leave out `revision` and `tag`.")
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    named = {"commit_message": commit_message, "revision": revision, "tag": tag, "repo_id": repo_id}
    for argument, text in named.items():
        check_text(text or "", f"`{argument}`", known_tokens(token))
    api = HfApi(token=token)
    kind = find_kind(files, f"'{source}'")
    files, base, shapes = _checked(files, kind, f"'{source}'", base_model, token)
    doing = f"publish {KINDS[kind]} as {repo_id!r}"
    repo_id = call_hub(lambda: _full_name(api, repo_id), doing)
    found = _find_base(api, base, doing) if base is not None else None
    if found is not None:
        check_fit(shapes, _shapes_on_hub(api, found, doing), f"'{source}'", repr(base))
    card = address_card(read_content(files[CARD]).decode(), repo_id, base, _in_words(found))
    card = show_pictures(card, [name for name in PICTURES if name in files])
    _validate_card(card, doing)
    files[CARD] = card.encode()
    _make_repo(api, repo_id, private, create_pr, doing)
    if revision is not None:
        _make_branch(api, repo_id, revision, doing)
    branch, title = revision or constants.DEFAULT_REVISION, commit_message or f"Upload {KINDS[kind]}"
    copied = [name for name in files if also_in and name != CARD and not name.endswith(".png")]
    copies = {f"{also_in}/{name}": files[name] for name in copied}
    if create_pr:
        doing += " (the pull request may have been opened: look there before trying again)"
    commit = call_hub(
        lambda: _commit(api, repo_id, branch, {**files, **copies}, create_pr, title, tag),
        doing,
        # A request without an answer may have opened a pull request; a second one would be one too many.
        only_refused=create_pr,
    )
    if tag is not None:
        said = f"name the commit {tag!r} (it is published, as {commit.oid[:8]})"
        call_hub(lambda: api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True), said)
    return commit


def _checked(
    files: Mapping[str, Content], kind: str, source: str, base_model: str | None, token: str | None
) -> tuple[dict[str, Content], str | None, Shapes]:
    """Check files without the Hub; return them as published, the Hub id of the base, and the adapter's shapes."""
    files, base = dict(files), None
    check_text(base_model or "", "`base_model`", known_tokens(token), tokens_alone=True)
    if base_model is not None and hub_id(base_model) is None:
        raise ValueError(
            f"`base_model` should be the Hub id of the base, such as 'owner/name', but got {base_model!r}."
        )
    if kind != "model":
        files, base = with_base(files, base_model, source)
    if CARD not in files:
        raise ValueError(f"{source} has no {CARD}, so nobody would know what it is: write one, or save it again.")
    files = plain_pictures(files)
    shapes = check_weights(files, kind, source)
    check_card(read_content(files[CARD]).decode(errors="replace"))
    addressed = address_card(read_content(files[CARD]).decode(), "owner/name", base)
    check_privacy({**files, CARD: addressed.encode()}, known_tokens(token))
    return files, base, shapes


def _commit(
    api: HfApi,
    repo_id: str,
    branch: str,
    files: Mapping[str, Content],
    create_pr: bool,
    title: str,
    tag: str | None,
) -> CommitInfo:
    """Bring a branch to the state of `files`, in one commit on top of its newest; without a change there is none."""
    info = api.model_info(repo_id, revision=branch, files_metadata=True)
    remote = {sibling.rfilename: expected_hash(sibling) for sibling in info.siblings or ()}
    files = dict(files)
    if CARD in remote:
        files[CARD] = _with_text_of_hub(files[CARD], repo_id, str(info.sha), api.token)
    # Weights of one publication beside the processor of another would be neither.
    gone = [name for name in remote if in_contract(name) and name not in files]
    if tag is not None:
        same = not gone and all(
            name in remote and content_hash(content, remote[name]) == remote[name] for name, content in files.items()
        )
        _check_tag(api, repo_id, tag, info.sha if same else None)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    operations += [CommitOperationDelete(name) for name in gone]
    with warnings.catch_warnings():
        # The client warns that a Parquet file may belong to a dataset's repo: here it was asked for.
        warnings.filterwarnings("ignore", message=r"It seems that you are about to commit a data file")
        return api.create_commit(
            repo_id,
            operations,
            commit_message=title,
            revision=branch,
            create_pr=create_pr,
            parent_commit=info.sha,
        )


def _check_tag(api: HfApi, repo_id: str, tag: str, allowed: str | None) -> None:
    """Raise a `FileExistsError` if the tag stands for another commit than the one that is allowed."""
    taken = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tag in taken and taken[tag] != allowed:
        raise FileExistsError(
            f"{repo_id!r} has a tag {tag!r} already, and a tag does not move: choose another name for this one. "
            "Nothing was published."
        )


def _with_text_of_hub(card: Content, repo_id: str, commit: str, token: str | bool | None) -> bytes:
    """Add the owner's text on the Hub's page to our card, if nobody wrote anything into ours."""
    ours = read_content(card).decode()
    if owner_text(ours) or not has_parts(ours):
        return ours.encode()
    with tempfile.TemporaryDirectory() as folder:
        there = hf_hub_download(repo_id, CARD, revision=commit, local_dir=folder, token=token)
        return keep_owner_text(ours, Path(there).read_text(encoding="utf-8")).encode()


def _make_repo(api: HfApi, repo_id: str, private: bool | None, create_pr: bool, doing: str) -> None:
    """Create a repo unless there is one; see `push_adapter`."""
    try:
        info = call_hub(lambda: api.model_info(repo_id), doing, through=(RepositoryNotFoundError,))
    except RepositoryNotFoundError:
        if create_pr:
            raise FileNotFoundError(
                f"The Hub has no repo {repo_id!r} that a pull request could go to: look at its name."
            ) from None
        call_hub(lambda: api.create_repo(repo_id, private=private is not False, exist_ok=True), doing)
        return
    if private is not None and bool(info.private) != private:
        state = "private" if info.private else "public"
        raise ValueError(
            f"{repo_id!r} exists and is {state}, but `private={private}` was asked for: leave `private` out to "
            "publish there as it is, or change the repo's settings, or choose another name."
        )


def _make_branch(api: HfApi, repo_id: str, branch: str, doing: str) -> None:
    """Create a branch unless there is one."""
    try:
        call_hub(lambda: api.model_info(repo_id, revision=branch), doing, through=(RevisionNotFoundError,))
    except RevisionNotFoundError:
        call_hub(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), doing)


def _full_name(api: HfApi, repo_id: str) -> str:
    """Add the owner to `repo_id`. The Hub is always asked: a wrong token has to show before anything is created."""
    me = api.whoami()["name"]
    return repo_id if "/" in repo_id else f"{me}/{repo_id}"


def full_name(repo_id: str, token: str | None = None) -> str:
    """Add the owner to `repo_id`, with the account that is logged in.

    Raises:
        PermissionError: The token is missing or wrong.
    """
    check_repo_id(repo_id)
    return call_hub(lambda: _full_name(HfApi(token=token), repo_id), f"publish as {repo_id!r}")


def _validate_card(text: str, doing: str) -> None:
    """Raise a `ValueError` if the Hub refuses the card's metadata. Mirrors without that check are skipped."""
    try:
        call_hub(lambda: ModelCard(text).validate("model"), doing, through=(ValueError, HfHubHTTPError))
    except HfHubHTTPError as error:
        if error.response.status_code != 404:
            raise_readable(error, doing)
    except ValueError as error:
        raise ValueError(f"The Hub does not take the metadata of {CARD}: {one_line(error)}") from error


def _find_base(api: HfApi, base: str, doing: str) -> ModelInfo:
    """Look up the base on the Hub."""
    try:
        return call_hub(lambda: api.model_info(base), doing, through=(RepositoryNotFoundError,))
    except RepositoryNotFoundError:
        raise ValueError(
            f"The Hub has no model {base!r}, or your token may not see it, so nobody could use the adapter: publish "
            "the base first, or pass `base_model` with the right Hub id."
        ) from None


def _in_words(base: ModelInfo | None) -> str | None:
    """Name the revision and the licence of a base for the card; `None` for a model without one."""
    if base is None:
        return None
    said = getattr(base.card_data, "license", None) or "not stated in its card"
    return f"`{base.id}` at revision `{base.sha}`, licence {plain_line(str(said))}"


def _shapes_on_hub(api: HfApi, base: ModelInfo, doing: str) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the base's weights from the headers of its files; empty if it has no safetensors."""
    names = [sibling.rfilename for sibling in base.siblings or ()]
    folders = {"", "unet/", "transformer/"}
    wanted = [name for name in names if name.endswith(".safetensors") and name[: name.rfind("/") + 1] in folders]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in wanted:
        header = call_hub(lambda name=name: api.parse_safetensors_file_metadata(base.id, name), doing)  # type: ignore[misc]
        shapes |= {tensor: tuple(found.shape) for tensor, found in header.tensors.items()}
    return shapes
