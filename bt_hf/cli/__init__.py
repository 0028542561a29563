"""The command `bt-hf`, one module a command."""

from bt_hf.cli.dispatch import COMMANDS, main

__all__ = ["COMMANDS", "main"]
