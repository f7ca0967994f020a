"""Measures of personal style: they tell true edits from no edits, and from edits in the average style."""

import pytest
import torch

from pcmecl_fast.evaluate.metrics import Trials
from pcmecl_fast.evaluate.style import judge_style
from pcmecl_fast.synthetic import SyntheticFaces

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faces():
    return SyntheticFaces(8, clips=1, frames_per_clip=1, seed=2)


@pytest.fixture(scope="module")
def trials(faces):
    """Every frame with every other emotion."""
    index, target = torch.cartesian_prod(torch.arange(len(faces)), torch.arange(7)).T
    wanted = faces.emotion_index[index] != target
    return Trials(index[wanted], target[wanted])


@pytest.fixture(scope="module")
def perfect(faces, trials):
    return judge_style(drawn_by(faces, trials), faces, trials, device=CPU)


def drawn_by(other, trials):
    """An edit that draws a data set's truth; it knows the frames from the order of the trials."""
    batches = iter(trials.index.split(128))
    return lambda frames, target: other.truth(next(batches), target)


def test_true_edits_have_a_smaller_style_error_than_none(faces, trials, perfect):
    nothing = judge_style(lambda frames, target: frames, faces, trials, device=CPU)
    assert perfect["personal_style_error"] < 0.5 * nothing["personal_style_error"]
    assert perfect["expression_error"] < 0.5 * nothing["expression_error"]
    assert perfect["emotion_accuracy"] > 0.9
    assert nothing["emotion_accuracy"] < 0.1
    assert perfect["edit_strength"] > 0.8
    assert nothing["edit_strength"] == 0


def test_edits_in_the_average_style_show_the_emotion_but_not_the_person(faces, trials, perfect):
    average = SyntheticFaces(8, clips=1, frames_per_clip=1, seed=2, style=0.0)
    assert torch.equal(average.identities.vector(), faces.identities.vector())
    alike = judge_style(drawn_by(average, trials), faces, trials, device=CPU)
    assert alike["emotion_accuracy"] > 0.9
    assert alike["personal_style_error"] > perfect["personal_style_error"]
    assert perfect["style_correlation"] > 0.4
    assert alike["style_correlation"] < 0.2
