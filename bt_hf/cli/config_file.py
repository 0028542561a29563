"""Options of a command in a file of YAML or JSON, whose keys and values are checked before anything else."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from bt_hf.training.option_checks import did_you_mean


class _Loader(yaml.SafeLoader):
    """Load YAML, and refuse a key that stands there twice, of which one would have no effect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands there twice", key_node.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path, known: Iterable[str]) -> dict[str, Any]:
    """Read options from a file of YAML, of which JSON is a part.

    Args:
        path: The file.
        known: Names of the options.

    Returns:
        Name -> value. Names are spelt with underscores or hyphens in the file.

    Raises:
        OSError: The file can't be read.
        ValueError: It is not YAML, or not a mapping of options; names the line or the unknown option.
    """
    known = list(known)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} should be a file of YAML, but it is not text in UTF-8.") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"`--config` names {str(path)!r}, but there is no such file.") from None
    try:
        options = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid YAML: nested too deeply.") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} should hold options, one `name: value` a line, but holds {type(options).__name__}.")
    named = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: unknown option {key}{did_you_mean(name, known)}")
        if name in named:
            raise ValueError(f"{path}: {name!r} stands there twice, with underscores and with hyphens.")
        named[name] = value
    return named
