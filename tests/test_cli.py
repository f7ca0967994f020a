"""The command line: whole workflows on a folder of pictures, and one clear line for every mistake."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from one_line import wrong
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from summaries import means
from tqdm import tqdm

from pcmecl_fast.cli import main
from pcmecl_fast.commands import COMMANDS, _AboveBars
from pcmecl_fast.data.media import read_frames, write_frames
from pcmecl_fast.synthetic import SyntheticFaces

EMOTIONS = ["neutral", "happy", "sad"]
SMALL = ["--size", "32", "--device", "cpu", "--checkpoint-every", "2"]
SMALL_GENERATOR = ["--generator-options", "fields=4", "hidden=16", "--batch", "4"]
SYNTHETIC = ["--individuals", "2", "--clips", "1", "--frames-per-clip", "1", "--emotions", "neutral", "happy"]


def draw_folder(root, faces):
    """`<individual>/<emotion>/<number>.png` for every frame of a data set."""
    for i in range(len(faces)):
        person, emotion = faces.individuals[faces.individual_index[i]], faces.emotions[faces.emotion_index[i]]
        write_frames(root / person / emotion / f"{i}.png", faces.frames([i]), None)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three drawn people, two of whom lack an emotion."""
    faces = SyntheticFaces(3, emotions=EMOTIONS, clips=2, frames_per_clip=2, size=40, missing=[(0, 1), (2, 2)])
    return draw_folder(tmp_path_factory.mktemp("data") / "faces", faces)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The output folders of `prompts` and of `train --prompts` on that folder."""
    out = tmp_path_factory.mktemp("runs")
    data = ["--data", str(folder), "--holdout", "0.3", *SMALL]
    assert main(["prompts", *data, "--steps", "3", "--out", str(out / "prompts")]) == 0
    options = ["--prompts", str(out / "prompts"), "--steps", "3", *SMALL_GENERATOR]
    assert main(["train", *data, *options, "--out", str(out / "train")]) == 0
    return out


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_every_option_with_its_default(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.replace("│", " ").split())
    for field in dataclasses.fields(COMMANDS[name][0]):
        if dataclasses.is_dataclass(field.default_factory):
            continue
        option = f"--{field.name.replace('_', '-')}"
        if field.name in getattr(COMMANDS[name][0], "refuses", ()):
            assert f"{option} " not in words
            continue
        _, after = re.split(rf"{option}(?=[ ,])", words, maxsplit=1)
        required = field.default is field.default_factory is dataclasses.MISSING
        assert re.search(r"\((required|default: )", after)[1] == ("required" if required else "default: "), option
    assert "--config" in words
    if hasattr(COMMANDS[name][0], "backend"):  # of a command that computes
        assert all(f"--{common}" in words for common in ("seed", "backend", "device", "out"))


def test_it_tells_its_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"pcmecl-fast (\d+\.\d+\S*|not installed as a package)\n", capsys.readouterr().out)


def test_log_lines_leave_progress_bars_whole(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    record = logging.LogRecord("pcmecl_fast", logging.INFO, "", 0, "resumes at step 3", None, None)
    with tqdm(total=9, desc="stage 1", file=sys.stderr, disable=False, ncols=60) as bar:
        _AboveBars(console=Console(stderr=True)).emit(record)
        bar.refresh()
    for line in capsys.readouterr().err.split("\n"):
        assert not ("stage 1" in line.rsplit("\r", 1)[-1] and "resumes at" in line), line


def test_the_program_lists_its_commands_and_config_files(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert "--config FILE" in " ".join(shown.split())


def test_the_table_of_backends_says_what_is_missing(capsys):
    assert main(["backends"]) == 0
    assert "reference" in capsys.readouterr().out
    assert main(["backends", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["reference", "cpu", "triton", "cuda", "xformers"]
    assert rows["reference"]["available"]
    assert all(row["available"] or row["reason"] for row in rows.values())
    if "no CUDA device" in rows["triton"]["reason"]:
        assert "TRITON_INTERPRET=1" in rows["triton"]["reason"]


def test_it_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "pcmecl_fast.cli", "prompts", "--data", str(tmp_path / "nothing")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"pcmecl-fast prompts: --data: {tmp_path / 'nothing'} does not exist" in result.stderr
    assert "Traceback" not in result.stderr


def test_bars_are_not_drawn_where_tqdm_is_told_so(folder, tmp_path):
    words = ["prompts", "--data", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "2"]
    command = [sys.executable, "-m", "pcmecl_fast", *words]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / "out" / "bank.safetensors").exists()
    assert "it/s" not in told.stderr
    assert "frame/s" not in told.stderr


# A folder of pictures, from the first command to the last


def test_prompts_writes_a_bank_a_summary_and_a_report(runs):
    out = runs / "prompts"
    for name in ("prompts.safetensors", "bank.safetensors", "config.yaml", "report.html"):
        assert (out / name).stat().st_size > 0
    summary = json.loads((out / "summary.json").read_text())
    assert {"zero_shot_accuracy", "prompt_accuracy", "individuals", "seconds"} <= summary.keys()
    assert summary["individuals"] == 3
    low, high = summary["intervals"]["prompt_accuracy"]
    assert low <= summary["prompt_accuracy"] <= high
    report = (out / "report.html").read_text()
    assert "edited no faces" in report
    assert "CLIP names the emotion in" in report
    assert 'id="faces"' not in report


def test_train_uses_the_prompts_and_writes_a_generator_a_summary_and_a_report(runs, folder):
    out = runs / "train"
    assert not (out / "prompts").exists()
    assert load_file(out / "generator.safetensors")
    summary = json.loads((out / "summary.json").read_text())
    assert {"zero_shot_accuracy", "prompt_accuracy", "prompt_gain", "clip_direction", "change"} <= means(summary).keys()
    assert all(isinstance(value, float) for value in means(summary).values())
    assert summary["counts"]["individuals"] == 3
    assert summary["intervals_over"] == "frames"
    with Image.open(out / "faces.png") as grid:
        assert grid.width > 64
    report = (out / "report.html").read_text()
    assert "person-0-000" in report
    assert "stage 2" in report
    assert f"pcmecl-fast train --data {folder} --holdout 0.3" in report
    assert f"<dd>{torch.__version__}</dd>" in report
    assert "Lower row" not in report
    assert "true edit to compare with" in report


def test_what_tiny_face_and_prompts_of_others_are_worth_is_said(runs, tmp_path, caplog, no_report):
    people = SyntheticFaces(2, emotions=EMOTIONS, clips=1, frames_per_clip=5, size=40, seed=9)
    data = ["--data", str(draw_folder(tmp_path / "others", people)), *SMALL, *SMALL_GENERATOR, "--steps", "1"]
    with caplog.at_level(logging.INFO):
        assert main(["train", *data, "--prompts", str(runs / "prompts"), "--out", str(tmp_path / "out")]) == 0
    (warning,) = [record.getMessage() for record in caplog.records if "tiny-face has seen" in record.getMessage()]
    assert warning.endswith("give --clip ViT-B-32 --clip-pretrained openai")
    said = (
        "was learned without 2 of the 2 individuals in --data: their rows of the bank are computed by the same prompts"
    )
    assert said in caplog.text
    caplog.clear()
    assert main(["prompts", *SYNTHETIC, *SMALL, "--steps", "1", "--out", str(tmp_path / "drawn")]) == 0
    assert "tiny-face has seen" not in caplog.text


def test_evaluate_reproduces_the_measures_of_train(runs, tmp_path):
    assert main(["evaluate", "--run", str(runs / "train"), "--out", str(tmp_path / "again"), "--device", "cpu"]) == 0
    first, second = (json.loads((out / "summary.json").read_text()) for out in (runs / "train", tmp_path / "again"))
    assert first["counts"] == second["counts"]
    assert means(first) == pytest.approx(means(second), rel=1e-3, abs=1e-3)
    assert (tmp_path / "again" / "report.html").is_file()


def test_evaluate_judges_other_data_too(runs, folder):
    people = SyntheticFaces(2, emotions=EMOTIONS, clips=1, frames_per_clip=5, size=40, seed=9)
    other = draw_folder(folder.parent / "other", people)
    evaluate = ["evaluate", "--run", str(runs / "train"), "--data", str(other), "--device", "cpu"]
    assert main(evaluate) == 0
    summary = json.loads((runs / "train" / "evaluation" / "summary.json").read_text())
    assert 0 <= summary["prompt_accuracy"] <= 1
    assert "person-9-000" in (runs / "train" / "evaluation" / "report.html").read_text()


def test_edit_writes_every_picture_of_a_folder_under_its_name_and_the_emotions(runs, folder, tmp_path):
    source = folder / "person-0-001" / "neutral"
    options = ["--run", str(runs / "train"), "--input", str(source), "--emotion", "happy", "--device", "cpu"]
    assert main(["edit", *options, "--out", str(tmp_path / "edited")]) == 0
    written = sorted((tmp_path / "edited").iterdir())
    assert [path.name for path in written] == sorted(f"{path.stem}.happy.png" for path in source.iterdir())
    for path in written:
        _, edited = read_frames(path, 32)
        _, before = read_frames(source / path.name.replace(".happy", ""), 32)
        with Image.open(path) as picture, Image.open(source / path.name.replace(".happy", "")) as original:
            assert picture.size == original.size
        assert (edited - before).abs().mean() < 0.1  # three steps from the identity


def test_edit_accepts_one_picture(runs, folder, tmp_path):
    (source, *_) = sorted((folder / "person-0-001" / "sad").iterdir())
    options = ["--run", str(runs / "train"), "--input", str(source), "--emotion", "neutral", "--device", "cpu"]
    assert main(["edit", *options, "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{source.stem}.neutral.png"]


def test_edit_accepts_a_video_and_keeps_its_length_and_rate(runs, tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed")
    faces = SyntheticFaces(1, emotions=["sad"], clips=1, frames_per_clip=6, size=64)
    write_frames(tmp_path / "talk.mp4", faces.frames(range(6)), 12)
    options = ["--run", str(runs / "train"), "--input", str(tmp_path / "talk.mp4"), "--emotion", "happy"]
    assert main(["edit", *options, "--device", "cpu", "--out", str(tmp_path / "edited")]) == 0
    rate, frames = read_frames(tmp_path / "edited" / "talk.happy.mp4", 32)
    assert (rate, len(frames)) == (12, 6)


def test_demo_on_drawn_faces_has_every_number_that_a_reader_looks_for(tmp_path, capsys):
    options = [*SYNTHETIC, *SMALL, *SMALL_GENERATOR, "--steps", "2", "--prompt-steps", "2"]
    assert main(["demo", *options, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = (
        "emotion_accuracy emotion_accuracy_source expression_error mouth_error identity_similarity "
        "identity_similarity_truth psnr zero_shot_accuracy seconds"
    )
    assert set(expected.split()) <= summary.keys()
    assert means(summary).keys() | {"seconds"} == {k for k, v in summary.items() if isinstance(v, float)}
    shown = " ".join(capsys.readouterr().out.split())
    for said in ("edited", "unedited", "truth", "of 12 individuals", "CLIP names the emotion in", "report.html"):
        assert said in shown, said
    assert summary["emotion_accuracy_source"] <= 0.2
    for name in ("report.html", "faces.png", "config.yaml", "generator.safetensors", "prompts/bank.safetensors"):
        assert (tmp_path / name).stat().st_size > 0


def test_a_generator_driven_by_a_reference_asks_for_one(folder, runs, tmp_path, capsys):
    options = [
        "--prompts",
        str(runs / "prompts"),
        "--steps",
        "1",
        "--generator-options",
        "driven_by=reference",
        "fields=4",
        "hidden=16",
    ]
    data = ["--data", str(folder), "--holdout", "0.3", *SMALL, "--batch", "4"]
    assert main(["train", *data, *options, "--out", str(tmp_path / "run")]) == 0
    (source, reference, *_) = sorted((folder / "person-0-001" / "sad").iterdir())
    edit = ["edit", "--run", tmp_path / "run", "--input", source, "--emotion", "sad", "--device", "cpu"]
    assert "pcmecl-fast edit: --reference: this generator is driven by a picture" in wrong(capsys, *edit)
    edit += ["--reference", reference, "--out", tmp_path / "edited"]
    assert main([str(argument) for argument in edit]) == 0
    assert (tmp_path / "edited" / f"{source.stem}.sad.png").is_file()


# Config files


def test_the_config_that_a_run_writes_repeats_it(runs, tmp_path):
    config = runs / "train" / "config.yaml"
    assert main(["train", "--config", str(config), "--out", str(tmp_path)]) == 0
    first, second = (load_file(out / "generator.safetensors") for out in (runs / "train", tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)
    written = [yaml.safe_load((out / "config.yaml").read_text()) for out in (runs / "train", tmp_path)]
    assert {**written[0], "out": ""} == {**written[1], "out": ""}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_options_override_the_file_and_the_file_the_defaults(tmp_path, suffix, monkeypatch):
    seen = []
    monkeypatch.setitem(COMMANDS, "train", (COMMANDS["train"][0], lambda config, command: seen.append(config)))
    values = {
        "steps": 7,
        "size": 48,
        "lr": 1,
        "generator_options": {"fields": 16},
        "prompts": str(tmp_path),
        "amp": "bf16",
    }
    path = tmp_path / f"config.{suffix}"
    path.write_text((yaml.safe_dump if suffix == "yaml" else json.dumps)(values))
    assert main(["train", "--config", str(path), "--size", "32", "--generator-options", "hidden=24"]) == 0
    (config,) = seen
    assert (config.steps, config.size, config.lr, config.amp) == (7, 32, 1, "bf16")
    assert config.generator_options == {"fields": 16, "hidden": 24}
    assert config.prompts == tmp_path
    assert config.batch == COMMANDS["train"][0]().batch


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("stepz: 3", "no option is called 'stepz'; did you mean steps"),
        ("generator_options: 3", "generator_options: got 3; takes dict[str, typing.Any]"),
        ("steps: many", "steps: got 'many'; takes int"),
        ("amp: fp8", "amp: got 'fp8'; takes one of none, bf16, fp16"),
        ("clip_pretrained: 3", "clip_pretrained: got 3; takes str | None"),
        ("- 1", "holds no options, got list"),
        ("", "holds no options, got NoneType"),
        ("steps: [", "is neither YAML nor JSON"),
    ],
)
def test_an_invalid_config_file_is_explained(tmp_path, capsys, content, says):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    line = wrong(capsys, "train", "--config", path)
    assert line.startswith(f"pcmecl-fast train: --config: {path}")
    assert says in line


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\xfa", b"steps: 2001-99-99", b"steps: " + b"9" * 5000, b"steps: " + b"[" * 3000],
    ids=["no text", "no date", "many digits", "many brackets"],
)
def test_a_config_file_that_cannot_be_read_is_named(tmp_path, capsys, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    line = wrong(capsys, "train", "--config", path)
    assert line.startswith(f"pcmecl-fast train: --config: {path} is neither YAML nor JSON")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("emotions: happy", "emotions: got 'happy'; takes list"),
        ("mouth_box: {left: 1}", "mouth_box: got {'left': 1}; takes list"),
        ("lr: 1" + "0" * 400, "lr: got "),
    ],
    ids=["a word", "a mapping", "a number beyond floats"],
)
def test_an_option_of_another_shape_is_named(tmp_path, capsys, content, says):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    line = wrong(capsys, "train", "--config", path)
    assert line.startswith(f"pcmecl-fast train: --config: {path}: {says}")


def test_a_missing_config_file_is_named(tmp_path, capsys):
    line = wrong(capsys, "train", "--config", tmp_path / "config.yaml")
    assert line.startswith(f"pcmecl-fast train: --config: there is no file {tmp_path / 'config.yaml'}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train --stepz 20", "train: no option is called --stepz; did you mean --steps? (`pcmecl-fast train --help`"),
        (
            "prompts --prompt-steps 9",
            "prompts: no option is called --prompt-steps; did you mean --steps? (`pcmecl-fast",
        ),
        (
            "prompts --prompt_steps=9",
            "prompts: no option is called --prompt-steps; did you mean --steps? (`pcmecl-fast",
        ),
        ("train --qqq", "train: no option is called --qqq (`pcmecl-fast train --help` shows them all)"),
        ("trian", "no command is called trian; did you mean train? (`pcmecl-fast --help` shows them all)"),
    ],
)
def test_an_option_or_command_that_does_not_exist_is_answered_in_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(("pcmecl-fast: " if arguments == "trian" else "pcmecl-fast ") + line)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--amp", "fp8"], "invalid choice 'fp8' for argument '--amp'"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--generator-options", "hidden"], "takes NAME=VALUE, got 'hidden'"),
        (["edit", "--emotion", "sad"], "--input"),
        ([], "Expected one of"),
    ],
)
def test_options_that_do_not_exist_are_explained(arguments, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


# Bad data


def test_a_missing_or_empty_folder_is_named(tmp_path, capsys):
    line = wrong(capsys, "prompts", "--data", tmp_path / "nothing", "--out", tmp_path / "out")
    assert line.startswith(f"pcmecl-fast prompts: --data: {tmp_path / 'nothing'} does not exist")
    (tmp_path / "empty").mkdir()
    line = wrong(capsys, "train", "--data", tmp_path / "empty", "--out", tmp_path / "out")
    assert "--data: " in line
    assert "holds no pictures or videos" in line


def test_a_folder_of_an_unknown_emotion_is_named(folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "faces")
    (data / "person-0-001" / "happy").rename(data / "person-0-001" / "hapy")
    line = wrong(capsys, "prompts", "--data", data, "--out", tmp_path / "out", *SMALL)
    assert line.startswith("pcmecl-fast prompts: --data: folders in")
    assert "'hapy' (did you mean happy?)" in line


@pytest.mark.parametrize("command", ["prompts", "train"])
def test_folders_of_other_known_emotions_are_left_out_and_missing_ones_named(command, folder, tmp_path, capsys, caplog):
    options = [command, "--data", folder, "--out", tmp_path / "out", *SMALL, "--steps", "1", "--holdout", "0.3"]
    line = wrong(capsys, *options, "--emotions", "neutral", "hapy")
    assert f"pcmecl-fast {command}: --emotions: no folder in {folder} shows 'hapy'; did you mean happy?" in line
    options += ["--prompt-steps", "1", *SMALL_GENERATOR] if command == "train" else []
    with caplog.at_level(logging.INFO):
        assert main([str(option) for option in [*options, "--emotions", "neutral", "happy"]]) == 0
    assert "the folders of sad" in caplog.text
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["emotions"] == ["neutral", "happy"]


def test_emotions_that_cannot_be_drawn_are_named(tmp_path, capsys):
    line = wrong(capsys, "prompts", "--emotions", "happy", "bored", "--out", tmp_path / "out", *SMALL)
    assert "--emotions: ['bored'] cannot be drawn" in line
    line = wrong(capsys, "ablate", "--emotions", "hapy", "sad", "fear", "--out", tmp_path / "out", *SMALL)
    assert "--emotions: ['hapy'] cannot be drawn" in line
    line = wrong(capsys, "ablate", "--emotions", "neutral", "happy", "sad", "--out", tmp_path / "out", *SMALL)
    assert "--emotions: the ablation takes at least 3 beside neutral, since it trains with 2 missing, got 2" in line
    assert not (tmp_path / "out").exists()


def test_people_with_one_emotion_each_teach_nothing(folder, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "faces", ignore=lambda path, names: {"happy", "sad"} & set(names))
    line = wrong(capsys, "prompts", "--data", data, "--holdout", "0.5", "--out", tmp_path / "out", *SMALL)
    assert "--data: training needs at least one individual with two emotions" in line
    assert "person-0-000, person-0-001, person-0-002" in line


def test_training_on_one_individual_works_with_a_warning(folder, tmp_path, caplog):
    shutil.copytree(folder / "person-0-001", tmp_path / "faces" / "person-0-001")
    options = ["--holdout", "0.3", "--steps", "2", "--out", str(tmp_path / "out"), *SMALL]
    with caplog.at_level(logging.WARNING):
        assert main(["prompts", "--data", str(tmp_path / "faces"), *options]) == 0
    assert "only one individual: changes are not contrasted with another person's" in caplog.text


def test_an_individual_with_one_emotion_is_named_in_a_warning(folder, tmp_path, caplog):
    data = shutil.copytree(folder, tmp_path / "faces")
    shutil.rmtree(data / "person-0-000" / "sad")  # happy is missing already
    options = ["--holdout", "0.3", "--steps", "2", "--out", str(tmp_path / "out"), *SMALL]
    with caplog.at_level(logging.WARNING):
        assert main(["prompts", "--data", str(data), *options]) == 0
    assert "only one emotion, so no change to learn from: person-0-000" in caplog.text


def test_a_truncated_picture_stops_the_run_unless_skipping_is_allowed(folder, tmp_path, capsys, caplog):
    data = shutil.copytree(folder, tmp_path / "faces")
    (picture, *_) = sorted((data / "person-0-001" / "sad").iterdir())
    picture.write_bytes(picture.read_bytes()[:200])
    options = ["prompts", "--data", str(data), "--holdout", "0.3", "--steps", "2", "--out", str(tmp_path / "out")]
    line = wrong(capsys, *options, *SMALL)
    assert line.startswith("pcmecl-fast prompts: --data: 1 of 28 files are broken: ")
    assert str(picture) in line
    assert "or pass --skip-broken to leave them out" in line
    with caplog.at_level(logging.WARNING):
        assert main([*options, *SMALL, "--skip-broken"]) == 0
    assert str(picture) in caplog.text


# Bad models and files


def test_an_unknown_clip_lists_close_names(tmp_path, capsys):
    line = wrong(capsys, "prompts", "--clip", "tinyface", "--out", tmp_path)
    assert "no CLIP model is called 'tinyface'; did you mean tiny-face?" in line
    line = wrong(capsys, "prompts", "--clip", "ViT-B-32", "--clip-pretrained", "opnai", "--out", tmp_path)
    assert "'opnai' is neither a file nor a weights tag of 'ViT-B-32'" in line


def test_prompts_of_another_tower_are_rejected(runs, folder, tmp_path, capsys):
    options = ["--prompts", runs / "prompts", "--clip", "ViT-S-32-alt", "--out", tmp_path, *SMALL]
    line = wrong(capsys, "train", "--data", folder, "--holdout", "0.3", *options)
    assert "was made with 'tiny-face'" in line
    assert "got 'ViT-S-32-alt'" in line


def test_prompts_for_other_emotions_are_rejected(runs, tmp_path, capsys):
    options = ["--prompts", runs / "prompts", "--out", tmp_path, *SYNTHETIC, *SMALL, *SMALL_GENERATOR]
    line = wrong(capsys, "train", *options)
    assert "--prompts: has the emotions ['neutral', 'happy', 'sad'], the data set has ['neutral', 'happy']" in line


@pytest.mark.parametrize("command", ["train", "prompts"])
def test_a_broken_checkpoint_is_named(command, tmp_path, capsys):
    name = {"train": "stage-2", "prompts": "stage-1"}[command]
    options = ["--steps", "2", "--out", str(tmp_path), *SYNTHETIC, *SMALL]
    if command == "train":
        options += ["--prompt-steps", "2", *SMALL_GENERATOR]
    assert main([command, *options]) == 0
    (tmp_path / "summary.json").unlink()
    (tmp_path / f"{name}.ckpt").write_bytes(b"PK half a checkpoint")
    line = wrong(capsys, command, *options, "--resume")
    assert f"--resume: {tmp_path / name}.ckpt is not a whole checkpoint" in line
    assert "--overwrite starts again" in line


def test_folders_that_are_not_runs_are_named(runs, folder, tmp_path, capsys):
    line = wrong(capsys, "evaluate", "--run", tmp_path)
    assert f"--run: {tmp_path} is not the output folder of `pcmecl-fast train` (no config.yaml)" in line
    line = wrong(capsys, "evaluate", "--run", runs / "prompts")
    assert "was written by `pcmecl-fast prompts`, not by `pcmecl-fast train`" in line
    line = wrong(capsys, "edit", "--run", tmp_path, "--input", folder, "--emotion", "sad")
    assert f"--run: {tmp_path} holds no generator.safetensors" in line
    options = ["--out", tmp_path / "out", *SYNTHETIC, *SMALL]
    line = wrong(capsys, "train", "--prompts", tmp_path, *options)
    assert f"--prompts: {tmp_path} holds no prompts.safetensors" in line


def test_edits_of_nothing_or_to_an_unknown_emotion_are_rejected(runs, folder, tmp_path, capsys):
    edit = ["edit", "--run", runs / "train", "--out", tmp_path / "out", "--device", "cpu"]
    line = wrong(capsys, *edit, "--input", folder, "--emotion", "bored")
    assert "--emotion: this generator knows neutral, happy, sad, got 'bored'" in line
    line = wrong(capsys, *edit, "--input", folder, "--emotion", "sad")
    assert "contains no picture or video" in line
    line = wrong(capsys, *edit, "--input", tmp_path / "face.png", "--emotion", "sad")
    assert "--input: there is no file" in line
    (tmp_path / "face.txt").write_text("hello")
    line = wrong(capsys, *edit, "--input", tmp_path / "face.txt", "--emotion", "sad")
    assert "is not a picture or video" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--missing", "3"], "--missing: takes 0 to 0 emotions, got 3"),
        (["--individuals", "0"], "--individuals: takes 1 or more, got 0"),
        (["--steps", "-1"], "--steps: takes 1 or more, got -1"),
        (["--prompt-steps", "0"], "--prompt-steps: takes 1 or more, got 0"),
        (["--batch", "0"], "--batch: takes 1 or more, got 0"),
        (["--holdout", "2"], "--holdout: takes more than 0 to less than 1, got 2.0"),
        (["--jitter", "nan"], "--jitter: takes 0 to 1, got nan"),
        (["--size", "0"], "--size: takes 1 or more, got 0"),
        (["--w-cycle", "-1"], "--w-cycle: takes 0 or more, got -1.0"),
        (["--checkpoint-every", "0"], "--checkpoint-every: takes 1 or more, got 0"),
        (["--mouth-box", "0.6", "0.5", "0.4", "0.9"], "--mouth-box: takes left, top, right and bottom, the first two"),
        (["--descriptions", "calm"], "--descriptions: takes one for each of the 2 emotions (neutral, happy), got 1"),
        (["--descriptions", "calm", "calm"], "--descriptions: got 'calm' twice"),
        (["--n-ctx", "0"], "--n-ctx: takes 1 or more, got 0"),
        (["--n-ctx", "80"], "--descriptions: "),
        (["--device", "tpu9"], "--device: tpu9: no device that this PyTorch can use; --device cpu runs everywhere"),
        (["--device", "meta"], "--device: meta: no device that this PyTorch can use; --device cpu runs everywhere"),
        (["--device", "cuda:99"], "; --device cpu runs everywhere"),
        (["--backend", "triton"], "backend 'triton' cannot run"),
    ],
)
def test_an_invalid_value_is_named(options, says, tmp_path, capsys):
    if "--backend" in options:
        from pcmecl_fast.ops import backend_status

        if {status.name: status for status in backend_status()}["triton"].available:
            pytest.skip("triton runs here")
    out = tmp_path / "runs" / "out"
    line = wrong(capsys, "train", *SYNTHETIC, *SMALL, *SMALL_GENERATOR, "--out", out, *options)
    assert line.startswith("pcmecl-fast train: ")
    assert says in line
    assert not out.parent.exists()


def test_a_gpu_that_is_not_there_is_named_before_anything_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("prompts", "train", "ablate", "demo"):
        line = wrong(capsys, command, "--device", "cuda", "--out", tmp_path / "out")
        said = "--device: cuda: this PyTorch finds no CUDA device; --device cpu runs everywhere"
        assert line.startswith(f"pcmecl-fast {command}: {said}")
        assert not (tmp_path / "out").exists()


def test_a_traceback_is_shown_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("PCMECL_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["prompts", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path)])
