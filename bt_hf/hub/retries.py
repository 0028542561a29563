"""Ask the Hub: again while it is busy or out of reach, and in the end with one line that says what is wrong."""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from huggingface_hub import get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
LONGEST_WAIT = 300.0  # seconds; a Hub that asks for more is asked again by hand
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
# The client itself tries these again, as often as we do.
_TRIED_BY_CLIENT = ("/preupload/", "/info/lfs/")


def asking(
    ask: Callable[[], T],
    doing: str,
    through: Sequence[type[Exception]] = (),
    only_refused: bool = False,
    when_cut: bool = True,
) -> T:
    """Ask the Hub, again after a while if it is busy, failing or out of reach; then say what is wrong, in one line.

    Args:
        ask: Asks; it may be asked again after any failure.
        doing: Completes "Could not ...".
        through: Errors that are the caller's to understand.
        only_refused: Ask again only if the Hub said that it did nothing.
        when_cut: Ask again after a cut connection; the client itself does in downloads.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return ask()
        except Exception as error:
            wait = _wait_before_next(error, attempt, only_refused, when_cut)
            if attempt < TRIES and wait is not None:
                logger.warning(
                    "The Hub: %s. Asking again in %g s (%d of %d).", _cause(error), wait, attempt, TRIES - 1
                )
                time.sleep(wait)
                continue
            if isinstance(error, tuple(through)):
                raise
            explain(error, doing)
    raise AssertionError("unreachable")


def _wait_before_next(error: Exception, attempt: int, only_refused: bool, when_cut: bool) -> float | None:
    """Seconds after which another try is worth it; `None` if none is."""
    request = getattr(getattr(error, "response", None), "request", None) or _request(error)
    if any(part in str(getattr(request, "url", "")) for part in _TRIED_BY_CLIENT):
        return None
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status not in _TRY_AGAIN or (only_refused and status != 429):
            return None
        told = error.response.headers.get("Retry-After", "")
        wait = float(told) if told.isdecimal() else 2.0 ** (attempt - 1)
        return wait if wait <= LONGEST_WAIT else None
    if isinstance(error, (_transport_error(), json.JSONDecodeError)) and when_cut and not only_refused:
        return 2.0 ** (attempt - 1)
    return None


def _request(error: Exception) -> Any:
    try:
        return error.request  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # httpx raises the latter where there is none
        return None


def _transport_error() -> type[Exception]:
    """What a cut connection raises: huggingface_hub 1 talks through httpx, 2 through httpx2."""
    error: type[Exception] = sys.modules[type(get_session()).__module__.partition(".")[0]].TransportError
    return error


def explain(error: Exception, doing: str) -> NoReturn:
    """Raise what a user can do something with, from what the client raised."""
    could_not = f"Could not {doing}: "
    # The client wraps what happened to an upload and to a download.
    inner = (
        error.__cause__ if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ else error
    )
    if isinstance(error, ValueError) and not isinstance(error, (HfHubHTTPError, json.JSONDecodeError)):
        raise error
    if isinstance(inner, LocalTokenNotFoundError):
        raise PermissionError(could_not + "you are not logged in to the Hub. Run `hf auth login`, or pass `token`.")
    if isinstance(inner, OfflineModeIsEnabled):
        raise ConnectionError(could_not + "offline mode is on. Unset HF_HUB_OFFLINE.") from error
    if isinstance(inner, RepositoryNotFoundError):
        raise FileNotFoundError(
            could_not + "the Hub has no such repo, or it is private and your token may not see it. Look at the name, "
            "and run `hf auth login` or pass `token`."
        ) from error
    if isinstance(inner, RevisionNotFoundError):
        raise FileNotFoundError(
            could_not + "the repo has no such revision. Name a branch, a tag or a commit."
        ) from error
    if isinstance(inner, EntryNotFoundError):
        raise FileNotFoundError(could_not + "a file that was just listed is gone. Try again.") from error
    if isinstance(inner, HfHubHTTPError):
        _explain_status(inner, could_not)
    if isinstance(inner, (_transport_error(), json.JSONDecodeError)):
        raise ConnectionError(
            could_not + f"the connection to the Hub was cut ({_cause(inner)}). Try again: it goes on from there."
        ) from error
    if isinstance(inner, OSError):
        raise type(error)(could_not + one_line(inner)) from error
    raise error


def _explain_status(error: HfHubHTTPError, could_not: str) -> NoReturn:
    status, says = error.response.status_code, _cause(error)
    if status == 401:
        raise PermissionError(could_not + "the Hub does not know this token. Run `hf auth login`, or pass `token`.")
    if status == 403:
        raise PermissionError(
            could_not
            + "the token may not do that. Take one with write access (https://huggingface.co/settings/tokens), "
            "or a repo of your own."
        ) from error
    if status in (409, 412):
        raise OSError(could_not + f"something else changed the repo at the same time ({says}). Try again.") from error
    if status == 429:
        raise ConnectionError(could_not + "the Hub asks for fewer requests. Try again later.") from error
    if status >= 500:
        raise ConnectionError(
            could_not + f"the Hub fails ({status}). Try again later: it goes on from there."
        ) from error
    raise OSError(could_not + f"the Hub refuses ({says}).") from error


def _cause(error: Exception) -> str:
    """What went wrong, without addresses: those of the storage are signed."""
    if isinstance(error, HfHubHTTPError):
        message = error.response.headers.get("X-Error-Message") or error.server_message
        return f"{error.response.status_code}{', ' + one_line(message) if message else ''}"
    return one_line(error)


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def expected_digest(sibling: Any) -> str | None:
    """The hash that the Hub announces of a file: SHA-256 of a large one, git's SHA-1 of a small one."""
    return sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id


def digest(data: bytes, like: str | None) -> str:
    """The hash of a file's content, of the kind that `like` is."""
    if like is not None and len(like) == 64:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` unless it is "name" or "owner/name"."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` should be 'name' or 'owner/name', but got {repo_id!r}.") from error
