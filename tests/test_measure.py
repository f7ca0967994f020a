"""Edits measured as the field does: the right clips side by side, the right numbers, and nothing silently left out."""

from __future__ import annotations

import html
import math
import os
import shutil
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from pcmecl_fast import measure
from pcmecl_fast.evaluate.distances import csim, frechet_distance
from pcmecl_fast.evaluate.field import measures, meter, scores
from pcmecl_fast.evaluate.field.held_out import field_view, summarize_view
from pcmecl_fast.evaluate.field.table import as_latex, table_of
from pcmecl_fast.evaluate.lip_sync import LipSync
from pcmecl_fast.evaluate.metrics import Trials
from tests import measuring
from tests.field_weights import write_field_weights
from tests.measuring import SIDE, colours, noise, numbers, only, run, save, use_plain_networks
from tests.raw_trees import Cast, write_sound, write_video


@pytest.fixture(scope="module")
def portrait():
    return measuring.portrait()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_field_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def plain_networks(monkeypatch):
    use_plain_networks(monkeypatch)


def touch(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# Numbers of a clip


def test_pixels_give_the_formulas_values(tmp_path):
    frames = noise(1)
    brighter = frames + 8
    brighter[1::2] += 4  # 8, 12, 8, 12: each step changes the edit by 4
    save(tmp_path / "reference/ann/happy/001", frames)
    save(tmp_path / "edited/ann/happy/001", brighter)
    found = only(run(tmp_path, "psnr", "ssim", "flicker"))
    expected = np.mean([20 * math.log10(255 / d) for d in (8, 12, 8, 12)])
    assert found["psnr"].mean.value == pytest.approx(expected, rel=1e-6)
    assert found["flicker"].mean.value == pytest.approx(4, rel=1e-6)
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (brighter, frames))
    assert found["ssim"].mean.value == pytest.approx(
        float(structural_similarity_index_measure(a, b, data_range=255.0)), rel=1e-5
    )


def test_a_copy_is_the_same_and_its_infinite_psnr_is_left_out(tmp_path):
    for root in ("edited", "reference"):
        save(tmp_path / root / "ann/happy/001", noise(2))
    found = only(run(tmp_path, "psnr", "ssim", "flicker"))
    assert found["ssim"].mean.value == pytest.approx(1)
    assert found["flicker"].mean.value == 0
    assert found["psnr"].mean is None
    assert found["psnr"].left_out == {"ann/happy/001": "every frame equals the recording's: PSNR is infinite"}


def test_landmarks_of_a_moved_face_are_as_far_as_it_moved(tmp_path, portrait):
    pytest.importorskip("dlib")
    moved = np.roll(portrait, 4, axis=1)
    save(tmp_path / "reference/ann/happy/001", [portrait] * 3)
    save(tmp_path / "edited/ann/happy/001", [moved] * 3)
    found = only(run(tmp_path, "lmd", "identity", every=1))
    (face,) = [face for face in measures.load_detector("dlib")(portrait) if face.score > 0][:1]
    between_eyes = np.linalg.norm(face.landmarks[36] - face.landmarks[45])
    assert found["lmd"].mean.value == pytest.approx(4 / between_eyes, rel=0.25)
    assert found["identity"].mean.value > 0.98


def test_frames_without_a_face_are_counted_and_named(tmp_path, portrait):
    pytest.importorskip("dlib")
    grey = np.full_like(portrait, 128)
    save(tmp_path / "reference/ann/happy/001", [portrait] * 4)
    save(tmp_path / "edited/ann/happy/001", [portrait, grey, grey, portrait])
    save(tmp_path / "reference/ann/happy/002", [portrait] * 2)
    save(tmp_path / "edited/ann/happy/002", [grey] * 2)
    found = only(run(tmp_path, "lmd", every=1))
    assert found["lmd"].mean.clips == 1
    assert found["lmd"].left_out == {"ann/happy/002": "no face found in any of the 2 frames looked at"}
    assert "no face found in 2 of 4 frames" in numbers(tmp_path)["notes"]["ann/happy/001"]


def test_emotion_is_right_in_the_frames_in_which_the_target_is_seen(tmp_path, portrait, monkeypatch):
    pytest.importorskip("dlib")

    class Seer:
        emotions = ("happy", "sad")

        def __call__(self, frames, faces):  # bright faces are happy
            assert all(face.landmarks is not None for face in faces)
            brightness = frames.float().mean((1, 2, 3)) - 127.5
            return torch.stack([brightness, -brightness], 1)

    monkeypatch.setattr(measures, "load_network", lambda name, weights, device: Seer())
    bright, dark = np.clip(portrait.astype(int) + 90, 0, 255).astype(np.uint8), portrait // 3
    for emotion in ("happy", "contempt"):
        save(tmp_path / "reference/ann" / emotion / "001", [portrait] * 3)
        save(tmp_path / "edited/ann" / emotion / "001", [bright, dark, bright])
    found = only(run(tmp_path, "emotion", every=1))["emotion"]
    assert found.by_emotion["happy"].value == pytest.approx(2 / 3)
    assert found.left_out == {"ann/contempt/001": "the classifier knows no contempt"}


# Two folders that do not go together


def test_frames_are_compared_up_to_the_shorter_clips_end(tmp_path):
    save(tmp_path / "reference/ann/happy/001", noise(3, 3))
    save(tmp_path / "edited/ann/happy/001", noise(3, 5))
    run(tmp_path, "ssim")
    assert numbers(tmp_path)["notes"] == {"ann/happy/001": "the recording is shorter: the first 3 frames were compared"}


def test_recordings_of_another_rate_are_not_compared(tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / "reference/ann/happy/001.mp4", noise(4, 6), Fraction(30))
    write_video(tmp_path / "edited/ann/happy/001.mp4", noise(4, 6), Fraction(25))
    (why,) = only(run(tmp_path, "ssim", "psnr"))["ssim"].left_out.values()
    assert why == "25 frames a second beside the recording's 30: they do not show the same moments"


def test_a_recording_of_another_size_is_resized_and_of_another_shape_refused(tmp_path):
    save(tmp_path / "reference/ann/happy/001", noise(5, side=SIDE * 2))
    save(tmp_path / "edited/ann/happy/001", noise(5))
    save(tmp_path / "reference/ann/happy/002", noise(5)[:, :40])
    save(tmp_path / "edited/ann/happy/002", noise(5))
    found = only(run(tmp_path, "ssim"))["ssim"]
    assert found.mean.clips == 1
    assert numbers(tmp_path)["notes"]["ann/happy/001"] == "the recording's 128 × 128 pixels were resized to 64 × 64"
    assert "no two sizes of one picture" in found.left_out["ann/happy/002"]


def test_damaged_clips_are_named_and_the_others_measured(tmp_path, plain_networks):
    for name in ("001", "002", "003"):
        for root, seed in (("reference", 6), ("edited", 7)):
            save(tmp_path / root / "ann/happy" / name, noise(seed))
    (tmp_path / "edited/ann/happy/002/000001.png").write_bytes(b"torn")
    (tmp_path / "reference/ann/happy/003/000002.png").write_bytes(b"torn")
    found = only(run(tmp_path, "ssim", "fad"))
    assert found["ssim"].mean.clips == 1
    assert "002/000001.png" in found["ssim"].left_out["ann/happy/002"]
    assert "003/000002.png" in found["ssim"].left_out["ann/happy/003"]
    assert found["fad"].mean.clips == 2
    assert {*found["fad"].left_out} == {"ann/happy/002", "reference: ann/happy/003"}


def test_lse_is_taken_of_the_clip_and_its_sound_and_clips_without_are_named(tmp_path, monkeypatch):
    pytest.importorskip("av")
    seen = []

    def lip_sync(frames, rate, waveform, sample_rate, protocol, network):
        seen.append((tuple(frames.shape), rate, len(waveform), protocol))
        return LipSync(9.5, 3.5, 0, float(rate), 5, torch.zeros(21))

    monkeypatch.setattr(measures, "load_syncnet", lambda weights, device: object())
    monkeypatch.setattr(meter, "lip_sync", lip_sync)
    sound = np.sin(np.arange(16000) / 9).astype(np.float32) / 2
    write_video(tmp_path / "edited/ann/happy/001.mp4", noise(8, 10), Fraction(25))
    write_video(tmp_path / "edited/ann/happy/002.mp4", noise(8, 10), Fraction(25))
    write_sound(tmp_path / "sound/ann/happy/001.wav", sound, 16000)
    save(tmp_path / "reference/ann/happy/001", noise(8, 10))
    found = only(run(tmp_path, "lse", sound=tmp_path / "sound", protocol="original"))
    assert seen == [((10, 3, SIDE, SIDE), 25, 16000, "original")]
    assert not numbers(tmp_path)["notes"]
    assert (found["lse_d"].mean.value, found["lse_c"].mean.value) == (9.5, 3.5)
    assert found["lse_d"].left_out == {
        "ann/happy/002.mp4": "no sound in it, beside it, in its recording, or in --sound"
    }
    assert "not comparable with CDRL's" in found["lse_d"].protocol


def test_where_the_recordings_sound_stands_for_a_clips_own_that_is_noted(tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(measures, "load_syncnet", lambda weights, device: object())
    monkeypatch.setattr(meter, "lip_sync", lambda *of: LipSync(9.5, 3.5, 0, 25.0, 5, torch.zeros(21)))
    sound = np.sin(np.arange(16000) / 9).astype(np.float32) / 2
    write_video(tmp_path / "edited/ann/happy/001.mp4", noise(8, 10), Fraction(25))
    write_video(tmp_path / "reference/ann/happy/001.mp4", noise(8, 10), Fraction(25), sound, 16000)
    assert only(run(tmp_path, "lse"))["lse_d"].mean.value == 9.5
    assert numbers(tmp_path)["notes"] == {"ann/happy/001.mp4": "it has no sound of its own: LSE takes its recording's"}


# Numbers of groups


def features(*clips):
    return colours(torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2))


def test_fad_compares_all_frames_of_an_emotion_and_csim_each_individuals(tmp_path, plain_networks):
    clips = {}
    for k, (who, emotion) in enumerate([("ann", "happy"), ("ben", "happy"), ("ann", "sad")]):
        for root, seed, low in (("reference", 10 + k, 20), ("edited", 20 + k, 30 + 9 * k)):
            clips[root, who, emotion] = noise(seed, 6, 16, low)
            save(tmp_path / root / who / emotion / "001", clips[root, who, emotion])
    found = only(run(tmp_path, "fad", "csim"))

    def of(root, emotion, *people):
        return features(*(clips[root, who, emotion] for who in people))

    both = [of(root, "happy", "ann", "ben") for root in ("edited", "reference")]
    assert found["fad"].by_emotion["happy"].value == pytest.approx(frechet_distance(*both), rel=1e-5)
    assert found["fad"].by_emotion["happy"].frames == (12, 12)
    each = [csim(of("edited", "happy", who), of("reference", "happy", who)) for who in ("ann", "ben")]
    assert found["csim"].by_emotion["happy"].value == pytest.approx(np.mean(each), rel=1e-6)
    for score in found.values():
        by_emotion = [value.value for value in score.by_emotion.values()]
        assert score.mean.value == pytest.approx(np.mean(by_emotion), rel=1e-9)


def test_csim_takes_a_hundred_random_frames_a_side_the_same_ones_every_time(tmp_path, plain_networks):
    for root in ("reference", "edited"):
        for k in range(2):
            save(tmp_path / root / "ann/happy" / f"{k:03d}", noise(k, 80, 8))
    first = only(run(tmp_path, "csim"))["csim"]
    assert first.mean.frames is None
    assert first.by_emotion["happy"].frames == (100, 100)
    again = only(run(tmp_path, "csim", out=tmp_path / "again"))["csim"]
    assert again.mean == first.mean


def test_people_without_real_faces_of_the_emotion_are_left_out_by_name(tmp_path, plain_networks):
    for who in ("ann", "ben"):
        save(tmp_path / "edited" / who / "happy/001", noise(1, 4))
    save(tmp_path / "reference/ann/happy/001", noise(2, 4))
    save(tmp_path / "reference/ben/sad/001", noise(2, 4))
    found = only(run(tmp_path, "fad"))["fad"]
    assert found.by_emotion["happy"].frames == (4, 4)
    assert found.left_out == {"ben/happy/001": "the reference has no happy clip of ben"}


# Means and intervals


def test_the_mean_is_over_emotions_and_its_interval_over_individuals():
    generator = torch.Generator().manual_seed(0)
    people = torch.arange(200) % 8
    values = people.double() + 0.01 * torch.randn(200, generator=generator, dtype=torch.float64)
    column = (torch.arange(200) >= 150).long()  # 150 clips of an emotion, 50 of another
    values[150:] += 10
    means, intervals = scores._bootstrap(values, column, people)
    assert sum(means) / 2 == pytest.approx(float((values[:150].mean() + values[150:].mean()) / 2))
    low, high = intervals[-1]
    # Of eight people, the spread of their means: 2 × 1.96 × 2.29 / √8, whatever the number of clips.
    assert high - low == pytest.approx(2 * 1.96 * 2.29 / math.sqrt(8), rel=0.1)


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(0).normal(size=10)
    without = [float(np.delete(values, k).mean()) for k in range(10)]
    low, high = scores._jackknife([float(values.mean()), *without])
    half = 2.262 * values.std(ddof=1) / math.sqrt(10)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-4)


def test_one_clip_has_no_interval(tmp_path):
    save(tmp_path / "reference/ann/happy/001", noise(1))
    save(tmp_path / "edited/ann/happy/001", noise(2))
    assert only(run(tmp_path, "ssim"))["ssim"].mean.interval is None


# Going on


@pytest.fixture
def several(tmp_path):
    for k in range(4):
        save(tmp_path / "reference/ann/happy" / f"{k:03d}", noise(k))
        save(tmp_path / "edited/ann/happy" / f"{k:03d}", noise(k + 10))
    return tmp_path


def test_a_killed_run_goes_on_and_gives_the_same_numbers(several, plain_networks, monkeypatch):
    run(several, "fad", "csim", "ssim")
    once = numbers(several)
    add, left = measure.Records.add, [3]

    def killed(self, key, result):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, key, result)

    monkeypatch.setattr(measure.Records, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(several, "fad", "csim", "ssim", out=several / "killed")
    with open(several / "killed/measures.jsonl", "a") as file:
        file.write('{"key": "edited ann/happy/003", "st')  # as a kill may leave it
    monkeypatch.setattr(measure.Records, "add", add)
    measured = run(several, "fad", "csim", "ssim", out=several / "killed")
    assert (measured.clips, measured.measured) == (4, 1)
    assert numbers(several, "killed") == once


def test_what_has_changed_is_measured_again_and_nothing_else(several, plain_networks):
    run(several, "fad")
    stale = {path.name for path in (several / "out/features").iterdir()}
    picture = several / "edited/ann/happy/002/000000.png"
    os.utime(picture, ns=(1, 1))
    measured = run(several, "fad")
    assert measured.measured == 1
    assert len({path.name for path in (several / "out/features").iterdir()} - stale) == 1
    assert len([*(several / "out/features").iterdir()]) == len(stale)
    assert run(several, "fad").measured == 0


def test_a_setting_that_changes_the_numbers_measures_all_again(several, plain_networks):
    run(several, "ssim")
    assert run(several, "ssim", every=3).measured == 4


def test_numbers_that_meant_something_else_are_measured_again(several, plain_networks, monkeypatch):
    run(several, "ssim")
    monkeypatch.setattr(measure, "_MEANING", measure._MEANING + 1)
    assert run(several, "ssim").measured == 4


def test_any_number_of_workers_gives_the_same_numbers(several, plain_networks):
    run(several, "fad", "csim", "ssim", "flicker")
    run(several, "fad", "csim", "ssim", "flicker", workers=2, out=several / "two")
    assert numbers(several, "two") == numbers(several)


def test_a_quick_look_says_so_with_every_number(several, plain_networks):
    found = only(run(several, "fad", "ssim", quick=True))
    assert "300 random edited frames" in found["fad"].protocol
    assert "every 5th frame" in found["ssim"].protocol


# Bad input


def test_a_metric_that_cannot_run_says_why_in_one_line_and_the_others_run(several, plain_networks, caplog):
    measured = run(several, "lse", "ssim")
    assert "syncnet_v2.model of joonson/syncnet_python" in measured.not_run["lse"]
    assert [score.measure.key for score in measured.settings[0].scores] == ["ssim"]
    assert numbers(several)["not_run"].keys() == {"lse"}
    assert "not measured, lse: " in caplog.text


def test_weights_of_another_architecture_are_told_by_their_first_key(several, weights):
    (several / "weights").mkdir()
    shutil.copy(weights / "syncnet_v2.model", several / "weights/resnet18_110.pth")
    measured = run(several, "fad", "ssim", weights=several / "weights")
    assert "another architecture: it has no conv1.weight" in measured.not_run["fad"]


def test_if_no_metric_can_run_that_is_an_error(several, plain_networks):
    with pytest.raises(ValueError, match=r"metrics: none of them can run here: lse: .*syncnet"):
        run(several, "lse")


def test_an_unknown_metric_gets_the_closest(several):
    with pytest.raises(ValueError, match=r"got 'csmi'; did you mean csim\?"):
        run(several, "csmi")


@pytest.mark.parametrize("option", ["edited", "reference", "sound", "weights"])
def test_missing_folders_are_named(several, option):
    with pytest.raises(FileNotFoundError, match=rf"{option}: there is no folder .*nowhere"):
        run(several, **{option: several / "nowhere"})


def test_an_empty_folder_is_named(several):
    (several / "empty").mkdir()
    with pytest.raises(ValueError, match=r"reference: .*empty contains no video and no picture"):
        run(several, reference=several / "empty")


def test_an_output_folder_of_somebody_else_is_refused(several):
    touch(several, "out/thesis.docx")
    with pytest.raises(FileExistsError, match=r"thesis\.docx, not made by `pcmecl-fast measure`"):
        run(several, "ssim")


def test_the_output_never_lies_in_an_input(several):
    with pytest.raises(ValueError, match=r"lies in --edited"):
        run(several, "ssim", out=several / "edited/out")


# What is written


def test_numbers_stand_with_their_counts_and_protocols_everywhere(several, plain_networks):
    measured = run(several, "fad", "ssim", "psnr")
    (setting,) = measured.settings
    rows = table_of(setting).rows
    assert all("Of 4 clips" in row.note for row in rows)
    page = html.unescape((several / "out/report.html").read_text())
    assert all(row.note.split(";")[0] in page for row in rows)
    assert page.count("data:image/webp") == 2 * 2 * 4  # best and worst of PSNR and SSIM, two each, beside recordings
    one = numbers(several)["settings"][0]["measures"]["ssim"]
    assert one["protocol"].startswith("against the recording")
    assert one["by_emotion"]["happy"]["clips"] == 4
    assert one["mean"]["interval"][0] < one["mean"]["value"] < one["mean"]["interval"][1]


def test_latex_has_a_row_for_each_measure_and_a_column_for_each_emotion(several, plain_networks):
    measured = run(several, "ssim", "psnr")
    text = as_latex(measured.settings, measured.not_run, {"protocol": "cdrl"})
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert body[0] == "\\begin{tabular}{lrr}"
    assert body[2] == "& happy & mean \\\\"
    assert body[4].startswith("PSNR (dB) $\\uparrow$ & ")
    assert body == [x for x in (several / "out/table.tex").read_text().splitlines() if not x.startswith("%")]
    assert sum(line.startswith("% ") and "against the recording" in line for line in text.splitlines()) == 2


def test_names_that_are_markup_are_escaped(several):
    save(several / "reference/<b>&/happy/001", noise(1))
    save(several / "edited/<b>&/happy/001", noise(2))
    run(several, "ssim")
    page = (several / "out/report.html").read_text()
    assert "<b>&/happy" not in page
    assert "&lt;b&gt;&amp;/happy" in page


def test_all_of_it_with_the_authors_networks(tmp_path, weights):
    """A drawn person who talks, measured with random weights in the authors' formats."""
    pytest.importorskip("av")
    take = Cast(("ann",), frames=8, seed=0, size=64, takes=1).take("ann", "happy", 0)
    faces = np.stack([np.array(Image.fromarray(face).resize((128, 128))) for face in take.faces])
    sound = take.sound(Fraction(30), 16000)
    write_video(tmp_path / "reference/ann/happy/001.mp4", faces, Fraction(30), sound, 16000)
    write_video(tmp_path / "edited/ann/happy/001.mp4", faces // 2, Fraction(30), sound, 16000)
    found = only(run(tmp_path, "fad", "csim", "lse", "psnr", weights=weights))
    assert found.keys() == {"fad", "csim", "lse_d", "lse_c", "psnr"}
    assert all(score.mean is not None and math.isfinite(score.mean.value) for score in found.values())
    assert all(not score.left_out for score in found.values())


# Held-out edits


def test_held_out_edits_get_the_measures_of_frames_and_faceless_ones_are_counted(portrait):
    pytest.importorskip("dlib")
    faces = torch.from_numpy(portrait).permute(2, 0, 1).float().div(127.5).sub(1).expand(4, -1, -1, -1).clone()
    faces[3] = 0  # grey
    dataset = SimpleNamespace(frames=lambda index: faces[index], emotions=["neutral", "happy"])
    tools = measures.load_tools(["identity", "lmd", "ssim", "psnr"], None, "cpu")
    trials = Trials(torch.arange(4), torch.ones(4, dtype=torch.int64))
    view = field_view(lambda frames, target: frames * 0.9, dataset, trials, tools, batch_size=2)
    assert view["field_ssim"].shape == (4,)
    summary = summarize_view(view, torch.tensor([0, 0, 1, 1]))
    assert summary["field_identity"] > 0.98
    assert summary["field_lmd"] < 0.02
    assert summary["left_out"] == {"field_identity": 1, "field_lmd": 1, "field_lmd_mouth": 1}
