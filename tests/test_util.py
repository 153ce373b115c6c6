"""Video and frame input and output."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

import util
from tokenflow.control.detectors import detect_canny
from tokenflow.errors import UserError


def mean_error(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def test_video_round_trip(clip, clip_frames):
    frames = np.stack(list(util.decode_frames(clip)))
    assert frames.shape == clip_frames.shape and mean_error(frames, clip_frames) < 4
    assert util.frame_rate(clip) == 12


def test_the_same_frames_give_the_same_file(tmp_path):
    rng = np.random.default_rng(0)
    still = rng.integers(20, 236, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    moving = np.stack([np.roll(still, 3 * index, axis=1) for index in range(13)])
    noise = (moving + rng.integers(-20, 20, moving.shape)).astype(np.uint8)
    files, held = set(), []
    for size in rng.integers(100, 100_000, 50):
        held.append(rng.bytes(size))  # gives the encoder other memory each time
        util.write_video(tmp_path / "a.mp4", noise, 12)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_fractional_frame_rate_is_kept(tmp_path, clip_frames):
    ntsc = Fraction(30000, 1001)
    util.write_video(tmp_path / "a.mp4", clip_frames, ntsc)
    assert util.frame_rate(tmp_path / "a.mp4") == ntsc


def write_phone_video(path, frames):
    """Write a mov of 12 frames a second whose display matrix turns it a quarter clockwise, to the frames."""
    # The sensor saw the frames turned a quarter counter-clockwise.
    util.write_video(path, np.rot90(frames, 1, axes=(1, 2)), 12)
    data = bytearray(path.read_bytes())
    # The matrix stands 40 bytes into the track header's fields, after its 8 bytes of box header.
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def test_phone_video_comes_out_upright(tmp_path, clip_frames):
    path = tmp_path / "phone.mov"
    write_phone_video(path, clip_frames[:, :48])
    frames = list(util.decode_frames(path))
    assert np.shape(frames) == (7, 48, 64, 3) and frames[0].flags.c_contiguous  # as torch needs it
    assert mean_error(np.stack(frames), clip_frames[:, :48]) < 5


def test_gif_and_variable_frame_rate(tmp_path, clip_frames):
    with av.open(str(tmp_path / "a.gif"), "w") as container:
        stream = container.add_stream("gif", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "rgb8"
        for time, frame in zip((0, 1, 5, 6, 7, 20, 21), clip_frames, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="rgb8")
            picture.pts = time
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    frames = np.stack(list(util.decode_frames(tmp_path / "a.gif")))
    assert frames.shape == (7, 64, 64, 3)
    assert mean_error(frames[0], clip_frames[0]) < 25  # a gif of 256 colours
    assert 1 < util.frame_rate(tmp_path / "a.gif") < 100


def test_folder_in_natural_order(tmp_path, clip_frames):
    for index in (10, 9, 2):
        util.write_image(tmp_path / f"frame{index}.png", clip_frames[index % 7])
    frames = list(util.decode_frames(tmp_path))
    for frame, number in zip(frames, (2, 9, 10), strict=True):
        assert np.array_equal(frame, clip_frames[number % 7])


@pytest.mark.parametrize(
    "size, mode, expected",
    [
        ((100, 50), "crop", (0, 255)),
        ((50, 100), "crop", (0, 255)),
        ((100, 50), "pad", (0, 255)),
        ((33, 77), "stretch", (255, 255)),
        ((64, 64), "crop", (255, 255)),
    ],
)
def test_fitting_keeps_the_aspect_ratio(size, mode, expected):
    """A white disc on grey stays as round as it was, unless stretched."""
    y, x = np.mgrid[: size[0], : size[1]]
    radius = min(size) / 4
    disc = np.hypot(y - size[0] / 2 + 0.5, x - size[1] / 2 + 0.5) < radius
    frame = np.where(disc[..., None], 255, 128).astype(np.uint8).repeat(3, -1)
    fitted = util.fit_frame(frame, 64, 64, mode)
    assert fitted.shape == (64, 64, 3) and fitted.dtype == np.uint8
    white = fitted[..., 0] > 190
    height, width = white.any(1).sum(), white.any(0).sum()
    if mode == "stretch":
        assert abs(height / width - size[1] / size[0]) < 0.3
    else:
        assert abs(height - width) <= 1
    assert (fitted == 0).any() == (mode == "pad")


def test_sources_that_are_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "text.mp4", "no video that can be decoded"),
        (tmp_path / "missing.mp4", "no such file"),
        (tmp_path / "empty", "holds no images"),
    ]:
        with pytest.raises(UserError, match=message):
            list(util.decode_frames(path))


def test_canny_finds_the_outline(clip_frames):
    edges = detect_canny(clip_frames, 100, 200)
    assert edges.shape == clip_frames.shape and set(np.unique(edges)) == {0, 255}
    assert edges[0, 20:44, 7:10].any() and not edges[0, 50:].any()
