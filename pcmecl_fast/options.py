"""Dataclasses of options from mappings and from YAML or JSON files: strictly typed, with one-line error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import dacite
import yaml

from pcmecl_fast.wording import did_you_mean

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
    # Beside its own errors, YAML's reader lets pass those of Python for bytes that are no text, a 13th month, a number
    # of 5000 digits, or brackets without end.
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{argument}: {path} is neither YAML nor JSON: {why}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{argument}: {path} holds no options, got {type(options).__name__}")
    return options


def from_options(config_class: type[T], options: Mapping[str, Any], *, source: str) -> T:
    """A dataclass with these options; a path may be given as a string, a float as an integer or a string such as 1e-3.

    Raises:
        ValueError: an option is unknown, missing or of the wrong type; the message begins with `source`.
    """
    as_typed = dacite.Config(strict=True, cast=[tuple], type_hooks=_TYPE_HOOKS)
    try:
        return dacite.from_dict(config_class, options, as_typed)
    except dacite.UnexpectedDataError as error:
        unknown = ", ".join(_unknown(config_class, str(key)) for key in sorted(error.keys, key=str))
        raise ValueError(f"{source}: {unknown}") from error
    except dacite.WrongTypeError as error:
        raise ValueError(f"{source}: {error.field_path}: got {_short(repr(error.value))}; {_takes(error)}") from error
    except (dacite.DaciteError, ValueError, TypeError) as error:  # the last two from types that cannot hold a value
        raise ValueError(f"{source}: {error}") from error


def plain_options(config: Any) -> dict[str, Any]:
    """A dataclass's options in the types that YAML and JSON have; `from_options` reads them."""
    return json.loads(json.dumps(asdict(config), default=str))


def option_name(name: str) -> str:
    """A field's name as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def named_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two sets of options, "--lr was 0.003, is 0.001, …"; "" where nothing does.

    A key that is no field's name stands for something else that must stay the same, and is said as it is. Its value is
    a hash, which says nothing to anybody, or `counted`, whose count does.
    """
    return ", ".join(
        f"{option_name(key)} was {was.get(key)}, is {now.get(key)}"
        if key.isidentifier()
        else f"{key} are others than when it began{_counts(str(now.get(key)), str(was.get(key)))}"
        for key in {**now, **was}
        if str(was.get(key)) != str(now.get(key))
    )


def counted(count: int, digest: str) -> str:
    """A hash of several things with their number, for `named_differences`."""
    return f"{count} of {digest}"


def _counts(now: str, was: str) -> str:
    (here, of, _), (there, of_old, _) = now.partition(" of "), was.partition(" of ")
    return f" ({here} now, {there} then)" if of and of_old and here != there else ""


def in_options(text: str, config_class: type) -> str:
    """A message as the command line would say it: "root: no folder, pass skip_broken=True" names --data, --skip-broken.

    Messages name arguments of functions, since they are written for callers. Those that are options of the command
    (`config_class`), under their own name or another, are written as options: at the message's beginning, before its
    first colon, and wherever a value is given to one.
    """
    known = {"config", *(field.name for field in fields(config_class))}

    def option(argument: str) -> str | None:
        return next((option_name(name) for name in (argument, *_OPTIONS.get(argument, ())) if name in known), None)

    def with_value(found: re.Match[str]) -> str:
        name, value = option(found[1]), found[2].strip("'\"")
        return found[0] if name is None else name if value in ("", "True") else f"{name} {value}"

    beginning, colon, rest = text.partition(": ")
    words = re.split(r"(, | and )", beginning)
    names = [option(word) for word in words[::2]]
    if colon and None not in names:
        words[::2] = [str(name) for name in names]
        text = f"{''.join(words)}: {rest}"
    return re.sub(r"""(?<![^\s(])([a-z][a-z_]*)=('[^']*'|"[^"]*"|[\w.]*)""", with_value, text)


_OPTIONS = {
    "bank": ("prompts", "run"),
    "by": ("split",),
    "clip": ("run",),
    "dataset": ("data", "run"),
    "fraction": ("holdout",),
    "like": ("clip_like", "run"),
    "name": ("clip", "run"),
    "path": ("run",),
    "pretrained": ("clip_pretrained", "run"),
    "root": ("data",),
    "tower": ("prompts", "run"),
}
"""Arguments of the package's functions, and the options that lead to them, the first that a command has."""


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


def _takes(error: dacite.WrongTypeError) -> str:
    """What an option takes, in words; of choices the closest."""
    kinds = (error.field_type, *get_args(error.field_type))  # of a union, each
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if not choices:
        kind = error.field_type
        return f"takes {kind.__name__ if isinstance(kind, type) and not get_args(kind) else kind}"
    return "; ".join(filter(None, (f"takes one of {', '.join(choices)}", did_you_mean(str(error.value), choices))))


def _unknown(config_class: type, name: str) -> str:
    closest = did_you_mean(name, [field.name for field in fields(config_class)], most=3)
    return "; ".join(filter(None, (f"no option is called {name!r}", closest)))


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    """dacite would take a string or a mapping apart, and show what is left of it."""
    if isinstance(value, str | Mapping):
        raise dacite.WrongTypeError(field_type=list, value=value)
    return value


def _as_mapping(value: Any) -> Any:
    if isinstance(value, str):
        raise dacite.WrongTypeError(field_type=dict, value=value)
    return value


def _as_float(value: Any) -> Any:
    """YAML reads 1e-3, which has no point, as a string."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except OverflowError:
        return str(value)
    except ValueError:
        return value  # rejected later with the option's name, like any wrong type


_TYPE_HOOKS: dict[Any, Callable[[Any], Any]] = {
    Path: _as_path,
    float: _as_float,
    dict[str, Any]: _as_mapping,
    **dict.fromkeys((list[str], list[float], list[int]), _as_list),
}
