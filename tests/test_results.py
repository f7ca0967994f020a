"""What is said about results: means with intervals and counts, side by side, and what the prompts did in words."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
import torch

from pcmecl_fast.evaluate.intervals import summarize, wilson
from pcmecl_fast.evaluate.metrics import clip_view, draw_trials, judge_edits, prompt_view
from pcmecl_fast.evaluate.origin import origin
from pcmecl_fast.evaluate.results import (
    Cell,
    limits_in_words,
    prompts_in_words,
    prompts_table,
    readable,
    results_table,
)
from pcmecl_fast.prompts import PromptBank

# ---- Intervals -------------------------------------------------------------------------------------------------------


def twelve_people(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten trials of each of 12 individuals, who differ from one another by `spread` and in themselves by 1."""
    generator = torch.Generator().manual_seed(0)
    individual = torch.arange(12).repeat_interleave(10)
    own = spread * torch.randn(12, generator=generator)
    return own[individual] + torch.randn(120, generator=generator), individual


def test_a_mean_lies_in_its_interval_and_the_counts_are_given() -> None:
    values, individual = twelve_people(0.5)
    summary = summarize({"a": values, "b": values > 0}, individual)
    assert summary["counts"] == {"frames": 120, "individuals": 12}
    assert summary["intervals_over"] == "individuals"
    for name, mean in (("a", float(values.mean())), ("b", float((values > 0).float().mean()))):
        assert summary[name] == pytest.approx(mean)
        low, high = summary["intervals"][name]
        assert low < mean < high


def test_intervals_are_the_same_in_every_run_whatever_was_drawn_before() -> None:
    values, individual = twelve_people(0.5)
    first = summarize({"a": values}, individual)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert summarize({"a": values}, individual) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_differences_between_individuals_widen_the_interval() -> None:
    """A bootstrap over frames would be as narrow for both."""

    def width(spread: float) -> float:
        values, individual = twelve_people(spread)
        low, high = summarize({"a": values / values.std()}, individual)["intervals"]["a"]
        return high - low

    assert width(3.0) > 2 * width(0.0)


def test_the_interval_of_independent_trials_is_the_textbooks() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = summarize({"a": values}, torch.arange(400))["intervals"]["a"]
    expected = 2 * 1.96 * float(values.std()) / 20
    assert high - low == pytest.approx(expected, rel=0.1)


def test_of_few_individuals_frames_are_resampled() -> None:
    summary = summarize({"a": torch.randn(40)}, torch.zeros(40, dtype=torch.long))
    assert summary["intervals_over"] == "frames"
    low, high = summary["intervals"]["a"]
    assert low < high


def test_never_seen_is_not_never() -> None:
    summary = summarize({"a": torch.zeros(40, dtype=torch.bool)}, torch.arange(40) % 8)
    assert summary["a"] == 0
    assert summary["intervals"]["a"] == pytest.approx([0, 0.0876], abs=1e-4)  # 0 of 40 by Wilson (1927)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilsons_interval_is_the_published_one(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


# ---- Measures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(clip, few_faces):
    """The measures of an edit that does nothing, on three drawn people."""
    faces = few_faces()
    plain = torch.nn.functional.normalize(torch.randn(3, 3, clip.embed_dim), dim=-1)
    bank = PromptBank(plain, faces.individuals, faces.emotions)
    trials = draw_trials(faces, 12)

    def nothing(frames, target):
        return frames

    values = judge_edits(nothing, faces, trials, device=torch.device("cpu")) | prompt_view(clip, bank, faces, trials)
    return values | clip_view(nothing, clip, bank, faces, trials), faces.individual_index[trials.index]


def test_every_measure_has_a_value_for_every_trial(drawn) -> None:
    values, individual = drawn
    assert {len(value) for value in values.values()} == {len(individual)} == {12}
    assert all(value.dtype in (torch.bool, torch.float32) for value in values.values())


def test_an_edit_that_does_nothing_scores_as_unedited(drawn) -> None:
    table = results_table(summarize(*drawn))
    assert table.columns == ["edited", "unedited", "truth"]
    for row in table.rows:
        edited, unedited, _ = row.cells
        assert unedited is None or edited == unedited, row.name
    assert table.rows[0].name.startswith("shows the target emotion")
    assert "12 edits of 3 individuals" in table.note


def test_somebody_elses_prompts_are_those_of_every_other_on_average(drawn) -> None:
    values, _ = drawn
    assert set((2 * values["others_prompt_accuracy"]).tolist()) <= {0.0, 1.0, 2.0}
    torch.testing.assert_close(
        values["personal_gain"], values["prompt_accuracy"].float() - values["others_prompt_accuracy"]
    )


def test_one_individual_has_nobody_elses_prompts(clip, few_faces) -> None:
    faces = few_faces()
    alone = faces.subset((faces.individual_index == 0).nonzero()[:, 0])
    alone.individuals = faces.individuals[:1]
    bank = PromptBank(torch.randn(1, 3, clip.embed_dim), faces.individuals[:1], faces.emotions)
    values = prompt_view(clip, bank, alone, draw_trials(alone, 6))
    assert set(values) == {"zero_shot_accuracy", "prompt_accuracy", "prompt_gain"}
    table = prompts_table(summarize(values, alone.individual_index))
    assert [row.name for row in table.rows] == ["plain descriptions", "personalized prompts"]
    assert "6 unedited frames of one individual" in table.note
    assert "says nothing about other individuals" in table.note


# ---- Tables and words ------------------------------------------------------------------------------------------------


def made_up(frames: int = 100, **gains: tuple[float, float, float]) -> dict[str, Any]:
    """A summary with these gains: (mean, low, high) each."""
    summary: dict[str, Any] = {"zero_shot_accuracy": 0.5, "counts": {"frames": frames, "individuals": 9}}
    summary["intervals"] = {name: [low, high] for name, (_, low, high) in gains.items()}
    summary |= {name: mean for name, (mean, _, _) in gains.items()} | {"intervals_over": "individuals"}
    summary["prompt_accuracy"] = 0.5 + summary["prompt_gain"]
    if "personal_gain" in gains:
        summary["others_prompt_accuracy"] = summary["prompt_accuracy"] - summary["personal_gain"]
    return summary


@pytest.mark.parametrize(
    ("gain", "says"),
    [
        (
            (0.1, 0.05, 0.15),
            "60.0 % by the personalized prompts: +10.0 points (95 % interval +5.0 to +15.0). The prompts",
        ),
        ((0.1, 0.05, 0.15), "helped here"),
        ((-0.1, -0.15, -0.05), "−10.0 points (95 % interval −15.0 to −5.0). The prompts did worse here than the plain"),
        ((-0.01, -0.05, 0.02), "within chance: the prompts made no difference here"),
        ((0.01, 0.0, 0.02), "within chance: the prompts made no difference here"),
        ((0.0, 0.0, 0.0), "in just as many by the personalized prompts. The prompts made no difference here"),
    ],
)
def test_what_the_prompts_did_is_said_also_where_it_is_nothing(gain, says: str) -> None:
    (words,) = prompts_in_words(made_up(prompt_gain=gain))
    assert says in words


def test_few_frames_prove_nothing() -> None:
    (words,) = prompts_in_words(made_up(5, prompt_gain=(0.4, 0.4, 0.4)))
    assert "So few frames cannot tell" in words
    assert "helped" not in words


@pytest.mark.parametrize(
    ("gain", "says"),
    [
        ((0.1, 0.05, 0.15), "Personalizing helped here"),
        ((-0.1, -0.15, -0.05), "Personalizing did harm here"),
        ((-0.1, -0.15, 0.05), "within chance: personalizing made no difference here"),
        ((0.0, 0.0, 0.0), "the same. Personalizing made no difference here"),
    ],
)
def test_what_personalizing_did_is_said_apart(gain, says: str) -> None:
    _, words = prompts_in_words(made_up(prompt_gain=(0.1, 0.05, 0.15), personal_gain=gain))
    assert says in words


@pytest.mark.parametrize("drawn_faces", [True, False])
@pytest.mark.parametrize("edited", [True, False])
def test_what_is_not_measured_is_said(drawn_faces: bool, edited: bool) -> None:
    summary = made_up(prompt_gain=(0.1, 0.05, 0.15))
    words = " ".join(limits_in_words(summary, emotions=3, clip="tiny-face", drawn=drawn_faces, edited=edited))
    assert ("Real faces come without the true edit" in words) == (edited and not drawn_faces)
    assert ("drawn faces only" in words) == (not drawn_faces)
    assert "Guessing among 3 emotions is right in 33.3 %" in words
    assert "Guessing" not in " ".join(
        limits_in_words(summary, emotions=7, clip="ViT-B-32", drawn=drawn_faces, edited=edited)
    )


def test_real_faces_have_no_column_of_truth(drawn) -> None:
    values, individual = drawn
    real = {k: v for k, v in values.items() if k.startswith(("clip_", "change"))}
    assert results_table(summarize(real, individual)).columns == ["edited", "unedited"]


def test_prompts_alone_make_no_table_of_edits() -> None:
    assert results_table(made_up(prompt_gain=(0.0, 0.0, 0.0))).rows == []


@pytest.mark.parametrize(
    ("value", "interval", "unit", "text", "shown"),
    [
        (0.12345, [0.1, 0.2], "", "0.123", "0.100 to 0.200"),
        (0.5, [0.25, 1.0], "%", "50.0 %", "25.0 to 100.0"),
        (28.71, [27.5, 29.96], "dB", "28.7 dB", "27.5 to 30.0"),
        (-0.01, [-0.02, -0.00001], "", "−0.0100", "−0.0200 to 0.0000"),
        (0.0, [0.0, 0.0123], "", "0", "0 to 0.0123"),
        (1.5e-7, [1e-7, 2e-7], "", "1.50e−07", "1.00e−07 to 2.00e−07"),
        (float("nan"), [0.0, 1.0], "", "NaN", ""),
        (1.0, None, "", "1.00", ""),
    ],
)
def test_an_interval_is_as_precise_as_its_mean(value, interval, unit: str, text: str, shown: str) -> None:
    cell = Cell.of(value, interval, unit)
    assert (cell.text, cell.interval) == (text, shown)


def test_no_number_is_minus_zero() -> None:
    assert readable(-0.0004, "%")[0] == "0.0 %"


# ---- Origin ----------------------------------------------------------------------------------------------------------


def test_the_origin_names_the_command_the_date_and_the_versions() -> None:
    made = origin("pcmecl-fast demo", seconds=3.0, now=datetime(2001, 2, 3, 4, 5, 6, 7, tzinfo=timezone.utc))
    assert made.date == "2001-02-03 04:05:06+00:00"
    assert (made.command, made.seconds) == ("pcmecl-fast demo", 3.0)
    assert made.versions["torch"] == torch.__version__
    assert {"pcmecl_fast", "open_clip", "Python", "system", "device", "threads"} <= made.versions.keys()
