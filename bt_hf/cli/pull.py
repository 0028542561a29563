"""`bt-hf pull`: fetch a published adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bt_hf.cli.options import parse_options

_DESCRIPTION = "Fetch a published adapter into the cache, check it, and print where it is."
_EPILOG = """examples:
  bt-hf pull me/my-taste
  bt-hf pull me/my-taste --revision v1 --kind reward
  bt-hf score $(bt-hf pull me/my-taste) --prompt "a red apple" photos/

Prints the folder in the cache. Only safetensors, known text files and pictures are fetched, and no code is run.
"""


@dataclass
class PullOptions:
    """Options of `bt-hf pull`."""

    repo_id: str = field(metadata={"positional": True, "metavar": "REPO_ID", "help": '"owner/name"'})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit; default: main."})
    kind: Literal["reward", "lora"] | None = field(default=None, metadata={"help": "Refuse anything else."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Base that it should fit: Hub id, or a folder whose shapes are compared."},
    )
    offline: bool = field(default=False, metadata={"help": "Use the cache alone."})


def parse(argv: Sequence[str]) -> PullOptions:
    """Parse the options of `bt-hf pull`."""
    return parse_options("pull", PullOptions, argv, _DESCRIPTION, _EPILOG)


def run(options: PullOptions) -> None:
    """Fetch, and print the folder."""
    from bt_hf.hub.pull import pull_adapter  # seconds: only once the arguments are known to be right

    folder = pull_adapter(
        options.repo_id,
        revision=options.revision,
        base_model=options.base_model,
        kind=options.kind,
        local_files_only=options.offline,
    )
    print(folder)
