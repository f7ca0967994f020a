"""The ablation: the same training under every supervision, judged on paired truth alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from one_line import wrong

from pcmecl_fast import PromptBank, ablation
from pcmecl_fast.ablation import AROUND, MAIN, MEASURES, DirectCriterion, run_ablate, summarize
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.config import AblateConfig


@pytest.fixture(autouse=True)
def few_unseen(monkeypatch):
    monkeypatch.setattr(ablation, "_UNSEEN", 4)


def small(out, **given):
    generator = {"fields": 4, "hidden": 16}
    options = {"individuals": 4, "clips": 1, "frames_per_clip": 1, "quick": True, "quick_steps": 2, "workers": 1}
    options |= given
    return AblateConfig(
        **{"prompt_steps": 2, "batch": 4, "device": "cpu", "generator_options": generator, "out": out} | options
    )


def test_every_supervision_is_trained_and_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "MAIN", (MAIN[1], MAIN[-1]))
    rows = run_ablate(small(tmp_path))
    assert [(row["regime"], row["supervision"]) for row in rows] == [
        (regime, each.name) for regime in ablation.REGIMES for each in ablation.MAIN
    ]
    for row in rows:
        assert row["seeds"] == 1
        assert all(row[measure]["mean"] == row[measure]["mean"] for measure in MEASURES)
    assert json.loads((tmp_path / "summary.json").read_text()) == rows
    assert (tmp_path / "ablation.svg").stat().st_size > 1000

    # A killed run continues with what is missing.
    (tmp_path / "summary.json").unlink()
    monkeypatch.setattr(ablation, "train_and_judge", lambda *_: pytest.fail("trained again"))
    assert run_ablate(small(tmp_path)) == rows


def test_workers_find_what_one_process_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "MAIN", (MAIN[0], MAIN[1]))
    monkeypatch.setattr(ablation, "REGIMES", {"scarcity": 2})
    alone, together = run_ablate(small(tmp_path / "alone")), run_ablate(small(tmp_path / "together", workers=2))
    for row, other in zip(alone, together, strict=True):
        assert row["supervision"] == other["supervision"]
        # On training people: this test's processes judge fewer of the others.
        for measure in ("personal_style_error", "expression_error", "identity_similarity", "mouth_error"):
            assert row[measure]["mean"] == pytest.approx(other[measure]["mean"], abs=1e-3)


def test_supervisions_with_the_same_prompts_learn_them_once(tmp_path, monkeypatch):
    learned = []
    learn = ablation.learn_prompts
    monkeypatch.setattr(ablation, "learn_prompts", lambda *of: learned.append(of[2].out) or learn(*of))
    monkeypatch.setattr(ablation, "MAIN", (*MAIN, AROUND[0], AROUND[3]))
    monkeypatch.setattr(ablation, "REGIMES", {"every emotion": 0})
    rows = run_ablate(small(tmp_path))
    assert len(rows) == 7
    assert len(learned) == len(set(learned)) == 2  # by individual and by frame


def test_some_supervisions_alone_are_trained(tmp_path, monkeypatch):
    measures = {**dict.fromkeys(MEASURES, 0.5), **{f"unseen_{name}": 0.5 for name in MEASURES}}
    monkeypatch.setattr(ablation, "train_and_judge", lambda *_: dict(measures))
    only = ["none", "contrast 0", "personalized, differencing"]
    rows = run_ablate(small(tmp_path, quick=False, seeds=2, only=only))
    assert [(row["regime"], row["supervision"], row["seeds"]) for row in rows] == [
        ("every emotion", "none", 2),
        ("every emotion", "personalized, differencing", 2),
        ("every emotion", "contrast 0", 2),
        ("scarcity", "none", 2),
        ("scarcity", "personalized, differencing", 2),
    ]


def test_a_critic_of_emotions_supervises_alone_where_nothing_else_does(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(ablation, "train_and_judge", lambda config, *_: trained.append(config) or {"m": 0.5})
    config = small(tmp_path, w_emotion=1.5)
    job = ablation._Job(config, "scarcity", next(each for each in MAIN if each.nothing), 0)
    ablation._kept(job)
    assert (trained[0].w_pcmecl, trained[0].w_emotion, trained[0].missing) == (0.0, 1.5, 2)


def test_a_generator_driven_by_a_reference_is_rejected_before_training(tmp_path):
    with pytest.raises(ValueError, match="generator: the ablation judges generators driven by an emotion"):
        run_ablate(small(tmp_path / "out", generator_options={"driven_by": "reference"}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--data", "."), r"--data: the ablation judges drawn faces, .*; takes synthetic, got \."),
        (("--missing", "1"), "--missing: the ablation trains with 0 and 2 missing emotions .*; takes no other, got 1"),
        (("--only", "nothing"), r"--only: takes some of 'none', 'generic, direct', .*, got \['nothing'\]"),
        (("--only", "contrast 0", "--quick"), r"--only: takes some of 'none', .* with --quick, got \['contrast 0'\]"),
        (("--prompts", "."), r"--prompts: the ablation learns the prompts .*; takes none, got \."),
    ],
    ids=["data", "missing", "only", "only quick", "prompts"],
)
def test_an_option_that_it_cannot_follow_is_refused_before_training(options, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "_train_all", lambda *_: pytest.fail("trained"))
    assert re.search(says, wrong(capsys, "ablate", *options, "--device", "cpu", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "trained"), [({}, [0, 1, 2]), ({"seed": 5}, [5, 6, 7])])
def test_the_seeds_begin_at_the_one_that_is_given(given, trained, tmp_path, monkeypatch):
    begun = []

    def train(config, regime, supervision):
        begun.append((supervision.name, config.seed))
        return {**dict.fromkeys(MEASURES, 0.5), **{f"unseen_{name}": 0.5 for name in MEASURES}}

    monkeypatch.setattr(ablation, "train_and_judge", train)
    monkeypatch.setattr(ablation, "REGIMES", {"every emotion": 0})
    run_ablate(small(tmp_path, quick=False, seeds=3, around_seeds=2, **given))
    assert [seed for name, seed in begun if name == MAIN[0].name] == trained
    assert [seed for name, seed in begun if name == AROUND[0].name] == trained[:2]


def test_the_whole_table_has_each_idea_alone():
    names = [each.name for each in (*MAIN, *AROUND)]
    assert len(names) == len(set(names)) == 13
    assert sum(each.personalized and each.differencing and not each.nothing for each in MAIN) == 1


def test_direct_supervision_is_one_minus_the_cosine_with_the_targets_prompt(clip):
    bank = PromptBank(F.normalize(torch.randn(2, 3, clip.embed_dim), dim=-1), ["a", "b"], ["x", "y", "z"])
    frames = torch.rand(3, 3, 64, 64) * 2 - 1
    row, shown, asked = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), torch.tensor([2, 0, 2])
    loss = DirectCriterion(clip, bank)(frames, frames, row, shown, asked)
    wanted = bank.features[[0, 1], [2, 0]]  # the third target is the source's own emotion
    torch.testing.assert_close(loss, (1 - F.cosine_similarity(clip.encode_image(frames[:2]), wanted)).mean())


def test_scarcity_is_judged_on_exactly_what_was_missing():
    trained = SyntheticFaces(3, clips=1, frames_per_clip=1, missing=[(0, 1), (2, 4)])
    everyone = SyntheticFaces(3, clips=1, frames_per_clip=1)
    trials = ablation._targets(trained, everyone, "scarcity")
    asked = set(zip(everyone.individual_index[trials.index].tolist(), trials.target.tolist(), strict=True))
    assert asked == {(0, 1), (2, 4)}
    assert (everyone.emotion_index[trials.index] != trials.target).all()


def test_standard_errors_are_over_seeds():
    rows = summarize({("r", "s"): [{"m": 1.0}, {"m": 2.0}, {"m": 3.0}]})
    of_m = {"mean": 2.0, "std": 1.0, "sem": pytest.approx(3**-0.5), "values": [1.0, 2.0, 3.0]}
    assert rows == [{"regime": "r", "supervision": "s", "seeds": 3, "m": of_m}]


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from pcmecl_fast.ablation import _begin\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(os.getpid(), 1))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 300)\n"
        "    time.sleep(300)\n"
    )
    here = os.environ | {"PYTHONPATH": str(Path(ablation.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=here)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived its parent")
