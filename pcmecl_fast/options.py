"""Dataclasses of options from mappings and from YAML or JSON files: strictly typed, with one-line error messages."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import dacite
import yaml

T = TypeVar("T")


def read_config(config_class: type[T], path: str | Path, *, argument: str = "config") -> T:
    """The options in a YAML or JSON file, such as `plain_options` writes; others keep their defaults.

    Args:
        config_class: a dataclass.
        path: the file.
        argument: the option that named the file, for error messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold a mapping, or an option in it is unknown or of the wrong type.
    """
    return from_options(config_class, read_options(path, argument=argument), source=f"{argument}: {path}")


def read_options(path: str | Path, *, argument: str = "config") -> dict[str, Any]:
    """The raw mapping behind `read_config`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}")
    try:
        options = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{argument}: {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{argument}: {path} holds no options, got {type(options).__name__}")
    return options


def from_options(config_class: type[T], options: Mapping[str, Any], *, source: str) -> T:
    """A dataclass with these options; a path may be given as a string, a float as an integer or a string such as 1e-3.

    Raises:
        ValueError: an option is unknown, missing or of the wrong type; the message begins with `source`.
    """
    as_typed = dacite.Config(strict=True, cast=[tuple], type_hooks={Path: _as_path, float: _as_float})
    try:
        return dacite.from_dict(config_class, options, as_typed)
    except dacite.UnexpectedDataError as error:
        unknown = ", ".join(_unknown(config_class, str(key)) for key in sorted(error.keys, key=str))
        raise ValueError(f"{source}: {unknown}") from error
    except dacite.DaciteError as error:
        raise ValueError(f"{source}: {error}") from error


def plain_options(config: Any) -> dict[str, Any]:
    """A dataclass's options in the types that YAML and JSON have; `from_options` reads them."""
    return json.loads(json.dumps(asdict(config), default=str))


def _unknown(config_class: type, name: str) -> str:
    known = [field.name for field in fields(config_class)]
    close = difflib.get_close_matches(name, known)
    return f"no option is called {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def _as_float(value: Any) -> Any:
    """YAML reads 1e-3, which has no point, as a string."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except ValueError:
        return value  # rejected later with the option's name, like any wrong type
