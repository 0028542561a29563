"""`bt-hf studio`: a page on which a person clicks, and watches a model learn their taste."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bt_hf.cli.options import parse_options
from bt_hf.cli.pairs import read_prompts

_DESCRIPTION = """Open a page on which you choose between two pictures, and watch a model learn your taste.

Every click is on disk before it is confirmed: stop at any time, and the same command goes on at the same pair. The
session is a folder that load_preference_pairs, bt-hf reward and bt-hf lora read."""
_EPILOG = """examples:
  bt-hf studio                                        # emoji drawn by five houses of artists
  bt-hf studio my-photos/ --prompt "a photo of my garden"
  bt-hf studio my-photos/ --session my-clicks --port 8001
  bt-hf studio --prompts prompts.txt --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5
  bt-hf studio my-photos/ --host 0.0.0.0 --password "a long one"   # for other machines, such as your phone

Captions stand in metadata.jsonl (file_name, prompt) or in x.txt beside x.png; else file names group the images
("red apple 1.png", "red apple 2.png"), or all of them have one prompt.
"""
PASSWORD = "BT_HF_STUDIO_PASSWORD"


@dataclass
class StudioOptions:
    """Options of `bt-hf studio`."""

    source: str | None = field(
        default=None,
        metadata={
            "positional": True,
            "metavar": "FOLDER|DATASET",
            "help": "Folder of images, or a dataset (Hub id, folder or file); default: emoji from the repository.",
        },
    )
    session: str | None = field(
        default=None,
        metadata={"metavar": "FOLDER", "help": "Folder for the clicks; default: named after the images."},
    )
    prompt: str | None = field(
        default=None, metadata={"metavar": "TEXT", "help": "One prompt for all images, whatever captions they have."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "metavar": "ID",
            "help": "Hub id or folder of the dual encoder that learns; default: openai/clip-vit-base-patch32, or for "
            "the emoji the one beside them.",
        },
    )
    pipeline: str | None = field(
        default=None,
        metadata={"metavar": "ID", "help": "Hub id or folder of a pipeline, to train it to draw your way."},
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Text file, one prompt a line, which the pipeline draws while you click; instead of images.",
        },
    )
    uploads: bool = field(default=False, metadata={"help": "Take images from the page, too."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen at; any but loopback lets others in and asks for a password."},
    )
    port: int = field(default=8000, metadata={"help": "Port to listen at; 0 takes a free one."})
    password: str | None = field(
        default=None,
        metadata={"help": f"Password of the page; better in the environment variable {PASSWORD}."},
    )
    public_name: str | None = field(
        default=None,
        metadata={"metavar": "HOST", "help": "Name of a proxy with TLS before the page; default: that of a Space."},
    )
    no_browser: bool = field(default=False, metadata={"help": "Do not open the page in a browser."})

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port should be from 0 to 65535, but got {self.port}")
        if self.password is None:
            self.password = os.environ.get(PASSWORD) or None


def parse(argv: Sequence[str]) -> StudioOptions:
    """Parse the options of `bt-hf studio`."""
    return parse_options("studio", StudioOptions, argv, _DESCRIPTION, _EPILOG)


def run(options: StudioOptions) -> None:
    """Open the studio, and serve until interrupted."""
    import datasets

    from bt_hf.studio.security import Guard
    from bt_hf.studio.server import bind, open_studio, serve  # seconds: only once the arguments are known to be right

    datasets.disable_progress_bars()
    prompts = None if options.prompts is None else read_prompts(options.prompts, None, "prompt", None)
    names = tuple(name.lower() for name in (options.public_name, os.environ.get("SPACE_HOST")) if name)
    with bind(options.host, options.port) as listening:
        guard = Guard(options.host, listening.getsockname()[1], options.password, names)
        studio = open_studio(
            options.source,
            None if options.session is None else Path(options.session),
            guard,
            prompt=options.prompt,
            model=options.model,
            pipeline=options.pipeline,
            prompts=prompts,
            uploads=options.uploads,
        )
        if not guard.local:
            print(
                f"Every machine that reaches this one at {options.host} can ask for the password, over a connection "
                "that is not encrypted."
            )
        serve(studio, listening, not options.no_browser, lambda text: print(text, flush=True))
