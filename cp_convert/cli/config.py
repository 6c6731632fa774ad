"""Options from a TOML file: what it says in, defaults of the options by name out."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from ..errors import UsageError
from ..words import near


def read(path: Path, option: str) -> dict[str, Any]:
    """The file's values as they stand there.

    Raises:
        UsageError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path} is not valid TOML: {error}.") from error


def defaults(command: click.Command, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values by the names that click knows the options by, checked for their kind.

    Args:
        command: whose options they are.
        values: by an option's long name, with or without its dashes.
        where: the file, as a message names it.

    Raises:
        UsageError: there is no such option, or it takes another kind of value.
    """
    names = _names(command)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            like = near(name, sorted(names))
            raise UsageError(f"{where}: there is no option {key!r}.", hint=like)
        if not _fits(names[name], value):
            raise UsageError(
                f"{where}: {key} = {value!r} is not what --{name.replace('_', '-')} takes.",
                hint=f"{_WANTED[_kind(names[name])]}, as in TOML.",
            )
        found[str(names[name].name)] = value
    return found


def _names(command: click.Command) -> dict[str, click.Parameter]:
    """All options but those that name such a file themselves."""
    return {
        spelling.lstrip("-").replace("-", "_"): p
        for p in command.params
        for spelling in (*p.opts, *p.secondary_opts)
        if p.name not in _FILES and len(spelling) > 2
    }


_FILES: Final = ("config", "matrix")
_WANTED: Final = {
    "flag": "true or false",
    "list": "a list of words in quotes",
    "int": "a whole number",
    "float": "a number",
    "size": "a number of bytes, or a size in quotes",
    "word": "a word in quotes",
}


def _kind(option: click.Parameter) -> str:
    if getattr(option, "is_flag", False):
        return "flag"
    if option.multiple:
        return "list"
    known = {"integer": "int", "integer range": "int", "size": "size"}
    known |= {"float": "float", "float range": "float"}
    return known.get(option.type.name, "word")


def _fits(option: click.Parameter, value: Any) -> bool:
    """Whether a TOML value is of the kind that the option takes; click would convert others."""
    kind, is_number = _kind(option), type(value) in (int, float)
    return {
        "flag": isinstance(value, bool),
        "list": isinstance(value, list) and all(isinstance(one, str) for one in value),
        "int": type(value) is int,
        "float": is_number,
        "size": type(value) is int or isinstance(value, str),
        "word": isinstance(value, str),
    }[kind]
