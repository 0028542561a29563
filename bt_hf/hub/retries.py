"""Call the Hub, retry while it is busy or out of reach, and raise errors that a user can act on."""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from huggingface_hub import get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
LONGEST_WAIT = 300.0  # seconds; if the Hub asks for more, the user tries again later
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
# The client itself retries these, as often as we do.
_RETRIED_BY_CLIENT = ("/preupload/", "/info/lfs/")


def call_hub(
    request: Callable[[], T],
    doing: str,
    through: Sequence[type[Exception]] = (),
    only_refused: bool = False,
    when_cut: bool = True,
) -> T:
    """Call the Hub, and retry if it is busy, failing or out of reach.

    Args:
        request: Sends the request; it may be called again after any failure.
        doing: Completes "Could not ...".
        through: Errors to raise as they are, for the caller.
        only_refused: Retry only if the Hub said that it did nothing.
        when_cut: Retry after a cut connection. In downloads the client itself does.

    Returns:
        The result of `request`.

    Raises:
        Exception: In the end, an error of one line that says what to do, see `raise_readable`.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return request()
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
            raise_readable(error, doing)
    raise AssertionError("unreachable")


def _wait_before_next(error: Exception, attempt: int, only_refused: bool, when_cut: bool) -> float | None:
    """Return the seconds to wait before the next try; `None` if another try is useless."""
    if any(part in _url(error) for part in _RETRIED_BY_CLIENT):
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


def _url(error: Exception) -> str:
    """Return the address of the request that failed; empty if it is unknown."""
    try:
        request = getattr(getattr(error, "response", None), "request", None)
        return str((request or error.request).url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # httpx raises the latter where there is none
        return ""


def _transport_error() -> type[Exception]:
    """Return the error of a cut connection: huggingface_hub 1 talks through httpx, 2 through httpx2."""
    error: type[Exception] = sys.modules[type(get_session()).__module__.partition(".")[0]].TransportError
    return error


def raise_readable(error: Exception, doing: str) -> NoReturn:
    """Raise a built-in error of one line that says what to do, from an error of the client.

    Args:
        error: The client's error.
        doing: Completes "Could not ...".
    """
    could_not = f"Could not {doing}: "
    # The client wraps errors of uploads and downloads.
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
        _raise_for_status(inner, could_not)
    if isinstance(inner, (_transport_error(), json.JSONDecodeError)):
        raise ConnectionError(
            could_not + f"the connection to the Hub was cut ({_cause(inner)}). Try again: it goes on from there."
        ) from error
    if isinstance(inner, OSError):
        raise type(error)(could_not + one_line(inner)) from error
    raise error


def _raise_for_status(error: HfHubHTTPError, could_not: str) -> NoReturn:
    """Raise a built-in error for an HTTP status."""
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
    """Name the cause of an error without addresses, since those of the storage are signed."""
    if isinstance(error, HfHubHTTPError):
        message = error.response.headers.get("X-Error-Message") or error.server_message
        return f"{error.response.status_code}{', ' + one_line(message) if message else ''}"
    return one_line(error)


def one_line(text: object) -> str:
    """Join the lines of a text."""
    return " ".join(str(text).split())
