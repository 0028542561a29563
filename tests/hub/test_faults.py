"""Faults between this machine and the Hub: after each there is the old state or the new one.

A table of all of them is printed after the tests; `examples/benchmarks/hub_faults.py` puts it into docs/hub.md.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, pull_adapter, push_adapter
from hub_server import READ_TOKEN, STRANGER, TOKEN, Fault, Hub
from tiny_models import red_pairs, save

pytest_plugins = ["hub_fixtures"]
BASE, TASTE = "me/tiny-clip", "me/my-taste"
ALWAYS = 99
NEW, OLD = "new", "old"


class Case(NamedTuple):
    """A fault and its outcome."""

    name: str
    fault: Fault
    ends: str  # in the OLD or the NEW state
    says: str | None = None  # pattern of the error; `None` if there is none
    waits: Sequence[float] | None = None


def no_repo(method: str, path: str) -> Fault:
    return Fault(method, path, status=404, headers={"X-Error-Code": "RepoNotFound"}, times=ALWAYS)


PUSH = [
    Case("token is not known", Fault("GET", "whoami", status=401), OLD, "does not know this token"),
    Case("no permission to commit", Fault("POST", "/commit/", status=403), OLD, "may not do that"),
    Case("no permission to upload", Fault("POST", "/preupload/", status=403), OLD, "may not do that"),
    Case("repo vanishes", no_repo("POST", "/preupload/"), OLD, "no such repo"),
    Case(
        "who am I: 429, Retry-After 3",
        Fault("GET", "whoami", status=429, headers={"Retry-After": "3"}),
        NEW,
        waits=[3],
    ),
    Case(
        "metadata refused",
        Fault("POST", "validate-yaml", status=400, body='{"errors": [{"message": "no"}]}', times=ALWAYS),
        OLD,
        "does not take the metadata",
    ),
    Case("metadata check: 500 once", Fault("POST", "validate-yaml", status=500), NEW, waits=[1]),
    Case(
        "look at the repo: 500 for good",
        Fault("GET", "my-taste$", status=500, times=ALWAYS),
        OLD,
        "the Hub fails .500",
    ),
    Case("look at the repo: answer cut", Fault("GET", "my-taste$", keep=9), NEW, waits=[1]),
    Case("before the upload: 500 once", Fault("POST", "/preupload/", status=500), NEW, waits=[1]),
    Case("before the upload: 503 for good", Fault("POST", "/preupload/", status=503, times=ALWAYS), OLD, "fails .503"),
    Case(
        "LFS batch: 429, Retry-After 2",
        Fault("POST", "/lfs/", status=429, headers={"Retry-After": "2"}),
        NEW,
        waits=[3],
    ),
    Case("LFS batch: answer cut", Fault("POST", "/lfs/", keep=9), NEW, waits=[1]),
    Case("upload cut in the middle", Fault("PUT", "/storage/", cut="within"), NEW, waits=[1]),
    Case("upload cut every time", Fault("PUT", "/storage/", cut="within", times=ALWAYS), OLD, "connection .* was cut"),
    Case("upload: 500 once", Fault("PUT", "/storage/", status=500), NEW, waits=[1]),
    Case("upload: 403 of the storage", Fault("PUT", "/storage/", status=403), OLD, "may not do that"),
    Case(
        "upload arrives with a wrong hash", Fault("PUT", "/storage/", corrupt="request"), OLD, "refuses .400.*SHA-256"
    ),
    Case("upload done, answer lost", Fault("PUT", "/storage/", cut="after"), NEW, waits=[1]),
    Case("commit: 409", Fault("POST", "/commit/", status=409), OLD, "changed the repo at the same time"),
    Case("commit: 412, another one came first", Fault("POST", "/commit/", status=412), OLD, "changed the repo at the"),
    Case(
        "commit: 429, Retry-After 7",
        Fault("POST", "/commit/", status=429, headers={"Retry-After": "7"}),
        NEW,
        waits=[7],
    ),
    Case(
        "commit: 429, Retry-After 9999",
        Fault("POST", "/commit/", status=429, headers={"Retry-After": "9999"}),
        OLD,
        "asks for fewer requests",
    ),
    Case("commit: 400", Fault("POST", "/commit/", status=400), OLD, "refuses .400"),
    Case("commit: 500 once", Fault("POST", "/commit/", status=500), NEW, waits=[1]),
    Case("commit: 500 for good", Fault("POST", "/commit/", status=500, times=ALWAYS), OLD, "fails .500", [1, 2, 4, 8]),
    Case("commit cut before it is read", Fault("POST", "/commit/", cut="before"), NEW, waits=[1]),
    Case("commit cut in the middle", Fault("POST", "/commit/", cut="within"), NEW, waits=[1]),
    Case("commit done, answer lost", Fault("POST", "/commit/", cut="after"), NEW, waits=[1]),
    Case("commit done, answer cut", Fault("POST", "/commit/", keep=9), NEW, waits=[1]),
]
WEIGHTS = "adapter_model.safetensors$"
PULL = [
    Case(
        "token is not known",
        Fault(
            "GET",
            "/api/models/",
            status=401,
            headers={"X-Error-Message": "Invalid credentials in Authorization header"},
        ),
        OLD,
        "does not know this token",
    ),
    Case("no permission", Fault("GET", "/api/models/", status=403), OLD, "may not do that"),
    Case("repo is gone", no_repo("GET", "/api/models/"), OLD, "no such repo"),
    Case(
        "revision is gone",
        Fault("GET", "/api/models/", status=404, headers={"X-Error-Code": "RevisionNotFound"}),
        OLD,
        "no such revision",
    ),
    Case("list of files: 500 once", Fault("GET", "/api/models/", status=500), NEW, waits=[1]),
    Case("list of files: answer cut", Fault("GET", "/api/models/", keep=9), NEW, waits=[1]),
    Case("list of files: 500 for good", Fault("GET", "/api/models/", status=500, times=ALWAYS), OLD),
    Case("tree: 500 once", Fault("GET", "/tree/", status=500), NEW),
    Case("head of a file: 500 once", Fault("HEAD", WEIGHTS, status=500), NEW, waits=None),
    Case("head of a file: 500 for good", Fault("HEAD", WEIGHTS, status=500, times=ALWAYS), OLD, "fails .500"),
    Case(
        "a file vanishes",
        Fault("HEAD", WEIGHTS, status=404, headers={"X-Error-Code": "EntryNotFound"}),
        OLD,
        "is gone",
    ),
    Case("small file: 500 once", Fault("GET", "/resolve/.*README.md$", status=500), NEW, waits=[1]),
    Case("small file cut once", Fault("GET", "/resolve/.*README.md$", keep=9), NEW, waits=[1]),
    Case("small file arrives changed once", Fault("GET", "/resolve/.*README.md$", corrupt="response"), NEW, waits=[]),
    Case(
        "download: 429, Retry-After 4",
        Fault("GET", "/storage/", status=429, headers={"Retry-After": "4"}),
        NEW,
        waits=[5],
    ),
    Case("download: 403 of the storage", Fault("GET", "/storage/", status=403), OLD, "may not do that"),
    Case(
        "download: 500 for good", Fault("GET", "/storage/", status=500, times=ALWAYS), OLD, "fails .500", [1, 2, 4, 8]
    ),
    Case("download cut in the middle once", Fault("GET", "/storage/", keep=100), NEW, waits=[1]),
    Case("download cut every time", Fault("GET", "/storage/", keep=0, times=ALWAYS), OLD, "connection .* was cut"),
    Case("download changed once", Fault("GET", "/storage/", corrupt="response"), NEW, waits=[]),
    Case(
        "download changed every time",
        Fault("GET", "/storage/", corrupt="response", times=ALWAYS),
        OLD,
        "do not have their hash",
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base `tiny-clip`, a reward `old`, and `new`, which is another one."""
    folder = tmp_path_factory.mktemp("made")
    args = BradleyTerryConfig(str(folder / "old"), max_steps=1, disable_tqdm=True, use_cpu=True, report_to="none")
    BradleyTerryTrainer(save(folder / "tiny-clip"), args, red_pairs(4)).save_model()
    shutil.copytree(folder / "old", folder / "new")
    weights = load_file(folder / "old" / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "new" / "adapter_model.safetensors")
    with (folder / "new" / "README.md").open("a") as card:
        card.write("\nNew.\n")
    return folder


@pytest.fixture
def published(hub: Hub, online: Path, made: Path) -> Path:
    """The cache, empty; the base and the old reward are on the Hub."""
    hub.put(BASE, made / "tiny-clip")
    push_adapter(made / "old", TASTE, base_model=BASE)
    return online


def ids(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


def seen(error: Exception | None, waits: Sequence[float], otherwise: str = "") -> str:
    """Describe what the user sees."""
    waited = f"asked again after {', '.join(f'{wait:g} s' for wait in waits)}; " if waits else ""
    return waited + (f"{type(error).__name__}: {error}" if error else otherwise or "success")


def nothing_leaked(hub: Hub, *folders: Path) -> None:
    """Assert that no token was stored, written or sent to the storage."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    stored = [hub.everything(), *(file.read_bytes() for file in files)]
    for token in (TOKEN, READ_TOKEN, STRANGER):
        assert not [part for part in stored if token.encode() in part]
    assert not [path for _, path, authorized in hub.requests if authorized and path.startswith("/storage/")]


@pytest.mark.parametrize("case", PUSH, ids=ids(PUSH))
def test_fault_while_pushing(
    hub: Hub, published: Path, made: Path, waits: list[float], faults_seen: list, tmp_path: Path, case: Case
) -> None:
    old = hub.state(TASTE)
    commits = len(hub.titles(TASTE))
    case.fault.seen = 0
    hub.faults = [case.fault]
    error = None
    try:
        push_adapter(made / "new", TASTE, base_model=BASE)
    except (OSError, ValueError) as caught:
        error = caught
    assert hub.injected > 0
    after = hub.state(TASTE)
    waited = list(waits)
    hub.faults = []

    # Again, without the fault: it goes on to the new state, and to one commit of it.
    push_adapter(made / "new", TASTE, base_model=BASE)
    new = hub.state(TASTE)
    assert new != old
    assert after == (new if case.ends == NEW else old)
    assert len(hub.titles(TASTE)) == commits + 1
    assert hub.repos[TASTE].private
    assert (error is None) == (case.says is None)
    if error is not None:
        assert "\n" not in str(error)
        assert re.search(case.says or "", str(error))
    if case.waits is not None:
        assert waited == case.waits
    nothing_leaked(hub, tmp_path, made)
    faults_seen.append((f"push, {case.name}", seen(error, waited), f"the {case.ends} state on the Hub"))


@pytest.mark.parametrize("case", PULL, ids=ids(PULL))
def test_fault_while_pulling(
    hub: Hub, published: Path, made: Path, waits: list[float], faults_seen: list, caplog, tmp_path: Path, case: Case
) -> None:
    def cached() -> dict[str, bytes]:
        """Read the files that loaders find offline."""
        folder = pull_adapter(TASTE, local_files_only=True)
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    pull_adapter(TASTE)
    old = hub.files(TASTE)
    assert cached() == old
    push_adapter(made / "new", TASTE, base_model=BASE)
    new, on_hub = hub.files(TASTE), hub.state(TASTE)
    waits.clear()
    caplog.clear()
    case.fault.seen = 0
    hub.faults = [case.fault]
    error = None
    try:
        pull_adapter(TASTE)
    except (OSError, ValueError) as caught:
        error = caught
    assert hub.injected > 0
    waited = list(waits)
    assert cached() == (new if case.ends == NEW else old)
    assert hub.state(TASTE) == on_hub
    assert (error is None) == (case.says is None)
    if error is not None:
        assert "\n" not in str(error)
        assert re.search(case.says or "", str(error))
    if case.waits is not None:
        assert waited == case.waits
    hub.faults = []
    pull_adapter(TASTE)
    assert cached() == new
    nothing_leaked(hub, tmp_path)
    copy = [record.getMessage() for record in caplog.records if "copy in the cache" in record.getMessage()]
    faults_seen.append(
        (f"pull, {case.name}", seen(error, waited, copy[0] if copy else ""), f"the {case.ends} state in the cache")
    )


@pytest.mark.parametrize(
    "case",
    [
        Case("making the repo: 403", Fault("POST", "/create", status=403), "no repo", "may not do that"),
        Case("making the repo: 500 once", Fault("POST", "/create", status=500), NEW),
        Case("making the repo: answer lost", Fault("POST", "/create", cut="after"), NEW),
        Case(
            "making the repo: 500 for good",
            Fault("POST", "/create", status=500, times=ALWAYS),
            "no repo",
            "fails .500",
        ),
        Case(
            "upload cut every time",
            Fault("PUT", "/storage/", cut="before", times=ALWAYS),
            "an empty private repo",
            "was cut",
        ),
        Case(
            "commit: 500 for good",
            Fault("POST", "/commit/", status=500, times=ALWAYS),
            "an empty private repo",
            "fails .500",
        ),
    ],
    ids=lambda case: case.name,
)
def test_fault_at_the_first_publication(
    hub: Hub, online: Path, made: Path, waits: list[float], faults_seen: list, tmp_path: Path, case: Case
) -> None:
    hub.put(BASE, made / "tiny-clip")
    case.fault.seen = 0
    hub.faults = [case.fault]
    error = None
    try:
        push_adapter(made / "new", TASTE, base_model=BASE)
    except (OSError, ValueError) as caught:
        error = caught
    assert hub.injected > 0
    waited, after, hub.faults = list(waits), hub.state(TASTE), []
    push_adapter(made / "new", TASTE, base_model=BASE)
    assert len(hub.titles(TASTE)) == 1
    new = hub.state(TASTE)
    if case.ends == NEW:
        assert after == new
    elif case.ends == "no repo":
        assert after is None
    else:
        assert [set(files) for files in (after or {}).values()] == [{".gitattributes"}]
    assert hub.repos[TASTE].private
    nothing_leaked(hub, tmp_path, made)
    faults_seen.append((f"first push, {case.name}", seen(error, waited), f"{case.ends} on the Hub"))


def test_pull_request_whose_answer_is_lost_is_not_opened_twice(
    hub: Hub, published: Path, made: Path, waits: list[float], faults_seen: list
) -> None:
    hub.faults = [Fault("POST", "/commit/", cut="after")]
    with pytest.raises(ConnectionError, match="may have been opened") as caught:
        push_adapter(made / "new", TASTE, base_model=BASE, create_pr=True)
    assert len(hub.repos[TASTE].pull_requests) == 1
    hub.faults = [Fault("POST", "/commit/", status=429, headers={"Retry-After": "1"})]
    push_adapter(made / "new", TASTE, base_model=BASE, create_pr=True)
    assert len(hub.repos[TASTE].pull_requests) == 2
    faults_seen.append(("pull request, answer lost", seen(caught.value, []), "one pull request, complete"))


def test_tag_that_fails_is_set_by_pushing_again(
    hub: Hub, published: Path, made: Path, waits: list[float], faults_seen: list
) -> None:
    hub.faults = [Fault("POST", "/tag/", status=500, times=ALWAYS)]
    with pytest.raises(ConnectionError, match="Could not name the commit 'v1' .it is published") as caught:
        push_adapter(made / "new", TASTE, base_model=BASE, tag="v1")
    assert len(hub.titles(TASTE)) == 2
    assert not hub.repos[TASTE].tags
    row = ("push, tag: 500 for good", seen(caught.value, list(waits)), "the new state on the Hub, without the tag")
    hub.faults = [Fault("POST", "/tag/", cut="after")]
    commit = push_adapter(made / "new", TASTE, base_model=BASE, tag="v1")
    assert len(hub.titles(TASTE)) == 2
    assert hub.repos[TASTE].tags == {"v1": commit.oid}
    faults_seen += [
        row,
        ("push, tag set, answer lost", "asked again after 1 s; success", "the new state, with the tag"),
    ]


def test_cut_off_uploads_are_not_repeated(hub: Hub, published: Path, made: Path, waits: list[float]) -> None:
    hub.faults = [Fault("POST", "/commit/", status=500, times=ALWAYS)]
    with pytest.raises(ConnectionError):
        push_adapter(made / "new", TASTE, base_model=BASE)
    hub.faults = []
    hub.requests.clear()
    push_adapter(made / "new", TASTE, base_model=BASE)
    assert not [path for method, path, _ in hub.requests if method == "PUT"]
