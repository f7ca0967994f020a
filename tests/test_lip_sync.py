"""Lip synchronisation: both protocols are those of the public code, step by step, and moved sound is found.

The written values are from runs of CDRL's evaluation code and of syncnet_python on the same frames and sound, with the
weights of `field_weights`, and of the library python_speech_features.
"""

import numpy as np
import pytest
import torch
from field_weights import write_field_weights

from pcmecl_fast.evaluate.lip_sync import SAMPLE_RATE, lip_sync, mfcc, read_waveform
from pcmecl_fast.evaluate.networks import load_syncnet


def blocks(count, side):
    """Frames of coloured blocks with noise, the same everywhere: (count, 3, side, side) uint8."""
    generator = np.random.default_rng(4)
    coarse = generator.integers(0, 256, (count, side // 16 + 1, side // 16 + 1, 3))
    large = coarse.repeat(16, 1).repeat(16, 2)[:, :side, :side]
    noisy = np.clip(large + generator.integers(-20, 21, large.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(noisy).permute(0, 3, 1, 2)


def voice(samples):
    """Something that swells like speech, the same everywhere."""
    time = np.arange(samples) / SAMPLE_RATE
    swell = np.sin(2 * np.pi * 2.3 * time) ** 2
    tone = np.sin(2 * np.pi * 140 * time + 3 * np.sin(2 * np.pi * 5 * time))
    noise = np.random.default_rng(3).standard_normal(samples)
    return torch.from_numpy((0.3 * swell * tone + 0.02 * noise).astype(np.float32))


def as_16_bits(waveform):
    return (waveform * 32768).round().clamp(-32768, 32767) / 32768


@pytest.fixture(scope="module")
def syncnet(tmp_path_factory):
    return load_syncnet(write_field_weights(tmp_path_factory.mktemp("weights")))


def test_windows_of_frames_and_of_sound_have_the_features_of_the_authors_network(syncnet):
    cut = blocks(36, 256)[25:, :, 35:221, 35:221]  # the last of the 30 windows begins with frame 29
    lips, sounds = syncnet.lips(cut, torch.tensor([4])), syncnet.sounds(mfcc(voice(19_000).double(), 1 / 120).float())
    for features, written in (
        (lips[0], [117.3183, -21.66039, -211.5788, 356.909, 275.5592, -69.24985]),
        (sounds[29], [-3.343639, 7.827879, 5.597104, 37.97808, 11.48767, -29.25088]),
    ):
        torch.testing.assert_close(features[::171], torch.tensor(written), rtol=1e-4, atol=1e-3)


def test_cdrls_protocol_has_cdrls_values(syncnet):
    found = lip_sync(blocks(36, 256), 30, voice(19_000), SAMPLE_RATE, "cdrl", syncnet)
    assert (found.windows, found.rate, found.offset) == (30, 30, 10)
    assert found.distance == pytest.approx(11245.6259765625, rel=1e-6)
    assert found.confidence == pytest.approx(12.6865234375, abs=0.01)  # of distances in float32
    torch.testing.assert_close(
        found.distances,
        torch.tensor(
            [
                11245.63,
                11248.0,
                11250.4,
                11253.18,
                11256.15,
                11258.24,
                11260.59,
                11263.01,
                11265.66,
                11267.96,
                11270.58,
                11268.59,
                11266.58,
                11264.36,
                11262.63,
                11260.41,
                11258.31,
                11256.14,
                11253.87,
                11251.89,
                11249.11,
            ]
        ),
        rtol=0,
        atol=0.02,
    )


def test_the_original_protocol_has_syncnet_pythons_values(syncnet):
    sound = as_16_bits(voice(19_000)).repeat(2)
    found = lip_sync(blocks(36, 224), 25, sound, SAMPLE_RATE, "original", syncnet)
    assert (found.windows, found.rate, found.offset) == (31, 25, -10)
    assert found.distance == pytest.approx(12031.1045, rel=1e-6)
    assert found.confidence == pytest.approx(12.142578, abs=0.01)
    torch.testing.assert_close(
        found.distances,
        torch.tensor(
            [
                12031.7,
                12034.63,
                12037.6,
                12040.01,
                12042.73,
                12044.75,
                12047.1,
                12049.48,
                12051.44,
                12053.62,
                12056.12,
                12053.34,
                12050.38,
                12047.92,
                12045.56,
                12043.25,
                12040.66,
                12038.58,
                12035.79,
                12033.41,
                12031.1,
            ]
        ),
        rtol=0,
        atol=0.02,
    )


@pytest.mark.parametrize(
    ("waveform", "step", "count", "seventh"),
    [
        (
            voice(19_000).double(),
            1 / 120,
            141,
            [
                -1.845079,
                -20.38718,
                13.70605,
                15.86192,
                18.18455,
                15.63912,
                6.017584,
                2.140607,
                1.943846,
                -1.690833,
                -7.672736,
                -10.78559,
                -16.82953,
            ],
        ),
        (
            as_16_bits(voice(19_000)).double() * 32768,
            0.01,
            118,
            [
                18.9098,
                -18.47305,
                14.93671,
                15.67553,
                19.06365,
                16.41585,
                8.004294,
                8.760024,
                4.311004,
                -4.028368,
                -12.65927,
                -9.620113,
                -7.169357,
            ],
        ),
    ],
    ids=["cdrl", "original"],
)
def test_the_cepstrum_is_that_of_python_speech_features(waveform, step, count, seventh):
    cepstrum = mfcc(waveform, step)
    assert cepstrum.shape == (count, 13)
    np.testing.assert_allclose(cepstrum[7], seventh, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 399, 400, 401, 533, 16_000])
@pytest.mark.parametrize("silent", [False, True])
def test_so_it_is_for_sound_of_any_length_and_for_silence(samples, silent):
    library = pytest.importorskip("python_speech_features")
    waveform = voice(samples).double() * (not silent)
    for step in (1 / 120, 1 / 100):
        theirs = library.mfcc(waveform.numpy(), SAMPLE_RATE, winstep=step)
        np.testing.assert_allclose(mfcc(waveform, step), theirs, rtol=1e-7, atol=1e-7)


class LoudIsBright:
    """Stands for a trained network: a window of frames is its brightness, one of sound its loudness."""

    def lips(self, pictures, starts):
        return torch.stack([pictures[k : k + 5].float().mean() / 255 for k in starts])[:, None]

    def sounds(self, cepstrum):
        return cepstrum[:, 0].unfold(0, 20, 4).mean(1, keepdim=True)


@pytest.mark.parametrize("protocol", ["cdrl", "original"])
@pytest.mark.parametrize("moved", [-4, 0, 3])
def test_sound_that_is_moved_is_found_where_it_is(protocol, moved):
    rate = {"cdrl": 30, "original": 25}[protocol]
    generator = torch.Generator().manual_seed(0)
    levels = torch.rand(80, generator=generator)
    frames = (levels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    heard = levels.roll(moved).double()
    samples = torch.arange(int(80 / rate * SAMPLE_RATE))
    noise = torch.randn(len(samples), generator=generator, dtype=torch.float64)
    # The first coefficient is the log energy: on 25 ms of white noise, linear in the level by this loudness.
    waveform = 0.01 * noise * (heard[(samples * rate // SAMPLE_RATE).clamp(max=79)] / 2).exp()
    level = mfcc(0.01 * noise * (32768 if protocol == "original" else 1), 0.01)[:, 0].mean()

    class Levelled(LoudIsBright):
        def sounds(self, cepstrum):
            return super().sounds(cepstrum) - level

    found = lip_sync(frames, rate, waveform, SAMPLE_RATE, protocol, Levelled())
    assert found.offset == -moved
    assert found.distance < 0.5 * found.confidence


def test_some_windows_stand_for_all(syncnet):
    frames, sound = blocks(20, 64), voice(11_000)
    some = lip_sync(frames, 30, sound, SAMPLE_RATE, "cdrl", syncnet, most_windows=4)
    every = lip_sync(frames, 30, sound, SAMPLE_RATE, "cdrl", syncnet)
    assert (some.windows, every.windows) == (4, 15)
    assert some.distance == pytest.approx(every.distance, rel=0.05)


def test_frames_at_another_rate_are_repeated_or_left_out_for_the_original_protocol():
    levels = torch.arange(60, dtype=torch.uint8)

    class Records(LoudIsBright):
        def lips(self, pictures, starts):
            self.seen = pictures[:, 0, 0, 0].tolist()
            return super().lips(pictures, starts)

    for rate, expected in ((30, [0, 1, 2, 4, 5, 6, 7, 8, 10]), (12.5, [0, 1, 1, 2, 2, 3, 3, 4, 4])):
        network = Records()
        frames = levels[:, None, None, None].expand(-1, 3, 8, 8)
        found = lip_sync(frames, rate, voice(80_000), SAMPLE_RATE, "original", network)
        assert found.rate == 25
        assert len(network.seen) == round(60 * 25 / rate)
        assert network.seen[:9] == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"protocol": "wav2lip"}, "protocol: got 'wav2lip'; takes cdrl or original"),
        ({"rate": 0}, "rate: got 0; takes frames a second, above 0"),
        ({"sample_rate": 44_100}, "sample_rate: got 44100; takes 16000, which read_waveform gives"),
        ({"waveform": torch.zeros(2, 900)}, r"waveform: got torch.float32 \(2, 900\); takes floats \(N,\)"),
        ({"waveform": torch.zeros(900)}, "at least 6 frames with sound; got 8 frames at 30 .*, and 0.06 seconds"),
        ({"most_windows": 0}, "most_windows: got 0; takes at least 1, or None for all"),
        ({"waveform": torch.zeros(0)}, "and 0.00 seconds of sound"),
        ({"frames": torch.zeros(5, 3, 8, 8)}, "at least 6 frames with sound; got 5 frames"),
    ],
)
def test_what_cannot_be_measured_is_said(change, says):
    given = {"frames": torch.zeros(8, 3, 8, 8), "rate": 30, "waveform": voice(9000), "sample_rate": SAMPLE_RATE}
    with pytest.raises(ValueError, match=says):
        lip_sync(**{**given, "protocol": "cdrl", "network": LoudIsBright(), **change})


def write_wav(path, waveform, rate):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=rate, layout="stereo")
        samples = (waveform * 32767).round().to(torch.int16).repeat_interleave(2)[None].numpy()
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.rate = rate
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def test_sound_is_read_as_one_channel_of_16_khz(tmp_path):
    rate = 48_000
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(rate, dtype=torch.float64) / rate)
    write_wav(tmp_path / "tone.wav", tone, rate)
    waveform = read_waveform(tmp_path / "tone.wav")
    assert abs(len(waveform) - SAMPLE_RATE) <= 16
    assert waveform.dtype == torch.float32
    middle = slice(2000, 14_000)
    torch.testing.assert_close(waveform[middle], tone[::3][middle].float(), rtol=0, atol=2e-3)


def test_a_file_without_sound_is_named(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "mute.mp4"), "w") as output:
        stream = output.add_stream("mpeg4", rate=30)
        stream.width = stream.height = 16
        output.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        output.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"mute.mp4 has no sound"):
        read_waveform(tmp_path / "mute.mp4")
