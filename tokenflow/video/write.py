"""Frames as videos: H.264 in mp4, in the colours that every player shows alike."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.run_folder import stage
from tokenflow.video.sound import SoundTrack
from util import read_frame

# Without these tags players guess: BT.601 or BT.709 by the size, and some always one of them.
COLOURS = {
    "colorspace": "bt709",
    "color_primaries": "bt709",
    "color_trc": "bt709",
    "color_range": "tv",  # limited: luma from 16 to 235
}
# The same frames give the same file everywhere. The macroblock tree of x264's AVX-512 code reads memory that
# it did not write, unless cpu-independent=1. In another number of threads, by default that of the cores, x264
# decides otherwise.
X264_OPTIONS = COLOURS | {"crf": "12", "x264-params": "cpu-independent=1:threads=4"}
# A conversion that rounds correctly, and by the same arithmetic on every processor.
EXACT = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def write_video(
    path: Path, frames: Iterable[np.ndarray], fps: Fraction, sound: Path | None = None
) -> None:
    """Encode uint8 RGB frames (H, W, 3), H and W even, as H.264 of BT.709 and limited range, one by one.

    sound: what `keep_sound` has written, if it has; what is longer than the video is left out.
    """
    with stage(path) as unfinished, av.open(str(unfinished.absolute()), "w") as container:
        stream, track = None, None
        for index, frame in enumerate(frames, 1):
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, options=X264_OPTIONS)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                if sound and sound.exists():
                    track = SoundTrack(sound, container)
            container.mux(stream.encode(_convert(frame)))
            if track:
                track.write(index / fps)
        container.mux(stream.encode())


def write_video_from_folders(
    path: Path, folders: list[Path], n_frames: int, fps: Fraction, sound: Path | None = None
) -> None:
    """Encode a video of the first `n_frames` frames of the `folders`, side by side, as `write_video` does."""

    def beside_each_other(index: int) -> np.ndarray:
        return np.concatenate([read_frame(folder, index) for folder in folders], axis=1)

    write_video(path, in_parallel(beside_each_other, range(n_frames)), fps, sound)


def _convert(frame: np.ndarray) -> av.VideoFrame:
    """A uint8 RGB frame as the encoder takes it, whose own conversion varies between runs."""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=EXACT,
    )
