"""What a failing command prints."""

from pcmecl_fast.cli import main


def wrong(capsys, *arguments):
    """Run a command that fails, and return its one-line error message."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pcmecl-fast")]
    (line,) = lines
    assert "Traceback" not in line
    return line
