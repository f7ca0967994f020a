"""Options from files, and messages that speak the command line's language."""

import re
from dataclasses import dataclass
from typing import Literal

import pytest

from pcmecl_fast.options import from_options, in_options
from pcmecl_fast.train.config import EvaluateConfig, TrainConfig


@dataclass
class Choices:
    kind: Literal["auto", "reference"] | None = None
    rate: float = 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "referense"}, "x: kind: got 'referense'; takes one of auto, reference; did you mean reference?"),
        ({"kind": 3}, "x: kind: got 3; takes one of auto, reference"),
        ({"rate": "fast"}, "x: rate: got 'fast'; takes float"),
        ({"rrate": 2}, "x: no option is called 'rrate'; did you mean rate?"),
    ],
)
def test_a_wrong_choice_lists_the_choices_and_the_closest(options, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        from_options(Choices, options, source="x")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("root: /faces does not exist", "--data: /faces does not exist"),
        ("descriptions: takes one for each", "--descriptions: takes one for each"),
        ("clips, frames_per_clip and size: each at least 1", "--clips, --frames-per-clip and --size: each at least 1"),
        ("pass skip_broken=True to leave them out", "pass --skip-broken to leave them out"),
        ("rename them, or pass emotions= with the names", "rename them, or pass --emotions with the names"),
        ("it lacks x; take backend='auto' or 'reference'", "it lacks x; take --backend auto or 'reference'"),
        ("pass pretrained= (openai, laion400m).", "pass --clip-pretrained (openai, laion400m)."),
        ("fraction: 0.01 of 3 frames", "--holdout: 0.01 of 3 frames"),
        ("bank: is for the emotions", "--prompts: is for the emotions"),
        ("config: runs/seed=3/config.yaml: lr: got 'x'", "--config: runs/seed=3/config.yaml: lr: got 'x'"),
        ("individual: 2 of the 3 asked for", "individual: 2 of the 3 asked for"),
        ("no colon and no argument", "no colon and no argument"),
        ("the disk is full: seed", "the disk is full: seed"),
    ],
)
def test_arguments_of_functions_become_options_of_the_command(message, says):
    assert in_options(message, TrainConfig) == says


def test_what_another_option_leads_to_is_named_by_that_one():
    assert in_options("clip: prompts.safetensors was made with x", EvaluateConfig).startswith("--run: prompts.safet")
    assert in_options("fraction: 0.1", EvaluateConfig) == "fraction: 0.1"
