"""`bt-hf push`: publish an adapter on the Hub."""

import argparse
from collections.abc import Sequence

from bt_hf.cli import Parser

_EPILOG = """examples:
  bt-hf push my-taste me/my-taste
  bt-hf push my-taste me/my-taste --public --tag v1
  bt-hf push my-taste me/my-taste --base_model me/my-base    # trained from a local folder, published since
  bt-hf push my-taste a-friend/my-taste --create_pr

Goes up: adapter, processor, card and its pictures. The repo is private unless --public. Log in with `hf auth login`.
Cut off? Call it again: it goes on where it stopped, and readers see the old files until all new ones are there.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `bt-hf push`."""
    parser = Parser(
        prog="bt-hf push",
        description="Publish an adapter on the Hub in one commit, after checks that run before anything is sent.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="what a trainer wrote")
    add("repo_id", metavar="REPO_ID", help='"name" or "owner/name"')
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--public", dest="private", action="store_false", help="everybody may see it")
    visibility.add_argument(
        "--private", dest="private", action="store_true", help="only you; the default of a new repo"
    )
    add("--revision", metavar="BRANCH", help="branch to commit to, made if there is none; default: main")
    add("--base_model", "--base-model", metavar="ID", help="Hub id of the base, if it was trained from a local folder")
    add("--create_pr", "--create-pr", action="store_true", help="propose it as a pull request, instead of committing")
    add("--commit_message", "--commit-message", "-m", metavar="TEXT", help="title of the commit")
    add("--tag", help="name for the new commit, such as v1")
    add("--pairs", help="publish these pairs too (Hub id, folder or file); by default they stay with you")
    parser.set_defaults(private=None)
    options = parser.parse_args(argv)
    if options.create_pr and (options.revision or options.tag):
        parser.error("--create_pr excludes --revision and --tag: a pull request goes to main and is no commit yet")
    return options


def run(options: argparse.Namespace) -> None:
    """Publish, and print where it is."""
    from bt_hf.data.pairs import load_preference_pairs
    from bt_hf.hub.push import push_adapter  # seconds: only once the arguments are known to be right

    commit = push_adapter(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        base_model=options.base_model,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
        tag=options.tag,
        pairs=load_preference_pairs(options.pairs) if options.pairs else None,
    )
    if options.create_pr:
        print(f"Proposed as {commit.pr_url}" if commit.pr_url else "Nothing to propose: these files are there already")
    else:
        print(f"Published as {commit.commit_url}")
