"""Decoded frames as RGB on a computer's screen: not interlaced, of square pixels, upright, opaque."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Colorspace, ColorTrc

from util import lay_on

UNTAGGED = 2  # what FFmpeg calls an unspecified colour matrix
HD_WIDTH, SD_HEIGHT = 1280, 576  # of this width, or higher than this, a video is of HD size
# FFmpeg's filters and their options.
DEINTERLACE = [("bwdif", "mode=send_frame:deint=interlaced")]  # into the first field of each frame
TO_BT709 = [
    ("scale", "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709"),
    ("format", "yuv444p10le"),  # of RGB, the filter would leave the primaries as they are
]


def is_hdr(frame: av.VideoFrame) -> bool:
    """Whether a frame is in high dynamic range: PQ (HDR10, Dolby Vision) or HLG (broadcasts, phones)."""
    return frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)


def filter_frames(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Yield the same frames, deinterlaced from the first interlaced one on, and in standard dynamic range."""
    interlaced = False

    def describe(frame: av.VideoFrame) -> tuple:
        nonlocal interlaced
        interlaced = interlaced or frame.interlaced_frame
        filters = DEINTERLACE * interlaced + TO_BT709 * is_hdr(frame)
        return filters, frame.format.name, frame.width, frame.height

    for (filters, *_), alike in itertools.groupby(frames, describe):
        if filters:
            alike = _pass_through(filters, alike)
        yield from alike


def to_rgb(frame: av.VideoFrame, pixel_shape: Fraction, background: int) -> np.ndarray:
    """One frame as uint8 RGB (H, W, 3), upright.

    pixel_shape: width of its pixels over their height; the smaller side grows. background: the grey, 0 to
    255, that is seen where the frame is transparent.
    """
    colours = {}
    if frame.colorspace == UNTAGGED and (frame.width >= HD_WIDTH or frame.height > SD_HEIGHT):
        colours = {"src_colorspace": Colorspace.ITU709}
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(
        format="rgba" if has_alpha else "rgb24",
        width=round(frame.width * max(1, pixel_shape)),
        height=round(frame.height * max(1, 1 / pixel_shape)),
        **colours,
    )
    if has_alpha:
        pixels = lay_on(background, pixels)
    if matrix := frame.side_data.get("DISPLAYMATRIX"):
        pixels = _turn(pixels, np.frombuffer(matrix, np.int32))
    return np.ascontiguousarray(pixels)  # torch takes no views of turned frames


def _turn(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror pixels (H, W, 3) in quarters, as the nine numbers of a display matrix say.

    They take the point (x, y) to (a x + c y, b x + d y), where y points down.
    """
    a, b, _, c, d = matrix[:5].tolist()
    if abs(a) < abs(b):  # x and y change places
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _pass_through(
    filters: list[tuple[str, str]], frames: Iterator[av.VideoFrame]
) -> Iterator[av.VideoFrame]:
    """Pass frames of one format and size through FFmpeg's filters of these names and options."""
    first, graph = next(frames), av.filter.Graph()
    source = graph.add_buffer(first, format=first.format.name)
    nodes = [graph.add(name, options) for name, options in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    yield from push_through(graph, itertools.chain([first], frames))


def push_through(
    graph: av.filter.Graph, frames: Iterator[av.frame.Frame]
) -> Iterator[av.frame.Frame]:
    """Push frames of pictures or sound through a graph of FFmpeg's filters; yield what comes out."""
    for frame in itertools.chain(frames, [None]):
        graph.push(frame)
        with suppress(av.BlockingIOError, av.EOFError):  # it wants more, or has given all
            while True:
                yield graph.pull()
