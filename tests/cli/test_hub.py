"""`bt-hf push` and `bt-hf pull`, in this process, against the Hub of `hub_server`."""

from pathlib import Path

import pytest

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.cli import main
from bt_hf.cli.push import parse
from hub_server import Hub
from tiny_models import red_pairs, save

pytest_plugins = ["hub_fixtures"]
BASE, TASTE = "me/tiny-clip", "me/my-taste"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base `tiny-clip`, a reward `my-taste`, and its pairs, `pairs`."""
    folder = tmp_path_factory.mktemp("made")
    pairs = red_pairs(4)
    pairs.save_to_disk(folder / "pairs")
    args = BradleyTerryConfig(str(folder / "my-taste"), disable_tqdm=True, use_cpu=True, report_to="none")
    BradleyTerryTrainer(save(folder / "tiny-clip"), args, pairs).save_model()
    return folder


@pytest.fixture
def place(hub: Hub, online: Path, made: Path) -> Path:
    hub.put(BASE, made / "tiny-clip")
    return made


def line_of_error(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bt-hf ")]
    assert len(lines) == 1
    return lines[0]


def test_push_and_pull(hub: Hub, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(place / "my-taste")
    assert main(["push", folder, "my-taste", "--base_model", BASE, "--tag", "v1", "-m", "First"]) == 0
    commit = hub.repos[TASTE].branches["main"]
    assert capsys.readouterr().out == f"Published as {hub.endpoint}/{TASTE}/commit/{commit}\n"
    assert hub.titles(TASTE) == ["First"]
    assert hub.repos[TASTE].private
    assert main(["pull", TASTE, "--revision", "v1", "--kind", "reward", "--base_model", BASE]) == 0
    pulled = Path(capsys.readouterr().out.strip())
    assert pulled.name == commit
    assert main(["pull", TASTE, "--revision", "v1", "--offline"]) == 0
    assert Path(capsys.readouterr().out.strip()) == pulled


def test_push_public_with_pairs_and_as_a_pull_request(
    hub: Hub, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["push", str(place / "my-taste"), TASTE, "--base-model", BASE]
    assert main([*argv, "--public", "--pairs", str(place / "pairs")]) == 0
    assert not hub.repos[TASTE].private
    assert "pairs.parquet" in hub.files(TASTE)
    assert main([*argv, "--create_pr"]) == 0
    assert capsys.readouterr().out.endswith("Nothing to propose: these files are there already\n")
    hub.put(TASTE, {"tokenizer_config.json": b"{}"})
    assert main([*argv, "--create_pr"]) == 0
    assert capsys.readouterr().out.endswith(f"Proposed as {hub.endpoint}/{TASTE}/discussions/1\n")


def test_errors_are_one_line(hub: Hub, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "my-taste"
    assert "names the local path" in line_of_error(capsys, "push", folder, TASTE)
    assert "There is no folder" in line_of_error(capsys, "push", place / "nowhere", TASTE)
    assert "--create_pr excludes" in line_of_error(capsys, "push", folder, TASTE, "--create_pr", "--tag", "v1")
    assert "not allowed with" in line_of_error(capsys, "push", folder, TASTE, "--public", "--private")
    assert "may not do that" in line_of_error(capsys, "push", folder, "you/taste", "--base_model", BASE)
    assert "no such repo" in line_of_error(capsys, "pull", "me/nothing")
    assert "is a whole model, not an adapter" in line_of_error(capsys, "pull", BASE)
    assert set(hub.repos) == {BASE}


def test_visibility_is_the_repos_own_unless_said() -> None:
    said = [parse(["folder", "me/x", *extra]).private_repo for extra in ([], ["--public"], ["--private"])]
    assert said == [None, False, True]
