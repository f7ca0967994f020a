"""The reader reads speech and identity whatever the emotion, ships with the package, and is used frozen."""

import pytest
import torch
from safetensors.torch import load_file

from pcmecl_fast.clip import ASSETS
from pcmecl_fast.synthetic import IDENTITY_LENGTH, SyntheticFaces, speech_difference
from pcmecl_fast.synthetic.people import SPEECH_SPANS
from pcmecl_fast.synthetic.reader import FaceReader, ReaderConfig, accuracy, load_reader, reading_losses, train


@pytest.fixture(scope="module")
def reader():
    return load_reader("cpu")


@pytest.fixture(scope="module")
def faces():
    return SyntheticFaces(8, clips=1, frames_per_clip=4, seed=40_004)


def test_the_shipped_reader_is_small_frozen_and_in_eval_mode(reader):
    assert (ASSETS / "reader.safetensors").stat().st_size < 500_000
    assert not any(part.training for part in reader.modules())
    assert not any(parameter.requires_grad for parameter in reader.parameters())


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (100, 70)])
def test_each_of_its_networks_reads_frames_of_any_size(reader, size):
    for seen in reader(torch.rand(3, 3, *size) * 2 - 1):
        assert seen.speech.shape == (3, 2)
        assert seen.identity.shape == (3, IDENTITY_LENGTH)


def test_it_reads_people_it_has_not_seen(reader):
    errors = accuracy(reader, individuals=12)
    assert max(value for name, value in errors.items() if "mouth" in name) < 0.11
    assert min(value for name, value in errors.items() if "identity" in name) > 0.7


@torch.no_grad()
def test_two_frames_of_one_person_are_read_alike_whatever_the_emotion(reader):
    faces = SyntheticFaces(24, clips=1, frames_per_clip=4, seed=40_004)
    index = torch.arange(len(faces))
    shown, frames = faces.emotion_index, faces.frames(index)
    other = faces.truth(index, (shown + 1 + index % 6) % 7)
    for seen, again in zip(reader(frames), reader(other), strict=True):
        assert speech_difference(seen.speech, again.speech).mean() < 0.07
        # What is said does not depend on the emotion: nor does what is read of it, on average.
        error = (seen.speech - faces.parameters.speech) / torch.tensor(SPEECH_SPANS)
        means = torch.stack([error[shown == emotion].mean(0) for emotion in range(7)])
        assert (means.amax(0) - means.amin(0) < 0.1).all()


def test_an_unchanged_frame_costs_nothing_and_the_gradient_reaches_the_edit_alone(reader, faces):
    source = faces.frames(range(4))
    speech, person = reading_losses(reader, source, source)
    assert (speech.item(), person.item()) == pytest.approx((0, 0), abs=1e-6)
    source.requires_grad_()
    edited = (source.detach() + 0.05 * torch.randn_like(source)).requires_grad_()
    sum(reading_losses(reader, source, edited)).backward()
    assert source.grad is None
    assert edited.grad.norm() > 0


def test_another_emotion_costs_less_than_other_words_or_another_person(reader, faces):
    index = torch.arange(len(faces))
    source = faces.frames(index)
    emotional = reading_losses(reader, source, faces.truth(index, (faces.emotion_index + 1) % 7))
    # Frames of one clip differ in speech; the same position in the next person's clips shows somebody else.
    talking = reading_losses(reader, source, faces.frames(index // 4 * 4 + (index + 2) % 4))
    somebody = reading_losses(reader, source, faces.frames((index + len(faces) // 8) % len(faces)))
    assert emotional[0] < talking[0]
    assert emotional[1] < 0.3 * somebody[1]


def test_training_writes_a_reader_that_loads(tmp_path):
    train(ReaderConfig(steps=2, batch=4, individuals=1, out=tmp_path))
    written = load_file(tmp_path / "reader.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float16}
    again = load_reader(path=tmp_path / "reader.safetensors").state_dict()
    assert all(torch.equal(again[name], value.float()) for name, value in written.items())
    assert set(FaceReader().state_dict()) - set(written) == {n for n in again if n.endswith("num_batches_tracked")}
