"""Open a studio: session, images and base, and a server on one port."""

import errno
import socket
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from bt_hf.reward.scorer import PreferenceScorer
from bt_hf.studio.app import build_app
from bt_hf.studio.desk import Desk
from bt_hf.studio.drawer import Drawer
from bt_hf.studio.learner import Learner
from bt_hf.studio.pool import Pool
from bt_hf.studio.security import Guard
from bt_hf.studio.session import Session
from bt_hf.studio.sources import (
    DEFAULT_BASE,
    DEFAULT_PIPELINE,
    DEFAULT_SHOWN,
    Source,
    default_unseen,
    open_source,
)
from bt_hf.studio.training import Drawing

# Base for images of one's own, where none is named.
USUAL_BASE = "openai/clip-vit-base-patch32"


@dataclass
class Studio:
    """Parts of an open studio.

    Attributes:
        session: The clicks, held until `close`.
        desk: Answers to the page.
        guard: Rules of who may ask.
    """

    session: Session
    desk: Desk
    guard: Guard

    def close(self) -> None:
        """Stop the background work, and let go of the session."""
        self.desk.jobs.stop(wait=20)
        if self.desk.drawer is not None:
            self.desk.drawer.stop()
        self.desk.learner.stop()
        self.session.close()


def open_studio(
    source: str | None,
    session: Path | None,
    guard: Guard,
    prompt: str | None = None,
    model: str | None = None,
    pipeline: str | None = None,
    prompts: Sequence[str] | None = None,
    uploads: bool = False,
) -> Studio:
    """Open images, session and base.

    Args:
        source: Folder of images or dataset; `None` is the embedded default.
        session: Folder of the clicks; default: named after the source, in the working directory.
        guard: Rules of who may ask.
        prompt: One prompt for all images.
        model: Hub id or folder of the base; default: that of the embedded default for it, else `USUAL_BASE`.
        pipeline: Hub id or folder of the pipeline to train; default: that of the embedded default for it, else none.
        prompts: Draw candidates of these with the pipeline, instead of a source.
        uploads: Take images from the page; without a source or prompts, begin without any.

    Raises:
        OSError: A folder or the base can't be read or written.
        ValueError: There are no images, or the session is of another kind.
    """
    if prompts is not None and (pipeline is None or source is not None):
        raise ValueError("--prompts: needs a --pipeline that draws them, and no folder or dataset")
    default = source is None and prompts is None and not uploads
    opened = open_source(source, prompt) if source is not None or default else None
    title = opened.title if opened is not None else "drawings" if prompts is not None else "pictures"
    if opened is not None and not uploads:
        _check_enough(opened, source or title)
    base = model or (str(DEFAULT_BASE) if default else USUAL_BASE)
    held = Session(session if session is not None else Path(f"{title.replace('/', '-')}-clicks"), title)
    try:
        pool = Pool(held, opened)
        learner = Learner(held, pool, PreferenceScorer.from_pretrained(base))
        desk = Desk(held, pool, learner, title, base, _drawing(default, pipeline), uploads)
        learner.start()
        if prompts is not None and pipeline is not None:
            desk.drawer = Drawer(pool, prompts, pipeline, busy=lambda: desk.jobs.busy)
            desk.drawer.start()
    except BaseException:
        held.close()
        raise
    return Studio(held, desk, guard)


def _check_enough(opened: Source, source: str) -> None:
    """Raise a `ValueError` unless there are two images, before a session is made for them."""
    listed = list(opened.listed())
    bad = [one for one in listed if one.problem is not None]
    left_out = f" ({len(bad)} left out, such as {bad[0].name}: {bad[0].problem})" if bad else ""
    if len(listed) == len(bad):
        raise ValueError(f"'{source}': no images found{left_out}; name a folder that holds PNG or JPEG files")
    if len(listed) - len(bad) < 2:
        raise ValueError(f"'{source}': only one image found{left_out}; a comparison takes two")


def _drawing(default: bool, pipeline: str | None) -> Drawing | None:
    """Return what is trained to draw; the small pipeline of the default has settings of its own."""
    if pipeline is not None or not default:
        return None if pipeline is None else Drawing(pipeline)
    options = {
        "max_steps": 120,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "validation_inference_steps": 20,
        "validation_guidance_scale": 3.0,
    }
    return Drawing(str(DEFAULT_PIPELINE), DEFAULT_SHOWN, default_unseen(), options)


def bind(host: str, port: int) -> socket.socket:
    """Listen at a port, before anything slow begins; port 0 takes a free one.

    Raises:
        OSError: The port is taken, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, as asyncio turns Nagle's algorithm off for TCP by name only: each answer would wait 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            text = f"port {port} is taken, perhaps by another studio: choose another one with --port, or 0 for any"
        else:
            text = f"cannot listen at {host}, port {port} ({getattr(error, 'strerror', None) or error})"
        raise OSError(number or errno.EINVAL, text) from None
    return listening


def serve(studio: Studio, listening: socket.socket, browser: bool, say: Callable[[str], None] = print) -> None:
    """Serve until interrupted, and print the address.

    Args:
        studio: The studio; closed at the end.
        listening: A bound socket.
        browser: Open the address in a browser.
        say: Prints.
    """
    config = uvicorn.Config(
        build_app(studio.desk, studio.guard),
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        limit_concurrency=200,
    )
    say(f"The studio is open: {studio.guard.address}")
    if browser:
        webbrowser.open(studio.guard.address)
    with closing(studio):  # also where nobody can be told any more
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            say("Closing, once the work in the background has come to a stop; Ctrl-C again does not wait for it.")
