"""Videos as frames: a video file or a folder of images is decoded one frame at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tokenflow.errors import UserError, is_out_of_resources
from tokenflow.runtime.ahead import in_parallel
from util import check_input, list_images, read_image

FOLDER_FPS = Fraction(24)  # a folder of images does not say how fast it plays
# Formats of files that name other files or servers, which would be read too.
_PLAYLISTS = {
    *("hls", "concat", "dash", "imf", "sdp", "rtp", "rtsp", "sap", "vobsub", "webm_dash_manifest"),
    *("avisynth", "vapoursynth"),  # scripts
}
_FORMATS = ",".join(sorted(av.formats_available - _PLAYLISTS))


def frame_rate(path: Path) -> Fraction:
    """Frames per second of a video file (the mean, where the rate varies) or folder of images.

    Raises UserError if `path` is missing or not a video.
    """
    check_input(path)
    if path.is_dir():
        return FOLDER_FPS
    with _open_video(path) as container:
        stream = container.streams.video[0]
        return stream.average_rate or stream.guessed_rate or FOLDER_FPS


def decode_frames(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video file or folder of images, upright, as uint8 RGB (H, W, 3).

    Frames are decoded one by one. Raises UserError if `path` is missing or undecodable.
    """
    check_input(path)
    if path.is_dir():
        yield from in_parallel(read_image, list_images(path))
        return
    with _open_video(path) as container:
        try:
            for frame in container.decode(video=0):
                # Phones store turned frames; this counter-clockwise rotation makes them upright.
                turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield np.ascontiguousarray(turned)  # torch takes no views of turned frames
        except av.FFmpegError as error:
            if is_out_of_resources(error):
                raise
            raise UserError(f"{path}: cannot be decoded ({error.strerror})") from error


@contextmanager
def _open_video(path: Path) -> Iterator[av.container.InputContainer]:
    try:
        # An absolute path is no URL, even if a colon is in it.
        container = av.open(str(path.absolute()), options={"format_whitelist": _FORMATS})
    except av.FFmpegError as error:
        if is_out_of_resources(error):
            raise
        raise UserError(
            f"{path}: is no video that can be decoded ({error.strerror}); of a playlist, give the videos"
        ) from error
    with container:
        if not container.streams.video:
            raise UserError(f"{path}: holds no video")
        # Decode on all cores; by default most codecs use one.
        container.streams.video[0].thread_type = "AUTO"
        yield container
