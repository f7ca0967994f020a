"""The commands of `pcmecl-fast`: every option is a field of a dataclass in `train.config`."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from tqdm import tqdm

from pcmecl_fast.data.layout import check_root
from pcmecl_fast.libraries import installed_version, missing_library
from pcmecl_fast.machine import busy_notice, launched, stopping_at_once
from pcmecl_fast.options import in_options, option_name, read_config
from pcmecl_fast.train.config import (
    AblateConfig,
    DemoConfig,
    EditConfig,
    EvaluateConfig,
    MeasureConfig,
    PrepareConfig,
    PromptsConfig,
    TrainConfig,
)
from pcmecl_fast.wording import did_you_mean


@dataclass
class BackendsConfig:
    """Show which implementations of the operators can run here, and what the others are missing."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass
class _ConfigFile:
    config: Path | None = None


def run_command(arguments: Sequence[str]) -> int:
    """Run a command; bad input ends in one line on stderr and exit status 1, Ctrl-C in one and 130."""
    name = next((word for word in arguments if word in COMMANDS), "")
    words = COMMANDS[name][0] if name else _ConfigFile
    command, config, begun = f"pcmecl-fast {name}".strip(), None, False
    if list(arguments) == ["--version"]:
        print(f"pcmecl-fast {installed_version('pcmecl_fast')}")
        return 0
    try:
        _, config = _parse(list(arguments))
        handler = _AboveBars(console=Console(stderr=True), show_path=False)
        handler.setFormatter(_InOptions(words))
        # Of torchrun's ranks, the first speaks for all.
        logging.basicConfig(level=logging.INFO if _is_first() else logging.ERROR, handlers=[handler])
        config = _at_home(config)
        if launched() and name not in _SPREAD:
            raise ValueError(f"{name} runs as one process; torchrun is for {', '.join(_SPREAD)}")
        _check_paths(config)
        notice = busy_notice() if name in _LONG and _is_first() else None
        if notice:
            logging.getLogger("pcmecl_fast").info(notice)
        logging.getLogger("torch").setLevel(logging.WARNING)
        with stopping_at_once(f"{command}: stopped"):
            import torch  # noqa: F401  # seconds, in which nothing is begun yet
        from pcmecl_fast.distributed import AnotherRankFailed, joined

        begun = True
        try:
            with joined(getattr(config, "device", "cpu")):
                COMMANDS[name][1](config, shlex.join(["pcmecl-fast", *arguments]))
        except AnotherRankFailed as error:
            if _is_first():
                _say(f"{command}: {error}")
            return 1
    except (ValueError, LookupError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("PCMECL_TRACEBACK"):
            raise
        message = missing_library(error) or (error.args[0] if isinstance(error, KeyError) and error.args else error)
        message = in_options(" ".join(str(message).split()), words)  # one line only: libraries write pages
        if not begun and os.environ.get("LOCAL_RANK", "0") != "0":
            # The ranks do not know of each other yet, and each comes to the same error: a machine's first says so.
            # torchrun ends all with the first that ends, so it must not be this one; alone with the error, it speaks.
            time.sleep(_UNTIL_THE_FIRST_SPEAKS)
        _say(f"{command}: {message}  (PCMECL_TRACEBACK=1 shows where)")
        return 1
    except KeyboardInterrupt:
        if os.environ.get("PCMECL_TRACEBACK"):
            raise
        _say(f"{command}: stopped{_way_on(name, config)}")
        return 130  # as shells count it: 128 and the signal's number
    return 0


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    """A line on stderr, and a fresh one: a progress bar may still be on the last."""
    tqdm.write(line, file=sys.stderr)


def _way_on(name: str, config: Any) -> str:
    """What the same command can do with what it did before it was stopped."""
    if name in ("prepare", "measure") and config is not None:
        return f"; the same command goes on with what is missing in {config.out}"
    if name == "edit" and config is not None and config.input.is_dir():
        return f"; --resume edits what is missing in {config.out}"
    if name == "ablate" and config is not None:
        return f"; the same command trains what is missing in {config.out}"
    if not hasattr(config, "resume") or not (config.out / "config.yaml").exists():
        return ""
    if any(path.is_file() for pattern in ("stage-?.ckpt", "prompts/stage-1.ckpt") for path in config.out.glob(pattern)):
        return f"; --resume goes on from the last checkpoint in {config.out}"
    return f" before its first checkpoint; --resume begins again in {config.out}"


class _AboveBars(RichHandler):
    """Log lines above the progress bars, which are taken away for each and drawn again."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


class _InOptions(logging.Formatter):
    """Log lines that name the command's options where they speak of arguments, as its errors do."""

    def __init__(self, config_class: type) -> None:
        super().__init__("%(message)s", "[%X]")
        self.config_class = config_class

    def format(self, record: logging.LogRecord) -> str:
        return in_options(super().format(record), self.config_class)


def _at_home(config: Any) -> Any:
    """With `~` in paths replaced: a shell does that only where a word begins with it, and a file never."""
    written = {name: value for name, value in vars(config).items() if isinstance(value, str | Path)}
    paths = {name: type(value)(os.path.expanduser(value)) for name, value in written.items() if str(value)[:1] == "~"}
    return replace(config, **paths)


def _check_paths(config: Any) -> None:
    """See what is not there before PyTorch is imported, which takes seconds."""
    given = {name: value for name, value in vars(config).items() if name not in getattr(config, "refuses", ())}
    data = given.get("data")
    if data not in (None, "synthetic"):
        check_root(Path(data), raw=isinstance(config, PrepareConfig))
    for argument in ("run", "prompts"):
        folder = given.get(argument)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{argument}: there is no folder {folder}; it takes that of a finished run")
    for argument in () if isinstance(config, MeasureConfig) else ("input", "reference"):
        path = given.get(argument)
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{argument}: there is no file {path}")


def _parse(arguments: list[str]) -> tuple[str, Any]:
    """The command's name and config: defaults, overridden by the --config file, overridden by the other options."""
    file, rest = tyro.cli(_ConfigFile, args=arguments, return_unknown_args=True, add_help=False)
    _check_words(rest)
    stored: Any = None
    if file.config and rest[:1] and rest[0] in COMMANDS:
        stored = read_config(COMMANDS[rest[0]][0], file.config)
    app = tyro.extras.SubcommandApp()
    for name, (config_class, _) in COMMANDS.items():
        default = _without_mappings(stored) if rest[:1] == [name] else None
        shown = _as_shown(config_class) if {"-h", "--help"} & set(rest) else config_class
        app.command(name=name)(_returning(name, shown, default))
    name, config = app.cli(
        args=rest,
        prog="pcmecl-fast",
        description="Train talking-face expression editing under PCMECL. Every command also takes --config FILE, a "
        "YAML or JSON file with any of its options; --version shows the version.",
        sort_subcommands=False,
        registry=_mappings(),
    )
    return name, _with_mappings(config, stored)


def _check_words(words: Sequence[str]) -> None:
    """Refuse an unknown command or option in one line: tyro would list what is close in every command."""
    first = words[0] if words else "-"
    if first.startswith("-"):
        return
    if first not in COMMANDS:
        _exit("", f"no command is called {first}", did_you_mean(first, COMMANDS))
    names = [option_name(field.name) for field in fields(COMMANDS[first][0])]
    known = {*names, *(name.replace("--", "--no-", 1) for name in names), "--help"}
    for word in words[1:]:
        given = word.partition("=")[0].replace("_", "-")
        if given.startswith("--") and given not in known:
            # What one command calls --prompt-steps, another calls --steps.
            shorter = next((name for name in names if given.endswith(name[1:])), None)
            _exit(first, f"no option is called {given}", did_you_mean(shorter or given, names))


def _exit(name: str, message: str, hint: str) -> NoReturn:
    command = f"pcmecl-fast {name}".strip()
    _say(f"{command}: {'; '.join(filter(None, (message, hint)))} (`{command} --help` shows them all)")
    raise SystemExit(2)  # as tyro does


def _as_shown(config_class: type) -> type:
    """The same without the options that the command takes only to explain why it cannot have them."""
    refused = {f.name: f for f in fields(config_class) if f.name in getattr(config_class, "refuses", ())}
    hidden: dict[str, Any] = {name: field.default for name, field in refused.items()}
    hidden["__annotations__"] = {name: Annotated[Any, tyro.conf.Suppress] for name in refused}
    hidden["__doc__"] = config_class.__doc__
    return dataclass(type(config_class.__name__, (config_class,), hidden)) if refused else config_class


def _without_mappings(stored: Any) -> Any:
    """Without the file's mappings: one given on the command line would replace them, so they are merged afterwards."""
    return replace(stored, generator_options={}) if isinstance(stored, TrainConfig) else stored


def _with_mappings(config: Any, stored: Any) -> Any:
    """Merge the file's generator options, unless another generator was chosen: they would mean nothing to it."""
    if isinstance(stored, TrainConfig) and config.generator == stored.generator:
        config.generator_options = stored.generator_options | config.generator_options
    return config


def _mappings() -> tyro.constructors.ConstructorRegistry:
    """How a mapping is written on the command line: NAME=VALUE, the value as in JSON or else as text."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != dict[str, Any]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="[NAME=VALUE ...]",
            instance_from_str=lambda words: dict(map(_pair, words)),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda options: [f"{name}={json.dumps(value)}" for name, value in options.items()],
        )

    return registry


def _pair(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise ValueError(f"takes NAME=VALUE, got {word!r}")
    try:
        return name.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.replace("-", "_"), value


def _returning(name: str, config_class: type, default: Any) -> Callable[..., tuple[str, Any]]:
    def command(options: Any, config: Path | None = None) -> tuple[str, Any]:
        return name, options

    # tyro builds the options from this signature; the dataclass's name is omitted. --config has been read already.
    help_of_config = "A YAML or JSON file with any of these options; those on the command line come before it."
    command.__annotations__["options"] = Annotated[config_class, tyro.conf.arg(name="")]
    command.__annotations__["config"] = Annotated[Path | None, tyro.conf.arg(help=help_of_config)]
    command.__defaults__ = (None,) if default is None else (default, None)
    command.__doc__ = config_class.__doc__
    return command


def _print_results(out: Path, summary: dict[str, Any]) -> None:
    """What the report's tables say, and where the report is; by one rank."""
    if not _is_first():
        return
    from pcmecl_fast.evaluate.results import prompts_in_words, prompts_table, results_table

    console = Console()
    for content in (results_table(summary), prompts_table(summary)):
        if not content.rows:
            continue
        table = Table("")
        for column in content.columns:
            table.add_column(column, justify="right")
        for row in content.rows:
            table.add_row(
                row.name, *("–" if cell is None else f"{cell.text}\n{cell.interval}".strip() for cell in row.cells)
            )
        console.print(table, content.note, sep="\n", end="\n\n", highlight=False)
    for paragraph in prompts_in_words(summary):
        console.print(paragraph, end="\n\n", highlight=False)
    console.print(
        f"{summary['seconds']:.0f} s; faces and curves: {out / 'report.html'}", soft_wrap=True, highlight=False
    )


def _prompts(config: PromptsConfig, command: str) -> None:
    from pcmecl_fast.run import run_prompts

    _print_results(config.out, run_prompts(config, command=command))


def _train(config: TrainConfig, command: str) -> None:
    from pcmecl_fast.run import run_train

    _print_results(config.out, run_train(config, command=command))


def _evaluate(config: EvaluateConfig, command: str) -> None:
    from pcmecl_fast.run import run_evaluate

    _print_results(config.folder, run_evaluate(config, command=command))


def _print_rows(rows: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for key, value in rows.items():
        table.add_row(key, str(value))
    Console().print(table)


def _prepare(config: PrepareConfig, command: str) -> None:
    from pcmecl_fast.prepare import run_prepare

    _print_rows(run_prepare(config))


def _measure(config: MeasureConfig, command: str) -> None:
    from pcmecl_fast.measure import print_measured, run_measure

    print_measured(run_measure(config, command=command), Console())


def _edit(config: EditConfig, command: str) -> None:
    from pcmecl_fast.edit import run_edit

    done = run_edit(config)
    spent = ", ".join(f"{part} {ms}" for part, ms in done.pop("milliseconds").items())
    _print_rows(done | {"milliseconds a frame": spent})


def _ablate(config: AblateConfig, command: str) -> None:
    from pcmecl_fast.ablation import run_ablate

    run_ablate(config)


def _backends(config: BackendsConfig, command: str) -> None:
    from pcmecl_fast.ops import backend_status
    from pcmecl_fast.ops.backends import cpu, cuda
    from pcmecl_fast.ops.operator import requested_backend

    requested_backend(None)  # the variable's word is checked here too
    held = {"cpu": cpu.holds(), "cuda": cuda.holds()}
    rows = [asdict(status) | {"compiled": held.get(status.name) or ""} for status in backend_status()]
    for row in rows:
        if row["name"] == "triton" and row["reason"] == "there is no CUDA device":
            row["reason"] += " (TRITON_INTERPRET=1, set before Python starts, runs the kernels on the CPU: for tests)"
    if config.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("backend", "runs here", "why not, and how to get it")
    for row in rows:
        table.add_row(row["name"], "yes" if row["available"] else "no", row["reason"])
    Console().print(table)
    for row in rows:
        if row["compiled"]:
            print(f"compiled for {row['name']}: {row['compiled']}")


_SPREAD = ("prepare", "prompts", "train", "demo", "evaluate", "ablate")
"""What torchrun spreads over ranks."""

_UNTIL_THE_FIRST_SPEAKS = 20.0  # seconds: ranks start at different moments

_LONG = ("demo", "prepare", "measure", "prompts", "train", "evaluate", "ablate")

COMMANDS: dict[str, tuple[type, Callable[[Any, str], None]]] = {
    "demo": (DemoConfig, _train),
    "prepare": (PrepareConfig, _prepare),
    "prompts": (PromptsConfig, _prompts),
    "train": (TrainConfig, _train),
    "edit": (EditConfig, _edit),
    "evaluate": (EvaluateConfig, _evaluate),
    "measure": (MeasureConfig, _measure),
    "ablate": (AblateConfig, _ablate),
    "backends": (BackendsConfig, _backends),
}
