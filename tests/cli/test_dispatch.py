"""The command line around its commands: help, versions, interrupts and errors of one line."""

import pytest

from bt_hf.cli import COMMANDS, main
from command_line import PROMPT, Workplace, lines_of_error


def test_debug_shows_the_traceback(workplace: Workplace, capsys) -> None:
    lines = lines_of_error(capsys, "score", workplace.model, "nowhere.png", "--prompt", PROMPT, "--debug")
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "bt-hf score: error: no such image file or folder: 'nowhere.png'"


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (KeyError("lost"), "unexpected KeyError: 'lost' (run with --debug for the traceback)"),
        (TypeError("two\n  lines"), "unexpected TypeError: two lines (run with --debug for the traceback)"),
        (ValueError("bad value"), "bad value"),
    ],
)
def test_bugs_are_one_line_too(monkeypatch, capsys, raised: Exception, line: str) -> None:
    def fail(options: object) -> None:
        raise raised

    monkeypatch.setattr("bt_hf.cli.score.run", fail)
    assert lines_of_error(capsys, "score", "m", "i.png", "--prompt", "p") == [f"bt-hf score: error: {line}"]


def test_interrupts_end_quietly(monkeypatch, capsys) -> None:
    def stop(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bt_hf.cli.score.run", stop)
    assert main(["score", "m", "i.png", "--prompt", "p"]) == 130
    assert capsys.readouterr().err == "bt-hf score: interrupted\n"


def test_help_teaches(capsys) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"\n  bt-hf {name} " in capsys.readouterr().out
    assert main(["reward", "--help_all"]) == 0
    assert "--dataloader_num_workers" in capsys.readouterr().out
    assert main(["reward", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--dataloader_num_workers" not in text
    assert all(option in text for option in ("--model", "--cross_validate", "--lora_r", "--prior_weight", "--config"))


def test_version_and_unknown_commands(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bt-hf 0.")
    assert "invalid choice: 'tarin'" in lines_of_error(capsys, "tarin")[0]
    assert "COMMAND" in lines_of_error(capsys)[0]
