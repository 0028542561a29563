"""Griffe extension: list the options of a config from the help texts of its fields, and find `Example:` sections."""

import dataclasses
import importlib
import inspect
import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# `a, b: description`, with the lines that continue it.
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.+(?:\n\1 +.+)*)$", re.MULTILINE)


class DocumentedOptions(griffe.Extension):
    """Render what docstrings leave to the code.

    A config documents each field once, in `metadata={"help": ...}`: its class gets them as a list of parameters, with
    types and defaults. Docstrings say `Example:`, and describe parameters of one kind together; Griffe's parser knows
    `Examples:`, and one name at a time.
    """

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Write the docstring as the parser knows it."""
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = SEVERAL.sub(describe_each, text)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Add the documented fields to the sections of the docstring."""
        if cls.docstring is None or "dataclass" not in cls.labels or not cls.path.endswith("Config"):
            return
        options = list(documented_fields(load(cls.path)))
        parameters = [describe(option) for option in options]
        if parameters:
            section = griffe.DocstringSectionParameters(parameters, title="Options:")
            cls.docstring.parsed.append(section)


def describe_each(match: re.Match) -> str:
    """Repeat a description for each of the names that share it."""
    indent, names, description = match.groups()
    return "\n".join(f"{indent}{name}: {description}" for name in names.split(", "))


def load(path: str) -> type:
    """Import a class by its full name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def documented_fields(config: type) -> list[dataclasses.Field]:
    """Return the fields that classes of this package declare, those of the class itself first."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    own = [base for base in config.__mro__ if base.__module__.startswith("bt_hf.")]
    return [fields[name] for name in dict.fromkeys(name for base in own for name in inspect.get_annotations(base))]


def describe(field: dataclasses.Field) -> griffe.DocstringParameter:
    """Return a field as a parameter of a docstring.

    Raises:
        KeyError: The field has no help.
    """
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return griffe.DocstringParameter(
        field.name,
        annotation=field.type if isinstance(field.type, str) else inspect.formatannotation(field.type),
        description=field.metadata["help"],
        value=repr(default),
    )
