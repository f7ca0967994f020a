"""Videos are read upright with exact times and colours, by number too; clips are written with their sound."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV is not installed")

from moving_discs import samples, scene, sound_packets, write_scene, write_tone  # noqa: E402

from pcmecl_fast.data.containers import open_container  # noqa: E402
from pcmecl_fast.data.sound import has_sound  # noqa: E402
from pcmecl_fast.data.video import (  # noqa: E402
    Look,
    colours_of,
    declared_frames,
    open_video,
    read_at,
    scan,
    write_clip,
)

UNEVEN = [0, 1001, 2002, 3500, 4004, 6006, 6007, 9009]
BASE = Fraction(1, 30000)


def faces(count: int, side: int = 64) -> list[np.ndarray]:
    return [scene(number, side, side) for number in range(count)]


def clip(path, count=30, **options):
    write_clip(path, enumerate(faces(count)), time_base=Fraction(1, 25), **options)
    return path


# Reading


def test_frames_come_numbered_at_their_own_times_however_uneven(tmp_path):
    path = write_scene(tmp_path / "talk.mp4", UNEVEN)
    with open_video(path) as reader:
        frames = list(reader)
        assert (reader.width, reader.height, reader.time_base, reader.count) == (200, 120, BASE, len(UNEVEN))
    assert [frame.number for frame in frames] == list(range(len(UNEVEN)))
    assert [frame.time for frame in frames] == [time * BASE for time in UNEVEN]
    assert scan(path).tolist() == UNEVEN
    assert declared_frames(path) == len(UNEVEN)


@pytest.mark.parametrize("name", ["talk.mp4", "talk.mov", "talk.mkv", "talk.webm", "talk.flv", "talk.avi"])
def test_every_container_gives_its_frames(tmp_path, name):
    codec = {"webm": "libvpx-vp9", "flv": "flv1", "avi": "mpeg4"}.get(
        name[-3:] if name[-4] == "." else "webm", "libx264"
    )
    path = write_scene(tmp_path / name, list(range(10)), time_base=Fraction(1, 25), rate=Fraction(25), codec=codec)
    with open_video(path) as reader:
        frames = list(reader)
    assert len(frames) == 10
    gaps = np.diff([float(frame.time) for frame in frames])
    np.testing.assert_allclose(gaps, 1 / 25, atol=1e-3)
    assert np.abs(frames[0].rgb().astype(int) - scene(0)).mean() < 6


def test_no_frame_is_lost_where_the_sound_is_the_first_stream(tmp_path):
    """The decoder keeps the last frames back until it is told of the end."""
    source = write_scene(tmp_path / "talk.mp4", [k * 1001 for k in range(40)], sound=write_tone(tmp_path / "tone.wav"))
    with av.open(str(source)) as container, av.open(str(tmp_path / "sound-first.mp4"), "w") as output:
        kinds = {kind: getattr(container.streams, kind)[0] for kind in ("audio", "video")}
        streams = {kind: output.add_stream_from_template(stream) for kind, stream in kinds.items()}
        for packet in container.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.type]
                output.mux(packet)
    with open_container(tmp_path / "sound-first.mp4") as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    assert len(scan(tmp_path / "sound-first.mp4")) == 40


def test_frames_without_times_are_counted_on(tmp_path):
    whole = write_scene(tmp_path / "talk.mp4", list(range(10)), time_base=Fraction(1, 25), rate=Fraction(25))
    raw = tmp_path / "talk.264"
    with av.open(str(whole)) as container, av.open(str(raw), "w", format="h264") as output:
        stream = output.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    times = scan(raw)
    assert len(times) == 10
    assert (np.diff(times) > 0).all()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_video_that_is_stored_sideways_is_read_upright(tmp_path, turns):
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]
    matrix = (cos << 16, -sin << 16, 0, sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    width, height = (120, 200) if turns % 2 else (200, 120)
    path = write_scene(
        tmp_path / "talk.mp4", [0, 1000], look=Look(width, height, display=matrix if turns else None), turns=turns
    )
    with open_video(path) as reader:
        assert (reader.width, reader.height) == (200, 120)
        assert reader.display == (matrix if turns else None)
        frame = next(iter(reader))
    assert np.abs(frame.rgb().astype(int) - scene(0)).mean() < 4
    (again,) = read_at(path, [1], scan(path))
    assert np.abs(again.astype(int) - scene(1)).mean() < 4


@pytest.mark.parametrize(
    ("lines", "tagged", "full", "means"),
    [(720, 2, None, (1, False)), (480, 2, None, (6, False)), (480, 1, None, (1, False)), (720, 9, True, (9, True))],
)
def test_colours_are_those_that_the_stream_says_or_its_size_suggests(tmp_path, lines, tagged, full, means):
    path = tmp_path / "talk.mp4"
    width = {720: 1280, 480: 854}[lines]
    write_scene(path, [0], look=Look(width, lines, matrix=tagged, full=full))
    with open_video(path) as reader:
        assert colours_of(reader.first) == means
        frame = next(iter(reader))
    y, u, v = (np.frombuffer(p, np.uint8).reshape(p.height, -1).astype(float) for p in frame.raw.planes)
    y, u, v = y[20:22, 20:22].mean(), u[10, 10], v[10, 10]
    red, blue = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[means[0]]
    luma, chroma, black = (255, 255, 0) if means[1] else (219, 224, 16)
    expected = (
        (y - black) / luma + (2 - 2 * red) * (v - 128) / chroma,
        (y - black) / luma + (2 - 2 * blue) * (u - 128) / chroma,
    )
    np.testing.assert_allclose(frame.rgb()[20:22, 20:22, [0, 2]].mean((0, 1)) / 255, expected, atol=2.5 / 255)
    assert np.abs(frame.rgb(quick=True).astype(int) - frame.rgb()).mean() < 3


def test_frames_are_found_by_number_exactly(tmp_path):
    path = clip(tmp_path / "clip.mp4", 60)
    times = scan(path)
    with open_video(path) as reader:
        whole = [frame.rgb() for frame in reader]
    for numbers in ([0], [59], [13], [40, 3, 41, 3], list(range(5, 30))):
        for number, frame in zip(numbers, read_at(path, numbers, times), strict=True):
            assert np.array_equal(frame, whole[number])


def test_frames_are_found_by_number_where_pictures_refer_to_later_ones(tmp_path):
    path = write_scene(tmp_path / "talk.mp4", [k * 1001 for k in range(80)])
    times = scan(path)
    with open_video(path) as reader:
        whole = [frame.rgb() for frame in reader]
    for number in (0, 1, 37, 79):
        assert np.array_equal(read_at(path, [number], times)[0], whole[number])
    with pytest.raises(ValueError, match=r"talk.mp4 \(it has no frame 80\)"):
        read_at(path, [80], [*times, 10**9])


# What cannot be read


@pytest.mark.parametrize("name", ["talk.mp4", "talk.mkv", "talk.webm", "talk.avi", "talk.flv"])
def test_a_video_that_is_cut_short_is_not_taken_for_a_whole_one(tmp_path, name):
    codec = {".webm": "libvpx-vp9", ".flv": "flv1", ".avi": "mpeg4"}.get(name[4:], "libx264")
    whole = write_scene(tmp_path / name, [k * 1001 for k in range(40)], codec=codec, rate=Fraction(30000, 1001))
    content = whole.read_bytes()
    for part in (0.3, 0.55, 0.8):
        whole.write_bytes(content[: int(part * len(content))])
        with pytest.raises(ValueError, match=name):
            scan(whole)


def test_a_prepared_clip_that_is_cut_between_two_frames_is_cut_short(tmp_path):
    path = clip(tmp_path / "clip.mp4")
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[20]])
    with pytest.raises(ValueError, match=r"clip.mp4 \(cut short"):
        scan(path)


def test_what_is_no_video_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*talk.mp4"):
        scan(tmp_path / "talk.mp4")
    (tmp_path / "talk.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"talk.mp4 is empty"):
        scan(tmp_path / "talk.mp4")
    (tmp_path / "talk.mp4").write_bytes(b"hello" * 100)
    with pytest.raises(ValueError, match=r"talk.mp4 \(cut short, or damaged"):
        scan(tmp_path / "talk.mp4")
    with pytest.raises(ValueError, match=r"tone.wav \(it contains no video\)"):
        scan(write_tone(tmp_path / "tone.wav"))
    assert declared_frames(tmp_path / "talk.mp4") == 0


def test_an_error_of_the_block_is_not_taken_for_the_files(tmp_path):
    path = clip(tmp_path / "clip.mp4", 3)
    with pytest.raises(ValueError, match=r"^mine$"), open_video(path):
        raise ValueError("mine")


# Clips


def test_a_clip_has_the_frames_at_their_times(tmp_path):
    frames = faces(len(UNEVEN))
    write_clip(tmp_path / "clip.mp4", zip(UNEVEN, frames, strict=True), time_base=BASE, rate=Fraction(30))
    with open_video(tmp_path / "clip.mp4") as reader:
        read = list(reader)
        assert colours_of(reader.first) == (1, False)
    assert [frame.time for frame in read] == [time * BASE for time in UNEVEN]
    assert max(np.abs(frame.rgb().astype(int) - face).mean() for frame, face in zip(read, frames, strict=True)) < 5


def test_the_same_frames_and_sound_are_the_same_bytes(tmp_path):
    tone = write_tone(tmp_path / "tone.wav")
    assert clip(tmp_path / "a.mp4", sound=tone).read_bytes() == clip(tmp_path / "b.mp4", sound=tone).read_bytes()


def test_a_clips_groups_of_pictures_are_short_and_look_at_nothing_later(tmp_path):
    path = clip(tmp_path / "clip.mp4", 30, group=10)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [k for k, packet in enumerate(packets) if packet.is_keyframe] == [0, 10, 20]
    assert all(packet.pts == packet.dts for packet in packets)


@pytest.mark.parametrize(("suffix", "codec"), [(".m4a", "aac"), (".mp3", "mp3"), (".flac", "flac"), (".ac3", "ac3")])
def test_compressed_sound_is_copied_packet_by_packet(tmp_path, suffix, codec):
    tone = write_tone(tmp_path / f"tone{suffix}", codec=codec) if codec in ("flac",) else coded(tmp_path, suffix, codec)
    path = clip(tmp_path / "clip.mp4", 50, sound=tone)
    assert sound_packets(path) == sound_packets(tone)


def coded(tmp_path, suffix, codec):
    """Float samples, which these encoders take."""
    import av

    with av.open(str(tmp_path / f"tone{suffix}"), "w") as output:
        stream = output.add_stream({"mp3": "libmp3lame"}.get(codec, codec), rate=48000, layout="stereo")
        with av.open(str(write_tone(tmp_path / "tone.wav"))) as container:
            for frame in container.decode(audio=0):
                output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return tmp_path / f"tone{suffix}"


def test_uncompressed_sound_becomes_aac_and_stays_in_step(tmp_path):
    tone = write_tone(tmp_path / "tone.wav", 1.0)
    path = clip(tmp_path / "clip.mp4", 25, sound=tone)
    with open_container(path) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
    before, after = samples(tone)[0, ::2].astype(float), samples(path)[0] * 32768
    # The two are closest where neither is shifted against the other.
    lags = range(-40, 41)
    products = [before[2000:40000] @ after[2000 + lag : 40000 + lag] for lag in lags]
    assert lags[int(np.argmax(products))] == 0


def test_sound_that_begins_later_than_the_pictures_still_does(tmp_path):
    late = write_scene(tmp_path / "late.mkv", [30000, 31000, 32000], sound=write_tone(tmp_path / "tone.wav"))
    write_clip(
        tmp_path / "clip.mp4", [(k + 1000, f) for k, f in enumerate(faces(3))], time_base=Fraction(1, 1000), sound=late
    )
    with open_container(tmp_path / "clip.mp4") as container:
        starts = [float(s.start_time * s.time_base) for s in (container.streams.video[0], container.streams.audio[0])]
    assert starts == pytest.approx([1.0, 0.0], abs=0.002)


def test_no_sound_where_it_is_asked_for_is_an_error_and_nothing_is_left(tmp_path):
    silent = clip(tmp_path / "silent.mp4")
    assert not has_sound(silent)
    with pytest.raises(ValueError, match=r"silent.mp4 has no sound"):
        clip(tmp_path / "clip.mp4", sound=silent)
    with pytest.raises(ValueError, match=r"clip.mp4 would have no frames"):
        write_clip(tmp_path / "clip.mp4", [], time_base=Fraction(1, 25))
    tone = write_tone(tmp_path / "tone.wav")
    broken = clip(tmp_path / "broken.mp4", sound=tone)
    broken.write_bytes(broken.read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"broken.mp4 \(cut short"):
        clip(tmp_path / "clip.mp4", 50, sound=broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.mp4", "silent.mp4", "tone.wav"]


def test_a_full_disk_names_the_clip_and_leaves_nothing(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"clip.mp4'?$") as caught:
            clip(tmp_path / "clip.mp4", 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []
