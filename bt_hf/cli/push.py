"""`bt-hf push`: publish an adapter on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bt_hf.cli.options import parse_options

_DESCRIPTION = "Publish an adapter on the Hub in one commit, after checks that run before anything is sent."
_EPILOG = """examples:
  bt-hf push my-taste me/my-taste
  bt-hf push my-taste me/my-taste --public --tag v1
  bt-hf push my-taste me/my-taste --base_model me/my-base    # trained from a local folder, published since
  bt-hf push my-taste a-friend/my-taste --create_pr

Goes up: adapter, processor, card and its pictures. The repo is private unless --public. Log in with `hf auth login`.
Cut off? Call it again: it goes on where it stopped, and readers see the old files until all new ones are there.
"""


@dataclass
class PushOptions:
    """Options of `bt-hf push`."""

    folder: str = field(metadata={"positional": True, "metavar": "FOLDER", "help": "Folder that a trainer wrote."})
    repo_id: str = field(metadata={"positional": True, "metavar": "REPO_ID", "help": '"name" or "owner/name"'})
    public: bool = field(default=False, metadata={"help": "Let everybody see it."})
    private: bool = field(default=False, metadata={"help": "Let only you see it; the default of a new repo."})
    revision: str | None = field(
        default=None,
        metadata={"metavar": "BRANCH", "help": "Branch to commit to, made if there is none; default: main."},
    )
    base_model: str | None = field(
        default=None,
        metadata={"metavar": "ID", "help": "Hub id of the base, if the adapter was trained from a local folder."},
    )
    create_pr: bool = field(default=False, metadata={"help": "Propose it as a pull request, instead of committing."})
    commit_message: str | None = field(
        default=None, metadata={"aliases": ["-m"], "metavar": "TEXT", "help": "Title of the commit."}
    )
    tag: str | None = field(default=None, metadata={"help": "Name for the new commit, such as v1."})
    pairs: str | None = field(
        default=None,
        metadata={"help": "Publish these pairs too (Hub id, folder or file); by default they stay with you."},
    )

    def __post_init__(self) -> None:
        if self.public and self.private:
            raise ValueError("--private: not allowed with --public")
        if self.create_pr and (self.revision or self.tag):
            raise ValueError(
                "--create_pr excludes --revision and --tag: a pull request goes to main and is not a commit yet"
            )

    @property
    def private_repo(self) -> bool | None:
        """Visibility as `push_adapter` takes it; `None`, the default, leaves a repo as it is."""
        return self.private if self.public or self.private else None


def parse(argv: Sequence[str]) -> PushOptions:
    """Parse the options of `bt-hf push`."""
    return parse_options("push", PushOptions, argv, _DESCRIPTION, _EPILOG)


def run(options: PushOptions) -> None:
    """Publish, and print where it is."""
    from bt_hf.data.pairs import load_preference_pairs
    from bt_hf.hub.push import push_adapter  # seconds: only once the arguments are known to be right

    commit = push_adapter(
        options.folder,
        options.repo_id,
        private=options.private_repo,
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
