"""Griffe extension: read the docstrings of this package, and document fields from where they are declared."""

import dataclasses
import importlib
import inspect
import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# `a, b: description`, with the lines that continue it.
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.+(?:\n\1 +.+)*)$", re.MULTILINE)


class DocumentedFields(griffe.Extension):
    """Render what docstrings leave to the code.

    A config documents each field once, in `metadata={"help": ...}`: its class gets them as a list of parameters, with
    types and defaults. A named tuple documents a field beside it, in a comment. Docstrings say `Example:`, and
    describe parameters of one kind together; Griffe's parser knows `Examples:`, and one name at a time.
    """

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Write the docstring as the parser knows it."""
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = SEVERAL.sub(describe_each, text)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Add the documented fields to the sections of the docstring."""
        if cls.docstring is None:
            return
        if "dataclass" in cls.labels and cls.name.endswith("Config"):
            options = describe_options(load(cls.path))
            cls.docstring.parsed.append(griffe.DocstringSectionParameters(options, title="Options:"))
        elif "NamedTuple" in map(str, cls.bases):
            fields = [describe_field(field) for field in cls.attributes.values()]
            cls.docstring.parsed.append(griffe.DocstringSectionAttributes(fields, title="Fields:"))


def describe_each(match: re.Match) -> str:
    """Repeat a description for each of the names that share it."""
    indent, names, description = match.groups()
    return "\n".join(f"{indent}{name}: {description}" for name in names.split(", "))


def load(path: str) -> type:
    """Import a class by its full name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def documented_fields(config: type) -> dict[str, type]:
    """Return the names and types of fields that classes of this package declare, those of the class itself first.

    The types are those of the declaration, since `HfArgumentParser` changes them in the fields.
    """
    types: dict[str, type] = {}
    for base in config.__mro__:
        if base.__module__.startswith("bt_hf."):
            for name, kind in inspect.get_annotations(base).items():
                types.setdefault(name, kind)
    return types


def describe_field(field: griffe.Attribute) -> griffe.DocstringAttribute:
    """Return a field of a named tuple as an attribute of a docstring; the comment on its line describes it."""
    _, _, comment = field.source.partition("#")
    return griffe.DocstringAttribute(field.name, annotation=field.annotation, description=comment.strip())


def describe_options(config: type) -> list[griffe.DocstringParameter]:
    """Return the documented fields of a config as parameters of a docstring.

    Raises:
        KeyError: A field has no help.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    return [
        griffe.DocstringParameter(
            name,
            annotation=inspect.formatannotation(kind),
            description=fields[name].metadata["help"],
            value=repr(default_of(fields[name])),
        )
        for name, kind in documented_fields(config).items()
    ]


def default_of(field: dataclasses.Field) -> object:
    """Return the default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
