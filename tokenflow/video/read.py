"""Videos as frames: a video file or a folder of images is decoded one frame at a time."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageSequence

from tokenflow.errors import UserError, blame
from tokenflow.runtime.ahead import in_parallel
from tokenflow.video.convert import filter_frames, is_hdr, to_rgb
from util import WHITE, check_input, list_images, read_image

FOLDER_FPS = Fraction(24)  # a folder of images does not say how fast it plays
LARGEST_DENOMINATOR = 1001  # of a frame rate, as in 30000/1001
ROUNDING = Fraction(1, 1000)  # seconds by which time stamps of Matroska and WebM are off
# Formats of files that name other files or servers, which would be read too.
_PLAYLISTS = {
    *("hls", "concat", "dash", "imf", "sdp", "rtp", "rtsp", "sap", "vobsub", "webm_dash_manifest"),
    *("avisynth", "vapoursynth"),  # scripts
}
_FORMATS = ",".join(sorted(av.formats_available - _PLAYLISTS))
_DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own read no transparency
_COVER = Disposition.attached_pic | Disposition.timed_thumbnails
log = logging.getLogger("tokenflow")


@dataclass(frozen=True)
class _Video:
    """What is decoded of a video file: the frames of one stream, as they are stored."""

    frames: Iterator[av.VideoFrame]
    fps: Fraction = FOLDER_FPS  # what the file says of itself, which can be wrong
    pixel_shape: Fraction = Fraction(1)  # width of a pixel over its height


def decode_frames(path: Path, background: int = WHITE) -> Iterator[np.ndarray]:
    """Yield the frames of a video file or folder of images, upright, as uint8 RGB (H, W, 3).

    Frames are decoded one by one, and broken ones are left out. background: the grey that is seen where
    they are transparent. Raises UserError if `path` is missing or undecodable.
    """
    check_input(path)
    if path.is_dir():
        yield from in_parallel(partial(read_image, background=background), list_images(path))
        return
    with _open_video(path) as video:
        for frame in filter_frames(video.frames):
            yield to_rgb(frame, video.pixel_shape, background)


def read_times(path: Path, fps: Fraction | None = None) -> Iterator[Fraction]:
    """Yield when each frame of `decode_frames` is shown, in seconds after the first.

    fps: the rate to assume, instead of the time stamps. Raises UserError like `decode_frames`.
    """
    check_input(path)
    if path.is_dir():
        yield from (index / (fps or FOLDER_FPS) for index in range(len(list_images(path))))
        return
    with _open_video(path) as video:
        step, start, last = 1 / (fps or video.fps), None, None
        for frame in video.frames:
            stamp = None if fps or frame.pts is None else frame.pts * frame.time_base
            if last is None:
                start, last = stamp, Fraction(0)
            elif stamp is None or start is None or (time := _round(stamp - start, step)) <= last:
                last += step  # the time is unknown, or the clock was set back
            else:
                last = time
            yield last


def mean_rate(times: Sequence[Fraction]) -> Fraction:
    """Frames per second of frames that are shown at these times; of a single one, as for a folder."""
    if len(times) < 2:
        return FOLDER_FPS
    rate = (len(times) - 1) / (times[-1] - times[0])
    return max(Fraction(1, LARGEST_DENOMINATOR), rate.limit_denominator(LARGEST_DENOMINATOR))


def frame_rate(path: Path) -> Fraction:
    """Frames per second of a whole video file (the mean, where the rate varies) or folder of images.

    Raises UserError if `path` is missing or not a video.
    """
    return mean_rate(list(read_times(path)))


def open_container(path: Path) -> av.container.InputContainer:
    """Open a file that holds a video and perhaps sound. Raises FFmpegError."""
    # An absolute path is no URL, even if a colon is in it.
    return av.open(str(path.absolute()), options={"format_whitelist": _FORMATS})


@contextmanager
def _open_video(path: Path) -> Iterator[_Video]:
    """Open a video file. Raises UserError, also in the block, if it cannot be decoded."""
    what, remedy = f"{path}: is no video that can be decoded", "of a playlist, give the videos"
    kinds = av.FFmpegError, EOFError, Image.UnidentifiedImageError
    with blame(what, kinds, remedy):
        if path.suffix.lower() == ".webp":  # animated ones cannot be decoded by FFmpeg
            with Image.open(path) as image:
                yield _Video(_decode_webp(image))
            return
        with open_container(path) as container:
            stream = find_stream(path, container)
            yield _Video(
                frames=_decode(path, container, stream),
                fps=stream.guessed_rate or stream.average_rate or FOLDER_FPS,
                pixel_shape=stream.sample_aspect_ratio or Fraction(1),
            )


def find_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """The stream that is the video: no cover, no still beside a video, else the container's default."""
    best = container.streams.best("video")
    streams = [s for s in container.streams.video if not s.disposition & _COVER]
    if not streams:
        raise UserError(f"{path}: holds no video")
    return max(streams, key=lambda stream: (stream.frames != 1, stream is best))


def _decode(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream but the broken ones, and say what is special about them."""
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in _DECODERS_WITH_ALPHA:
        decoder = av.CodecContext.create(_DECODERS_WITH_ALPHA[decoder.name], "r")
    # Frames that several threads decode at once are lost at the end if one of them is broken. Therefore
    # the threads share each frame, as is the default.
    n_decoded, error = 0, UserError(f"{path}: holds no frames")
    for index, packet in enumerate(container.demux(stream)):
        try:
            frames = decoder.decode(packet)
        except av.InvalidDataError as invalid:
            error = invalid
            time = "" if packet.pts is None else f" at {float(packet.pts * packet.time_base):.2f} s"
            _log_once(logging.WARNING, f"{path}: frame {index}{time} is broken and left out")
            continue
        for frame in frames:
            if frame.interlaced_frame:
                _log_once(logging.INFO, f"{path}: it is interlaced, and will be deinterlaced")
            if is_hdr(frame):
                _log_once(logging.INFO, f"{path}: its high dynamic range will become BT.709")
            yield frame
        n_decoded += len(frames)
    if not n_decoded:
        raise error


def _decode_webp(image: Image.Image) -> Iterator[av.VideoFrame]:
    """Yield the frames of an animated WebP."""
    for picture in ImageSequence.Iterator(image):
        frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGBA")), format="rgba")
        frame.pts, frame.time_base = picture.info.get("timestamp", 0), Fraction(1, 1000)
        yield frame


def _round(time: Fraction, step: Fraction) -> Fraction:
    """The multiple of `step` that the container may have rounded to this time, or the time itself."""
    exact = round(time / step) * step
    return exact if abs(exact - time) <= ROUNDING else time


@cache
def _log_once(level: int, line: str) -> None:
    """Log a line about a video, which is decoded several times."""
    log.log(level, line)
