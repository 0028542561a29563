"""`bt-hf pull`: fetch a published adapter."""

import argparse
from collections.abc import Sequence

from bt_hf.cli import Parser

_EPILOG = """examples:
  bt-hf pull me/my-taste
  bt-hf pull me/my-taste --revision v1 --kind reward
  bt-hf score $(bt-hf pull me/my-taste) --prompt "a red apple" photos/

Prints the folder in the cache. Only safetensors, known text files and pictures are fetched, and no code is run.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `bt-hf pull`."""
    parser = Parser(
        prog="bt-hf pull",
        description="Fetch a published adapter into the cache, check it, and print where it is.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("repo_id", metavar="REPO_ID", help='"owner/name"')
    add("--revision", help="branch, tag or commit; default: main")
    add("--kind", choices=("reward", "lora"), help="refuse anything else")
    add("--base_model", "--base-model", help="base that it should fit: Hub id, or a folder whose shapes are compared")
    add("--offline", action="store_true", help="use what is in the cache")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
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
