"""The sound of a video: taken into another file packet by packet, bit for bit, wherever that file can hold it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pcmecl_fast.data.containers import check_packet, naming, open_container
from pcmecl_fast.files import replacing

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream, Packet
    from av.container import OutputContainer

log = logging.getLogger("pcmecl_fast")

_BITS_PER_SECOND = 192_000
_ENCODERS = {"webm": ("libopus", 48_000)}  # of containers that cannot hold AAC
_AAC = ("aac", 48_000)

Until = Callable[[Fraction | None], None]


def has_sound(path: str | Path) -> bool:
    """Whether a file holds any sound; ValueError and FileNotFoundError name a file that cannot be read."""
    with open_container(path) as container:
        return bool(container.streams.audio)


@contextlib.contextmanager
def sound_into(
    output: OutputContainer, path: str | Path, *, most: int | None = None, compress: bool = False
) -> Iterator[Until]:
    """The sound of a file on its way into another, on the clock that it has there: neither shifted nor cut.

    Args:
        output: the file written; its other streams are added before or after, and nothing is muxed yet.
        path: a file with sound; one without any gives none.
        most: of several streams, how many are taken; by default all.
        compress: uncompressed sound becomes AAC, also where the output could hold it as it is.

    Yields:
        A function that writes all sound up to a time in seconds, or with None all that is left: called between the
        pictures, so that neither waits in memory for the other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: in the block too: the file is cut short or damaged, and the message names it.
    """
    with open_container(path) as container:
        streams = list(container.streams.audio)[:most]
        tracks = {stream.index: _track(output, stream, path, compress=compress) for stream in streams}
        packets = container.demux(streams) if streams else iter(())
        waiting: list[Packet] = []

        def until(time: Fraction | None) -> None:
            while (packet := _next(packets, waiting, time, path)) is not None:
                output.mux(tracks[packet.stream.index](packet))

        yield until


def _next(packets: Iterator[Packet], waiting: list[Packet], time: Fraction | None, path: str | Path) -> Packet | None:
    """The next packet that begins up to a time; a later one is left in `waiting`. At the end, the flushing ones."""
    with naming(path):
        packet = waiting.pop() if waiting else next(packets, None)
        if packet is None:
            return None
        if time is not None and packet.dts is not None and packet.dts * packet.time_base > time:
            waiting.append(packet)
            return None
        check_packet(packet)
        return packet


def _track(
    output: OutputContainer, stream: AudioStream, path: str | Path, *, compress: bool
) -> Callable[[Packet], list[Packet]]:
    """What makes packets of the output of those of a stream."""
    name = stream.codec_context.name
    plain = name.startswith("pcm_")
    # FFmpeg lists uncompressed sound among what MP4 holds, and fails at the end of such a file.
    encoded = plain and (compress or output.format.name == "mp4")
    if name in output.supported_codecs and not encoded:
        copied = output.add_stream_from_template(stream)

        def copy(packet: Packet) -> list[Packet]:
            if packet.dts is None:  # the end
                return []
            packet.stream = copied
            return [packet]

        return copy
    encoder, rate = _ENCODERS.get(output.format.name, _AAC)
    if not (plain and compress):
        log.info("%s: the output cannot hold sound of the kind %s, which becomes %s", path, name, encoder)
    context = stream.codec_context
    rate = context.rate if _takes(encoder, context.rate) else rate
    made = cast("AudioStream", output.add_stream(encoder, rate=rate))
    # Many WAV files do not say where their channels belong.
    made.layout = {1: "mono", 2: "stereo"}.get(context.layout.nb_channels, context.layout.name)
    made.bit_rate = _BITS_PER_SECOND

    def encode(packet: Packet) -> list[Packet]:
        with naming(path):
            frames = cast("list[AudioFrame]", packet.decode())
        packets = [packet for frame in frames for packet in made.encode(frame)]
        return packets if packet.dts is not None else packets + made.encode(None)

    return encode


def _takes(encoder: str, rate: int) -> bool:
    import av

    return rate in (av.Codec(encoder, "w").audio_rates or [rate])


def write_sound(path: Path, source: str | Path) -> None:
    """The sound of a file alone, as .m4a: copied packet by packet, or as AAC where it is uncompressed.

    Raises:
        ValueError: the source is damaged; the message names it.
        OSError: the disk is full, or the folder cannot be written.
    """
    import av

    with (
        replacing(path) as file,
        av.open(file.name, "w", format="ipod", options={"fflags": "+bitexact"}) as output,
        sound_into(output, source, most=1, compress=True) as until,
    ):
        until(None)
