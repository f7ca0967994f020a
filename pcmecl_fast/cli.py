"""The command line: `pcmecl-fast <command>`, every option a field of a dataclass in `train.config`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import dacite
import tyro
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from tqdm import tqdm

from pcmecl_fast.train.config import AblateConfig, DemoConfig, EditConfig, EvaluateConfig, PromptsConfig, TrainConfig


@dataclass
class BackendsConfig:
    """Show which implementations of the operators can run here, and what the others lack."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass
class _ConfigFile:
    config: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with one line on the error stream and exit status 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, config = "", None
    try:
        name, config = _parse(arguments)
        logging.basicConfig(
            level=logging.INFO,
            format="%(message)s",
            datefmt="[%X]",
            handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
        )
        COMMANDS[name][1](config)
    except (ValueError, LookupError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("PCMECL_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        command = f"pcmecl-fast {name}".strip()
        # One line of its own: libraries write pages, and a progress bar may be standing there.
        line = f"{command}: {' '.join(str(message).split())}  (PCMECL_TRACEBACK=1 shows where)"
        tqdm.write(line, file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str]) -> tuple[str, Any]:
    """The command's name and its config: defaults, then the file given as --config, then the other options."""
    file, rest = tyro.cli(_ConfigFile, args=arguments, return_unknown_args=True, add_help=False)
    app = tyro.extras.SubcommandApp()
    for name, (config_class, _) in COMMANDS.items():
        default = _from_file(config_class, file.config) if file.config and rest[:1] == [name] else None
        app.command(name=name)(_returning(name, config_class, default))
    return app.cli(
        args=rest,
        prog="pcmecl-fast",
        description="Train talking-face expression editing under PCMECL. Every command also takes --config FILE, a "
        "YAML or JSON file with any of its options.",
        sort_subcommands=False,
    )


def _returning(name: str, config_class: type, default: Any) -> Callable[..., tuple[str, Any]]:
    def command(config: Any) -> tuple[str, Any]:
        return name, config

    # What tyro builds the options from: the dataclass is the one parameter, and its name is left out of them.
    command.__annotations__["config"] = Annotated[config_class, tyro.conf.arg(name="")]
    command.__defaults__ = None if default is None else (default,)
    command.__doc__ = config_class.__doc__
    return command


def _from_file(config_class: type, path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {path}")
    try:
        options = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"config: {path} holds no options, got {type(options).__name__}")
    try:
        return dacite.from_dict(config_class, options, dacite.Config(strict=True, type_hooks={Path: Path}))
    except dacite.DaciteError as error:
        raise ValueError(f"config: {path}: {error}") from error


def _show(work: Callable[[Any], dict[str, Any]]) -> Callable[[Any], None]:
    def command(config: Any) -> None:
        summary = work(config)
        table = Table(title=str(getattr(config, "out", "")), show_header=False)
        for key, value in summary.items():
            table.add_row(key, f"{value:.3f}" if isinstance(value, float) else str(value))
        Console().print(table)

    return command


def _prompts(config: PromptsConfig) -> None:
    from pcmecl_fast.run import run_prompts

    _show(run_prompts)(config)


def _train(config: TrainConfig) -> None:
    from pcmecl_fast.run import run_train

    _show(run_train)(config)


def _evaluate(config: EvaluateConfig) -> None:
    from pcmecl_fast.run import run_evaluate

    _show(run_evaluate)(config)


def _edit(config: EditConfig) -> None:
    from pcmecl_fast.run import run_edit

    _show(run_edit)(config)


def _ablate(config: AblateConfig) -> None:
    from pcmecl_fast.ablation import run_ablate

    run_ablate(config)


def _backends(config: BackendsConfig) -> None:
    from pcmecl_fast.ops import backend_status

    rows = [asdict(status) for status in backend_status()]
    if config.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("backend", "runs here", "why not, and how to get it")
    for row in rows:
        table.add_row(row["name"], "yes" if row["available"] else "no", row["reason"])
    Console().print(table)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (DemoConfig, _train),
    "prompts": (PromptsConfig, _prompts),
    "train": (TrainConfig, _train),
    "edit": (EditConfig, _edit),
    "evaluate": (EvaluateConfig, _evaluate),
    "ablate": (AblateConfig, _ablate),
    "backends": (BackendsConfig, _backends),
}


if __name__ == "__main__":
    sys.exit(main())
