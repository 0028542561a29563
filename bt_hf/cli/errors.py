"""Errors of one line, for whoever types commands."""

import argparse
from typing import NoReturn

# Optional modules: name -> the extra of ours that installs it.
_EXTRAS = {
    "diffusers": "diffusion",
    "matplotlib": "plots",
    "sklearn": "demo",
    "resvg_py": "emoji",
    "starlette": "studio",
    "uvicorn": "studio",
}


class OneLineErrors(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message on one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def describe(error: Exception, debug: bool) -> str:
    """Return one line on an error: the library's own for a user's mistake, for anything else also where to look."""
    text = name_extra(error) or one_line(str(error)) or type(error).__name__
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    # Anyone's TypeError may be a bug, but those that this library raises say what was expected.
    ours = frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("bt_hf.")
    if isinstance(error, (ImportError, OSError, ValueError)) or (ours and isinstance(error, TypeError)):
        return text
    hint = "" if debug else " (run with --debug for the traceback)"
    return f"unexpected {type(error).__name__}: {text}{hint}"


def name_extra(error: BaseException) -> str | None:
    """Return one line on the extra that installs a missing module, `None` if none does.

    Example:
        >>> name_extra(ModuleNotFoundError("No module named 'diffusers'", name="diffusers.utils"))
        "diffusers is not installed: run `pip install 'bt-hf[diffusion]'`."
    """
    module = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"{module} is not installed: run `pip install 'bt-hf[{_EXTRAS[module]}]'`." if module in _EXTRAS else None


def one_line(text: str) -> str:
    """Join the lines of a text, with single spaces."""
    return " ".join(text.split())
