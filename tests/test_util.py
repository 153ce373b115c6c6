"""Video and frame input and output."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from videos import write_frames

import util
from tokenflow.control.detectors import detect_canny
from tokenflow.errors import DamagedError, UserError
from tokenflow.video.read import decode_frames, frame_rate
from tokenflow.video.write import write_video, write_video_from_folders


def mean_error(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def test_video_round_trip(tmp_path, clip_frames):
    ntsc, path = Fraction(30000, 1001), tmp_path / "a.mp4"
    write_video(path, clip_frames, ntsc)
    frames = np.stack(list(decode_frames(path)))
    assert frames.shape == clip_frames.shape and mean_error(frames, clip_frames) < 4
    assert frame_rate(path) == ntsc


def test_gif_and_variable_frame_rate(tmp_path, clip_frames):
    times = 0, 10, 50, 60, 70, 200, 210
    path = write_frames(tmp_path / "a.gif", clip_frames, "gif", "rgb8", rate=10, times=times)
    frames = np.stack(list(decode_frames(path)))
    assert frames.shape == (7, 64, 64, 3)
    assert mean_error(frames[0], clip_frames[0]) < 25  # a gif of 256 colours
    assert 1 < frame_rate(path) < 100


def test_folder_in_natural_order(tmp_path, clip_frames):
    for index in (10, 9, 2):
        util.write_image(tmp_path / f"frame{index}.png", clip_frames[index % 7])
    frames = list(decode_frames(tmp_path))
    for frame, number in zip(frames, (2, 9, 10), strict=True):
        assert np.array_equal(frame, clip_frames[number % 7])


def test_names_with_digits_of_two_scripts_have_an_order(tmp_path):
    for name in ("b.png", "٣1.png", "٣0.png"):
        (tmp_path / name).touch()
    assert [path.name for path in util.list_images(tmp_path)] == ["٣0.png", "٣1.png", "b.png"]


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


def test_videos_are_told_apart_by_all_their_bytes(tmp_path, clip_frames):
    for name in ("a", "moved"):
        (tmp_path / name).mkdir()
        for index, frame in enumerate(clip_frames[:3]):
            util.write_image(tmp_path / name / f"{index}.bmp", frame)
    equal = util.digest_content(tmp_path / "a")
    assert util.digest_content(tmp_path / "moved") == equal
    util.write_image(tmp_path / "moved" / "1.bmp", clip_frames[3])  # of the same size
    assert util.digest_content(tmp_path / "moved") != equal
    (tmp_path / "a" / "2.bmp").rename(tmp_path / "a" / "3.bmp")
    assert util.digest_content(tmp_path / "a") != equal
    digests = set()
    for last in b"ab":
        (tmp_path / "long.mp4").write_bytes(bytes(2 << 20) + bytes([last]))
        digests.add(util.digest_content(tmp_path / "long.mp4"))
    assert len(digests) == 2
    (tmp_path / "pipes").mkdir()
    for name in ("pipe.mp4", "pipes/0.png"):
        os.mkfifo(tmp_path / name)
    for name in ("missing.mp4", "pipe.mp4", "pipes"):
        with pytest.raises(UserError):
            util.digest_content(tmp_path / name)


def test_a_colon_in_a_path_makes_no_url(tmp_path, clip_frames, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path("run:1") / "a.mp4", Path("12:30.mp4")):
        write_video(path, clip_frames, 12)
        assert len(list(decode_frames(path))) == 7 and frame_rate(path) == 12


def test_an_image_that_does_not_fit_on_the_disk(tmp_path, clip_frames):
    """The end of a small file is written when it is closed; OpenCV itself would not notice."""
    (tmp_path / "00000.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        util.save_frames(tmp_path, 0, clip_frames[:1])


def test_a_bad_frame_of_our_own_is_no_mistake_of_the_user(tmp_path, clip_frames):
    util.save_frames(tmp_path, 0, clip_frames[:2])
    (tmp_path / "00001.png").write_bytes(b"")
    for read in (
        lambda: list(util.read_frames(tmp_path, 2)),
        lambda: util.load_frames(tmp_path, [1]),
        lambda: write_video_from_folders(tmp_path / "a.mp4", [tmp_path], 2, Fraction(12)),
    ):
        with pytest.raises(DamagedError, match=r"00001\.png"):
            read()


def test_canny_finds_the_outline(clip_frames):
    edges = detect_canny(clip_frames, 100, 200)
    assert edges.shape == clip_frames.shape and set(np.unique(edges)) == {0, 255}
    assert edges[0, 20:44, 7:10].any() and not edges[0, 50:].any()
