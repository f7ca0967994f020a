"""Where `pcmecl_fast.kernels` is found when the package runs from its source tree, installed as editable or not at all.

The kernels lie in the repository's folder `kernels`. An installed package has that folder in this one's place
(`package-dir` in pyproject.toml) and never this file. In the source tree Python looks for submodules of `pcmecl_fast`
in this folder alone, whichever copy of the repository is first on the path; so this file passes it on. A path hook or
an entry of the editable install would point at one installed copy, and a link does not exist on every system.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
