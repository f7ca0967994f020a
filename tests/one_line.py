"""What a command that fails says."""

from pcmecl_fast.cli import main


def wrong(capsys, *arguments):
    """Run a command that fails, and return the one line that it says why in."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pcmecl-fast")]
    (line,) = lines
    assert "Traceback" not in line
    return line
