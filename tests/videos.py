"""Videos as people have them, which the product itself would not write."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_frames(
    path,
    frames,
    codec="libx264",
    pixels="yuv420p",
    rate=12,
    pixel_shape=None,
    times=None,
    **options,
) -> Path:
    """Write a video of RGB frames, at these times in hundredths of a second, if they are given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        if pixel_shape:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        if times:
            stream.codec_context.time_base = Fraction(1, 100)
        for index, frame in enumerate(frames):
            kind = "rgba" if frame.shape[2] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(frame, format=kind).reformat(format=pixels)
            if times:
                picture.pts, picture.time_base = times[index], Fraction(1, 100)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def turn(path: Path, a=0, b=1, c=-1, d=0) -> None:
    """Have the point (x, y) of a mov or mp4 shown at (a x + c y, b x + d y): a quarter clockwise, by default.

    Before that it is stored as a phone's sensor sees it, a quarter counter-clockwise: `store_turned`.
    """
    data = bytearray(path.read_bytes())
    # The matrix stands 40 bytes into the track header's fields, after its 8 bytes of box header.
    matrix = data.index(b"tkhd") + 4 + 40
    turns = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[matrix : matrix + 36] = struct.pack(">9i", *turns)
    path.write_bytes(data)


def store_turned(frames: np.ndarray) -> np.ndarray:
    """The frames (N, H, W, 3) as a phone's sensor sees them, before its video is turned."""
    return np.ascontiguousarray(np.rot90(frames, 1, axes=(1, 2)))
