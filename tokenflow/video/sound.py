"""The sound of a video: cut out of the source once, and given to the videos that are made of its frames."""

import logging
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, takewhile
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.filter import Graph

from tokenflow.errors import describe, is_out_of_resources
from tokenflow.video.convert import push_through
from tokenflow.video.read import find_stream, open_container

log = logging.getLogger("tokenflow")

# What players know in an mp4, and is copied. Everything else becomes AAC.
COPIED = {"aac", "mp3", "ac3", "eac3", "alac", "flac", "opus"}
AAC_RATE = 48_000  # samples per second
# Opus needs the packets of 0.08 s before what is heard, others fewer. The mp4's edit list hides them.
PREROLL = Fraction(1, 10)


def keep_sound(video: Path, path: Path, start: Fraction, duration: Fraction) -> None:
    """Write a video's sound as an mp4 without pictures, from `start` after its first frame, in seconds.

    No file is written if there is no sound for this `duration`, or, with a warning, if it cannot be read.
    """
    if video.is_dir():
        return
    try:
        with open_container(video) as source, av.open(str(path.absolute()), "w", "mp4") as kept:
            if not (sound := source.streams.best("audio")):
                return
            pictures = find_stream(video, source)
            start += (pictures.start_time or 0) * pictures.time_base
            cut = _copy if sound.codec.canonical_name in COPIED else _encode
            for packet in cut(sound, kept, start, duration):
                kept.mux(packet)
        if path.exists():
            with av.open(str(path.absolute())) as kept:
                next(_decode(kept.streams.audio[0]))  # what is copied has not been looked at
    except Exception as error:  # whatever is wrong with the sound, it is the pictures that count
        if is_out_of_resources(error):
            raise
        path.unlink(missing_ok=True)
        log.warning(
            "warning: %s: its sound cannot be read, and is left out (%s)", video, describe(error)
        )


def _copy(
    sound: AudioStream, kept: OutputContainer, start: Fraction, duration: Fraction
) -> Iterator[av.Packet]:
    """The packets of a stream from `start` on, as they are."""
    copy = kept.add_stream_from_template(sound)
    for packet in sound.container.demux(sound):
        if packet.pts is None:  # as of the empty one at the end
            continue
        time = packet.pts * packet.time_base - start
        if time >= duration:
            break
        if time > -PREROLL:
            packet.pts = packet.dts = round(time / packet.time_base)
            packet.stream = copy
            yield packet


def _encode(
    sound: AudioStream, kept: OutputContainer, start: Fraction, duration: Fraction
) -> Iterator[av.Packet]:
    """A stream from `start` on, as packets of AAC."""
    layout = "mono" if sound.channels == 1 else "stereo"
    encoder, graph = kept.add_stream("aac", rate=AAC_RATE, layout=layout), Graph()
    graph.link_nodes(
        graph.add_abuffer(sound),
        graph.add("asetpts", f"PTS-{float(start)}/TB"),
        # Cuts off what is before 0, and fills gaps with silence.
        graph.add("aresample", f"{AAC_RATE}:async=1:first_pts=0"),
        graph.add("abuffersink"),
    ).configure()
    frames = takewhile(lambda frame: frame.time < start + duration, _decode(sound))
    for frame in chain(push_through(graph, frames), [None]):
        yield from encoder.encode(frame)


def _decode(sound: AudioStream) -> Iterator[av.AudioFrame]:
    """The frames of a stream but the broken ones. Raises FFmpegError if there are no others."""
    error, n_decoded = None, 0
    for packet in sound.container.demux(sound):
        try:
            frames = packet.decode()
        except av.InvalidDataError as broken:
            error = broken
            continue
        yield from frames
        n_decoded += len(frames)
    if error and not n_decoded:
        raise error


class SoundTrack:
    """The sound of a video that is being written, which follows the pictures."""

    def __init__(self, sound: Path, video: OutputContainer) -> None:
        """Add a sound that `keep_sound` has written to a video that has no frame yet."""
        self.video = video
        with av.open(str(sound.absolute())) as kept:
            stream = kept.streams.audio[0]
            self.stream = video.add_stream_from_template(stream)
            self.packets = deque(packet for packet in kept.demux(stream) if packet.size)

    def write(self, end: Fraction) -> None:
        """Write what is heard before `end`, in seconds."""
        while self.packets:
            packet = self.packets[0]
            if (packet.pts + packet.duration) * packet.time_base > end:
                break
            packet.stream = self.stream
            self.video.mux(self.packets.popleft())
