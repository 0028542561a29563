"""Patterns of an adapter's config, tried with a time limit: a regular expression may take for ever."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Names without a pattern in them, or with a dot alone, take no time. More of them than this are tried as well.
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
_FEW = 256
# Every way in which PEFT 0.20 and newer match a pattern with the name of a module.
_FORMS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "feedforward_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")  # a list of these holds names, not patterns
# Runs in a process of its own, since nothing stops a match from within.
_TRY = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
for key, pattern in patterns:
    try:
        compiled = re.compile(pattern)
    except Exception as error:
        print(json.dumps([key, " ".join(str(error).split())]))
        break
    for name in names:
        compiled.match(name)
        compiled.fullmatch(name)
"""


def check_patterns(config: Mapping[str, Any], names: Sequence[str], source: str, seconds: float = 5.0) -> None:
    """Match the patterns of an adapter's config with the names of a model's modules, as PEFT will.

    Args:
        config: Config of the adapter.
        names: Names of the modules.
        source: Name of the adapter in an error.
        seconds: Time limit for all of them. Default 5.0.

    Raises:
        ValueError: A pattern is not a regular expression, or takes too long.

    Example:
        >>> check_patterns({"target_modules": ".*(q|v)_proj"}, ["layers.0.q_proj"], "me/my-taste")
    """
    patterns = list(_patterns(config))
    if len(patterns) <= _FEW and all(_PLAIN.issuperset(pattern) for _, pattern in patterns):
        return
    tried = [(key, _FORMS[key].replace("{}", pattern)) for key, pattern in patterns]
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY],
            input=json.dumps([tried, list(names)]),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        keys = ", ".join(dict.fromkeys(f"`{key}`" for key, pattern in patterns if not _PLAIN.issuperset(pattern)))
        raise ValueError(
            f"{source} has a pattern that takes longer than {seconds:g} s to match ({keys or 'too many names'}): it "
            "is not loaded; write plain names of modules in its place."
        ) from None
    if run.stdout:
        key, problem = json.loads(run.stdout)
        raise ValueError(f"{source} has a pattern in `{key}` that is not a regular expression ({problem[:200]}).")
    if run.returncode:
        raise ValueError(f"{source} has a pattern that can't be tried ({run.stderr.strip()[-200:]}).")


def _patterns(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the keys that hold patterns, each with one of them."""
    found: list[tuple[str, str]] = []
    for key in _FORMS:
        value = config.get(key) or ()
        if isinstance(value, str):
            found.append((key, value))
        elif key not in _WHOLE:
            found += [(key, pattern) for pattern in value]
    return found
