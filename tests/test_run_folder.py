"""A run's folder: locked, never overwritten unasked, complete in itself, and untouched by a command that is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from one_line import wrong
from safetensors.torch import load_file

from pcmecl_fast.cli import main
from pcmecl_fast.commands import COMMANDS
from pcmecl_fast.data import features
from pcmecl_fast.data.media import read_frames, write_frames
from pcmecl_fast.ops import backend_status
from pcmecl_fast.ops.operator import REFERENCE, requested_backend
from pcmecl_fast.run_folder import open_run
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.config import LIMITS, AblateConfig, TrainConfig

ROOT = Path(__file__).parents[1]
EMOTIONS = ["neutral", "happy"]
DATA = ["--individuals", "2", "--clips", "1", "--frames-per-clip", "1", "--emotions", *EMOTIONS]
SMALL = ["--size", "32", "--device", "cpu", "--checkpoint-every", "1", "--steps", "2"]
GENERATOR = ["--generator-options", "fields=4", "hidden=16", "--batch", "4", "--prompt-steps", "2"]
PROMPTS = ["prompts", *DATA, *SMALL]
TRAIN = ["train", *DATA, *SMALL, *GENERATOR]


@pytest.fixture(scope="module", autouse=True)
def few_frames_judged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcmecl_fast.run._EVALUATED_FRAMES", 6)
        patch.setattr("pcmecl_fast.run.write_report", lambda path, report: path.write_text("report"))
        yield


@pytest.fixture(scope="module")
def finished(few_frames_judged, tmp_path_factory):
    """The folders of a finished `prompts` and a finished `train`, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(*PROMPTS, "--out", folder / "prompts") == 0
    assert run(*TRAIN, "--out", folder / "train") == 0
    return folder


@pytest.fixture
def runs(finished, tmp_path):
    """A copy of them to try things on."""
    return shutil.copytree(finished, tmp_path / "runs")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def content_of(folder):
    """Every file below a folder and when it was written, but for the lock, which says nothing."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def weights(folder, name="generator"):
    return load_file(folder / f"{name}.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# What is there is not lost


@pytest.mark.parametrize("command", [PROMPTS, TRAIN], ids=["prompts", "train"])
def test_a_second_run_in_a_folder_is_refused_and_the_line_says_what_is_there_and_what_can_be_done(
    command, runs, capsys
):
    out = runs / command[0]
    before = content_of(out)
    line = wrong(capsys, *command, "--out", out)
    assert f"--out: {out} holds a finished run of `pcmecl-fast {command[0]}`, 2 steps" in line
    assert all(choice in line for choice in ("--resume", "--overwrite", "another --out"))
    assert content_of(out) == before


def test_the_demo_is_not_run_again_silently(runs, capsys):
    shutil.rmtree(runs / "train")
    options = [*DATA, *SMALL, *GENERATOR, "--out", runs / "demo"]
    assert run("demo", *options) == 0
    before = content_of(runs / "demo")
    assert "a finished run of `pcmecl-fast demo`" in wrong(capsys, "demo", *options)
    # What `make demo` does.
    assert run("demo", *options, "--resume") == 0
    assert "report.html" in capsys.readouterr().out
    assert content_of(runs / "demo") == before


def test_an_unfinished_run_is_kept_too(runs, capsys):
    (runs / "train" / "summary.json").unlink()
    line = wrong(capsys, *TRAIN, "--out", runs / "train")
    assert "holds an unfinished run of `pcmecl-fast train`, 2 steps: --resume goes on with it" in line
    assert run(*TRAIN, "--out", runs / "train", "--resume") == 0


def test_overwriting_replaces_the_run_and_leaves_other_files_and_the_features(runs):
    out = runs / "train"
    (out / "notes.txt").write_text("mine")
    shutil.copytree(runs / "prompts", out / "kept" / "prompts")
    assert run("evaluate", "--run", out, "--device", "cpu") == 0
    stored = [path.name for path in (out / "features").glob("*/*.safetensors")]
    (out / "views").mkdir()  # of a run that was killed
    assert run(*TRAIN, "--out", out, "--overwrite", "--seed", "5", "--jitter", "0") == 0
    assert not (out / "views").exists()
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 5
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "kept" / "prompts" / "bank.safetensors").is_file()
    assert not (out / "evaluation" / "summary.json").exists()  # it judged another generator
    assert set(stored) < {path.name for path in (out / "features").glob("*/*.safetensors")}


def test_a_run_of_another_command_is_not_replaced_even_when_asked(runs, capsys):
    before = content_of(runs)
    line = wrong(capsys, *PROMPTS, "--out", runs / "train", "--overwrite")
    assert "holds a finished run of `pcmecl-fast train`, 2 steps; name another folder" in line
    line = wrong(capsys, "evaluate", "--run", runs / "train", "--out", runs / "train", "--overwrite")
    assert "holds a finished run of `pcmecl-fast train`" in line
    line = wrong(capsys, "ablate", "--out", runs / "train")
    assert "holds a finished run of `pcmecl-fast train`" in line
    assert content_of(runs) == before


def test_prompts_that_somebody_learned_inside_the_folder_are_not_learned_over(runs, capsys):
    (runs / "train").rename(runs / "other")
    shutil.copytree(runs / "prompts", runs / "train" / "prompts")
    line = wrong(capsys, *TRAIN, "--out", runs / "train")
    assert f"use its prompts, --prompts {runs / 'train' / 'prompts'}, or another --out" in line


def test_overwriting_never_removes_the_prompts_that_it_was_given(runs, capsys):
    before = content_of(runs)
    given = runs / "train" / "prompts"
    line = wrong(capsys, *TRAIN, "--out", runs / "train", "--overwrite", "--prompts", given)
    assert f"--overwrite would remove the prompts in {given}: copy them elsewhere, or give another --out" in line
    assert content_of(runs) == before


def test_the_prompts_inside_a_run_belong_to_it(runs, capsys):
    before = content_of(runs)
    inner = ["--out", runs / "train" / "prompts", "--overwrite"]
    assert "holds files of an earlier run" in wrong(capsys, *PROMPTS, *inner)
    assert "holds files of an earlier run" in wrong(capsys, "evaluate", "--run", runs / "train", *inner)
    assert content_of(runs) == before


def test_overwriting_an_ablation_removes_the_prompts_that_it_shared(tmp_path):
    for folder in ("prompts/1a2b", "prompts/mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "prompts.safetensors").write_bytes(b"")
    (tmp_path / "prompts/mine/config.yaml").write_text("# pcmecl-fast prompts: mine\n{}\n")
    (tmp_path / "config.yaml").write_text("# pcmecl-fast ablate: mine\n{}\n")
    with open_run(tmp_path, AblateConfig(out=tmp_path), overwrite=True) as folder:
        folder.begin()
    assert not (tmp_path / "prompts/1a2b").exists()
    assert (tmp_path / "prompts/mine/prompts.safetensors").is_file()


def test_checkpoints_of_others_are_nobodys_business(runs):
    (runs / "train" / "summary.json").unlink()
    (runs / "train" / "mine").mkdir()
    (runs / "train" / "mine" / "stage-2.ckpt").write_text("mine")
    assert run(*TRAIN, "--out", runs / "train", "--resume") == 0


def test_home_is_found_in_every_path(runs, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    assert run("evaluate", "--run", "~/train", "--out", "~/judged", "--device", "cpu") == 0
    assert (runs / "judged" / "summary.json").is_file()


def test_an_evaluation_is_repeated_only_when_asked(runs, capsys):
    evaluate = ["evaluate", "--run", runs / "train", "--device", "cpu"]
    assert run(*evaluate) == 0
    assert "holds a finished run of `pcmecl-fast evaluate`: --overwrite replaces it" in wrong(capsys, *evaluate)
    assert run(*evaluate, "--overwrite") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "EMPTY", "--out", "train"],
        [*TRAIN, "--out", "train", "--resume", "--n-ctx", "4"],
        [*TRAIN, "--out", "train", "--overwrite", "--descriptions", "calm"],
        [*TRAIN, "--out", "train", "--overwrite", "--device", "tpu9"],
        [*TRAIN, "--out", "train", "--overwrite", "--generator-options", "fields=many"],
        [*TRAIN, "--out", "train", "--overwrite", "--batch", "0"],
        [*TRAIN, "--out", "train", "--overwrite", "--emotions", "happy", "bored"],
        [*TRAIN, "--out", "train", "--overwrite", "--prompts", "EMPTY"],
        [*TRAIN, "--out", "train", "--overwrite", "--prompts", "prompts", "--emotions", "happy", "neutral"],
        [*TRAIN, "--out", "train", "--overwrite", "--resume"],
        [*PROMPTS, "--out", "prompts", "--overwrite", "--emotions", "happy"],
        ["evaluate", "--run", "train", "--data", "EMPTY"],
    ],
    ids=lambda arguments: " ".join(arguments[-4:]),
)
def test_a_refused_command_touches_nothing(arguments, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    Path("EMPTY").mkdir()
    before = content_of(runs)
    wrong(capsys, *arguments)
    assert content_of(runs) == before
    assert not (runs / "train" / "evaluation").exists()


def test_the_configuration_of_a_finished_run_is_never_changed(runs):
    config = runs / "train" / "config.yaml"
    before = config.read_bytes()
    assert run("evaluate", "--run", runs / "train", "--device", "cpu") == 0
    assert run("train", "--config", config, "--out", runs / "again") == 0
    assert run(*TRAIN, "--out", runs / "train", "--resume") == 0
    assert config.read_bytes() == before
    assert not {"resume", "overwrite"} & yaml.safe_load(before).keys()
    assert_same(weights(runs / "again"), weights(runs / "train"))


def test_a_resumed_run_keeps_its_configuration(runs):
    (runs / "train" / "summary.json").unlink()
    before = (runs / "train" / "config.yaml").read_bytes()
    assert run(*TRAIN, "--out", runs / "train", "--resume", "--checkpoint-every", "2") == 0
    assert (runs / "train" / "config.yaml").read_bytes() == before


# One at a time


def test_a_second_process_is_told_who_works_in_the_folder(tmp_path, capsys):
    out = tmp_path / "out"
    with open_run(out, TrainConfig(out=out)) as folder:
        folder.begin()
        line = wrong(capsys, *TRAIN, "--out", out, "--overwrite")
        assert f"--out: {out} is in use by process {os.getpid()} on" in line
        assert "pcmecl-fast train since" in line
        assert "an unfinished run" not in line
    assert "an unfinished run" in wrong(capsys, *TRAIN, "--out", out)


def test_a_folder_made_for_a_run_that_never_began_is_removed_again(tmp_path):
    with open_run(tmp_path / "runs" / "out", TrainConfig()):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_was_writing_is_removed_by_the_next(runs):
    (runs / "train" / "summary.json").unlink()
    for name in (".stage-2.ckpt.0123456789ab.unfinished", "prompts/.bank.safetensors.0123456789ab.unfinished"):
        (runs / "train" / name).write_bytes(b"half")
    assert run(*TRAIN, "--out", runs / "train", "--resume") == 0
    assert not list(runs.rglob("*.unfinished"))


# Stopped by hand


@pytest.mark.parametrize(
    ("every", "says"),
    [
        (1, "stopped; --resume goes on from the last checkpoint in out"),
        (10**6, "stopped before its first checkpoint; --resume begins again in out"),
    ],
)
def test_a_run_that_is_stopped_by_hand_says_how_to_go_on(every, says, tmp_path):
    command = [*PROMPTS, "--steps", "1000000", "--checkpoint-every", str(every), "--out", "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TQDM_DISABLE": ""}
    with subprocess.Popen(
        [sys.executable, "-m", "pcmecl_fast.cli", *command],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        awaited = "out/stage-1.ckpt" if every == 1 else "out/tensorboard/stage-1/events*"
        while not list(tmp_path.glob(awaited)) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        shown = process.stderr.read().decode()
    assert f"pcmecl-fast prompts: {says}\n" in shown
    assert "Traceback" not in shown


# The same result, or no resumption


@pytest.mark.parametrize(
    ("stage", "options", "says"),
    [
        ("prompts", ["--prompt-lr", "0.001"], "--prompt-lr was 0.005, is 0.001"),
        ("prompts", ["--negatives", "within"], "--negatives was all, is within"),
        ("prompts", ["--lambda-diff", "0"], "--lambda-diff was 1.0, is 0.0"),
        ("prompts", ["--size", "40"], "--size was 32, is 40"),
        ("prompts", ["--individuals", "3"], "--individuals was 2, is 3"),
        ("prompts", ["--batch-individuals", "2"], "--batch-individuals was 16, is 2"),
        ("prompts", ["--steps", "3"], "--steps was 2, is 3"),
        ("train", ["--prompt-lr", "0.001"], "--prompt-lr was 0.005, is 0.001"),
        ("train", ["--prompt-steps", "3"], "--prompt-steps was 2, is 3"),
        ("train", ["--lr", "0.1", "--jitter", "0"], "--lr was 0.003, is 0.1, --jitter was 0.06, is 0.0"),
        ("train", ["--prompts", "prompts"], "--prompts was None, is "),
    ],
)
def test_whatever_changes_the_result_must_be_the_same(stage, options, says, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / stage / "summary.json").unlink()
    command = {"prompts": PROMPTS, "train": TRAIN}[stage]
    line = wrong(capsys, *command, "--out", stage, "--resume", *options)
    assert (
        f"--resume: {stage} holds an unfinished run of `pcmecl-fast {stage}`, 2 steps, with other options: {says}"
        in line
    )


def test_prompts_that_say_something_else_are_refused(runs, capsys):
    given = [*TRAIN, "--prompts", runs / "prompts", "--out", runs / "out"]
    assert run(*given) == 0
    (runs / "out" / "summary.json").unlink()
    assert run(*PROMPTS, "--out", runs / "prompts", "--overwrite", "--prompt-lr", "0.1") == 0
    line = wrong(capsys, *given, "--resume")
    assert (
        "stage-2.ckpt belongs to another configuration: the contents of --prompts are others than when it began  ("
        in line
    )


def test_frames_that_were_added_are_noticed(runs, tmp_path, capsys):
    faces = SyntheticFaces(2, emotions=EMOTIONS, clips=2, frames_per_clip=2, size=40)
    for i in range(len(faces)):
        person, emotion = faces.individuals[faces.individual_index[i]], faces.emotions[faces.emotion_index[i]]
        write_frames(tmp_path / "faces" / person / emotion / f"{i}.png", faces.frames([i]), None)
    command = ["prompts", "--data", tmp_path / "faces", "--holdout", "0.3", *SMALL, "--out", tmp_path / "out"]
    assert run(*command) == 0
    (tmp_path / "out" / "summary.json").unlink()
    assert run(*command, "--resume") == 0
    (tmp_path / "out" / "summary.json").unlink()
    (picture, *_) = sorted((tmp_path / "faces").rglob("*.png"))
    for number in range(100, 106):
        shutil.copy(picture, picture.with_name(f"{number}.png"))
    line = wrong(capsys, *command, "--resume")
    assert re.search(r"the frames in --data are others than when it began \(\d+ now, \d+ then\)  \(", line)


def test_where_it_runs_and_how_often_it_saves_may_change(runs, tmp_path):
    (runs / "train" / "summary.json").unlink()
    (runs / "train").rename(runs / "moved")
    options = ["--features", tmp_path / "features", "--checkpoint-every", "7", "--backend", "reference"]
    assert run(*TRAIN, "--out", runs / "moved", "--resume", *options) == 0


# Complete in itself


def test_a_run_computes_each_feature_once_inside_its_folder(tmp_path, monkeypatch):
    seen = []
    encode = features._encode
    monkeypatch.setattr(
        features, "_encode", lambda clip, frames, *of: seen.append(len(frames)) or encode(clip, frames, *of)
    )
    assert run(*TRAIN, "--jitter", "0", "--out", tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path for path in tmp_path.rglob("features") if path.is_dir()] == [tmp_path / "out" / "features"]
    stored = sum(len(load_file(path)["frames"]) for path in (tmp_path / "out" / "features").glob("*/*.safetensors"))
    assert sum(seen) == stored


def test_features_are_shared_where_asked(tmp_path):
    for name in ("one", "two"):
        assert run(*PROMPTS, "--features", tmp_path / "shared", "--out", tmp_path / name) == 0
        assert not (tmp_path / name / "features").exists()
    assert len(list((tmp_path / "shared").glob("*/*.safetensors"))) == 2  # training and held-out frames, once each


def test_a_run_with_relative_paths_is_judged_from_anywhere(tmp_path, monkeypatch):
    home = tmp_path / "home"
    faces = SyntheticFaces(2, emotions=EMOTIONS, clips=2, frames_per_clip=2, size=40)
    for i in range(len(faces)):
        person, emotion = faces.individuals[faces.individual_index[i]], faces.emotions[faces.emotion_index[i]]
        write_frames(home / "faces" / person / emotion / f"{i}.png", faces.frames([i]), None)
    monkeypatch.chdir(home)
    data = ["--data", "faces", "--holdout", "0.3", *SMALL]
    assert run("prompts", *data, "--out", "p") == 0
    assert run("train", *data, *GENERATOR, "--prompts", "p", "--out", "t") == 0
    assert yaml.safe_load(Path("t/config.yaml").read_text())["data"] == str(home / "faces")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("evaluate", "--run", "../home/t", "--device", "cpu") == 0
    assert not list(Path().iterdir())
    assert (home / "t" / "evaluation" / "summary.json").is_file()
    assert run("evaluate", "--config", home / "t" / "evaluation" / "config.yaml", "--out", "again") == 0
    first, second = (
        json.loads((out / "summary.json").read_text()) for out in (home / "t" / "evaluation", Path("again"))
    )
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_a_configuration_leads_back_to_its_run_from_anywhere(runs, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(runs)
    Path("elsewhere").mkdir()
    assert run(*PROMPTS, "--out", "again") == 0
    assert yaml.safe_load(Path("again/config.yaml").read_text())["out"] == str(runs / "again")
    monkeypatch.chdir("elsewhere")
    with caplog.at_level("INFO"):
        assert run("prompts", "--config", "../again/config.yaml", "--resume") == 0
    assert f"{runs / 'again'} holds a finished run" in caplog.text
    assert not list(Path().iterdir())


def test_a_resumption_of_nothing_says_that_it_begins(tmp_path, caplog):
    with caplog.at_level("INFO"), open_run(tmp_path / "new", TrainConfig(), resume=True):
        pass
    assert f"{tmp_path / 'new'} holds nothing to resume: a new run begins" in caplog.text


def test_every_number_of_every_command_has_limits():
    numbers = {
        field.name
        for config, _ in COMMANDS.values()
        for field in config.__dataclass_fields__.values()
        if field.type in ("int", "float", "int | None", "float | None", "list[float]")
    }
    assert numbers == set(LIMITS)


# The backend


@pytest.mark.parametrize("name", [*(n for n, (c, _) in COMMANDS.items() if hasattr(c, "backend")), "backends"])
def test_an_unknown_backend_in_the_environment_is_refused(name, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PCMECL_BACKEND", "gpu")
    picture = tmp_path / "face.png"
    write_frames(picture, torch.zeros(1, 3, 32, 32), None)
    arguments = {
        "evaluate": ["--run", runs / "train"],
        "edit": ["--run", runs / "train", "--input", picture, "--emotion", "happy", "--out", tmp_path / "out"],
        "backends": [],
    }
    line = wrong(capsys, name, *arguments.get(name, ["--out", tmp_path / "out"]))
    assert "PCMECL_BACKEND: got 'gpu'; takes one of reference, cpu, triton, cuda, xformers, auto" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["evaluate", "edit", "train", "prompts", "ablate"])
def test_a_backend_that_is_not_here_is_refused_by_every_command(name, runs, tmp_path, capsys):
    if {status.name: status for status in backend_status()}["cuda"].available:
        pytest.skip("cuda runs here")
    write_frames(tmp_path / "face.png", torch.zeros(1, 3, 32, 32), None)
    edit = ["--run", runs / "train", "--input", tmp_path / "face.png", "--emotion", "happy", "--out", tmp_path / "out"]
    arguments = {"evaluate": ["--run", runs / "train"], "edit": edit}.get(name, ["--out", tmp_path / "out"])
    assert "backend 'cuda' cannot run here: " in wrong(capsys, name, *arguments, "--device", "cpu", "--backend", "cuda")
    assert not (tmp_path / "out").exists()


def test_the_environments_backend_holds_for_commands_and_the_option_comes_before_it(tmp_path, monkeypatch):
    seen = set()
    forward = REFERENCE.implementations["clip_frames"].forward
    implementation = REFERENCE.implementations["clip_frames"]._replace(
        forward=lambda *of: seen.add(requested_backend(None)) or forward(*of)
    )
    monkeypatch.setitem(REFERENCE.implementations, "clip_frames", implementation)
    monkeypatch.setenv("PCMECL_BACKEND", "reference")
    assert run(*PROMPTS, "--out", tmp_path / "one") == 0
    assert seen == {"reference"}
    assert not (tmp_path / "one" / "features").exists()
    assert run(*PROMPTS, "--out", tmp_path / "two", "--backend", "auto") == 0
    assert (tmp_path / "two" / "features").exists()


# What `edit` writes


@pytest.fixture
def portraits(tmp_path):
    """Two pictures, and a third in a subfolder."""
    for name in ("ann.png", "bob.png", "old/cat.png"):
        write_frames(tmp_path / "portraits" / name, torch.rand(1, 3, 48, 40) * 2 - 1, None)
    return tmp_path / "portraits"


def edit(runs, source, *options, emotion="happy"):
    return ["edit", "--run", runs / "train", "--device", "cpu", "--input", source, "--emotion", emotion, *options]


def test_an_edit_never_writes_over_its_input(runs, portraits, capsys):
    before = content_of(portraits)
    for emotion in EMOTIONS:
        assert run(*edit(runs, portraits, "--out", portraits, "--recursive", emotion=emotion)) == 0
    # Edits that lie between their inputs are not edited in their turn.
    assert run(*edit(runs, portraits, "--out", portraits, "--recursive", "--overwrite")) == 0
    after = content_of(portraits)
    assert before.items() <= after.items()
    added = [f"{name}.{emotion}.png" for name in ("ann", "bob", "old/cat") for emotion in ("happy", "neutral")]
    assert sorted(after.keys() - before.keys()) == added
    again = ("--out", portraits, "--overwrite", "--input", portraits / "ann.happy.png")
    (portraits / "ann.happy.happy.png").symlink_to("ann.happy.png")
    line = wrong(capsys, *edit(runs, portraits, *again))
    assert f"--out: {portraits / 'ann.happy.happy.png'} would be written over, an input; name another folder" in line


def test_an_edit_that_is_there_is_kept_unless_told_otherwise(runs, portraits, tmp_path, capsys):
    command = edit(runs, portraits, "--out", tmp_path / "out")
    assert run(*command) == 0
    (tmp_path / "out" / "ann.happy.png").unlink()
    before = content_of(tmp_path / "out")
    line = wrong(capsys, *command)
    assert (
        f"--out: {tmp_path / 'out' / 'bob.happy.png'} exists already; --overwrite replaces it, another --out keeps it"
        in line
    )
    assert content_of(tmp_path / "out") == before
    assert run(*command, "--overwrite") == 0
    assert len(content_of(tmp_path / "out")) == 2


def test_subfolders_are_edited_when_asked(runs, portraits, tmp_path, capsys):
    assert run(*edit(runs, portraits, "--out", portraits / "out", "--recursive")) == 0
    expected = ["ann.happy.png", "bob.happy.png", "old/cat.happy.png"]
    assert sorted(content_of(portraits / "out")) == expected
    # What an earlier edit wrote below the input is no input.
    assert run(*edit(runs, portraits, "--out", portraits / "out", "--recursive", "--overwrite")) == 0
    assert sorted(content_of(portraits / "out")) == expected
    (tmp_path / "outer").mkdir()
    portraits.rename(tmp_path / "outer" / "inner")
    line = wrong(capsys, *edit(runs, tmp_path / "outer", "--out", tmp_path / "more"))
    assert "contains no picture or video; --recursive edits what is in its subfolders" in line


def test_a_broken_file_does_not_stop_the_others_and_is_counted_at_the_end(runs, portraits, tmp_path, capsys):
    (portraits / "a-broken.png").write_bytes((portraits / "ann.png").read_bytes()[:60])
    line = wrong(capsys, *edit(runs, portraits, "--out", tmp_path / "out"))
    assert "--input: 1 of 3 files could not be edited: " in line
    assert "a-broken.png" in line
    assert f"the other 2 are in {tmp_path / 'out'}" in line
    assert sorted(content_of(tmp_path / "out")) == ["ann.happy.png", "bob.happy.png"]


def test_the_other_one_is_counted_too(runs, portraits, tmp_path, capsys):
    (portraits / "bob.png").write_bytes((portraits / "ann.png").read_bytes()[:60])
    assert f"; the other 1 is in {tmp_path / 'out'}" in wrong(capsys, *edit(runs, portraits, "--out", tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.mp4", b"", "--input: {path} is empty"),
        ("empty.png", b"", "--input: {path} is empty"),
        ("text.png", b"hello", "--input: {path} (cannot identify image file"),
        ("notes.txt", b"hello", "--input: {path} is not a picture or video"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_before_a_bar_is_shown(
    name, content, says, runs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("pcmecl_fast.edit._Progress", lambda files: pytest.fail("a bar"))
    path = tmp_path / name
    path.write_bytes(content)
    line = wrong(capsys, *edit(runs, path, "--out", tmp_path / "out"))
    assert line.startswith(f"pcmecl-fast edit: {says.format(path=path)}")


def test_progress_counts_frames(runs, portraits, tmp_path, monkeypatch):
    pytest.importorskip("av", reason="PyAV is not installed")
    from pcmecl_fast.edit import _Progress

    faces = SyntheticFaces(1, emotions=["sad"], clips=1, frames_per_clip=40, size=32)
    write_frames(portraits / "talk.mp4", faces.frames(range(40)), 12)
    (portraits / "zoe.mp4").write_bytes((portraits / "talk.mp4").read_bytes()[:500])
    done, totals = [], []
    monkeypatch.setattr(_Progress, "update", lambda self, count: done.append(count))
    monkeypatch.setattr(_Progress, "__exit__", lambda self, *of: totals.append(self.total))
    assert run(*edit(runs, portraits, "--out", tmp_path / "out")) == 1
    assert sum(done) == 42
    assert totals == [42]
    _, frames = read_frames(tmp_path / "out" / "talk.happy.mp4", 32)
    assert len(frames) == 40
