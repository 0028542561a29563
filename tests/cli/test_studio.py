"""`bt-hf studio`: its options, its errors of one line, and the documents that show it."""

import re
import shlex
import socket
from pathlib import Path

import pytest
import yaml

from bt_hf.cli import main
from bt_hf.cli.studio import StudioOptions, parse
from command_line import lines_of_error
from studio_page import write_images
from tiny_models import picture, save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save(tmp_path / "base")


def test_defaults_are_safe() -> None:
    options = parse([])
    assert (options.source, options.host, options.password, options.uploads) == (None, "127.0.0.1", None, False)


def test_the_password_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BT_HF_STUDIO_PASSWORD", "correct horse")
    assert parse(["photos", "--host", "0.0.0.0"]).password == "correct horse"


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_ports(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "port" in lines_of_error(capsys, "studio", "--port", port)[0]


def test_another_address_asks_for_a_password(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (line,) = lines_of_error(capsys, "studio", str(tmp_path), "--host", "0.0.0.0", "--port", "0")
    assert "lets every machine that reaches this one open the page" in line
    assert "--password" in line


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (line,) = lines_of_error(capsys, "studio", str(tmp_path), "--port", str(port))
    assert f"port {port} is taken" in line
    assert "--port" in line


def test_folders_without_enough_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--port", "0", "--model", base, "--no_browser")
    (tmp_path / "empty").mkdir()
    assert "no images found" in lines_of_error(capsys, "studio", "empty", *options)[-1]
    (tmp_path / "one").mkdir()
    picture((9, 9, 9)).save(tmp_path / "one" / "a.png")
    (tmp_path / "one" / ".b.png").write_bytes(b"")
    line = lines_of_error(capsys, "studio", "one", *options)[-1]
    assert "only one image found (1 left out, such as .b.png: hidden file)" in line
    assert not list(tmp_path.glob("*-clicks"))  # nothing is left behind
    assert "no such folder" in lines_of_error(capsys, "studio", "./nowhere", *options)[-1]


def test_sessions_that_are_not_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path, base: str) -> None:
    images = write_images(tmp_path / "images", 1, 2)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("mine")
    options = ("--port", "0", "--model", base, "--no_browser", "--session", str(tmp_path / "thesis"))
    assert "is not a session" in lines_of_error(capsys, "studio", str(images), *options)[-1]


def test_prompts_need_a_pipeline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (line,) = lines_of_error(capsys, "studio", "--prompts", str(tmp_path / "prompts.txt"), "--port", "0")
    assert "--pipeline" in line


def test_the_documents_name_options_that_exist() -> None:
    text = (ROOT / "docs" / "guides" / "studio.md").read_text(encoding="utf-8")
    found = re.findall(r"bt-hf studio[^`\n|]*", text)
    assert len(found) > 6
    for command in found:
        words = shlex.split(command, comments=True)[2:]
        assert isinstance(parse(words), StudioOptions)
    for option in re.findall(r"`--(\w+)`", text):
        assert hasattr(StudioOptions(), option), option


def test_the_space_starts_what_its_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    card = (ROOT / "hub_cards" / "studio" / "README.md").read_text(encoding="utf-8")
    dockerfile = (ROOT / "hub_cards" / "studio" / "Dockerfile").read_text(encoding="utf-8")
    facts = yaml.safe_load(card.split("---")[1])
    command = dockerfile.split("CMD exec bt-hf studio ")[1].replace("$STUDIO", "--uploads")
    monkeypatch.setenv("BT_HF_STUDIO_PASSWORD", "correct horse")
    options = parse(shlex.split(command))
    assert facts["sdk"] == "docker"
    assert facts["app_port"] == options.port == 7860
    assert f"EXPOSE {options.port}" in dockerfile
    assert (options.host, options.uploads, options.password) == ("0.0.0.0", True, "correct horse")
    assert len(facts["short_description"]) <= 60  # the Hub's limit


def test_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "studio" in capsys.readouterr().out
