"""Written videos: their colours, as FFmpeg and a browser show them, and the same bytes everywhere."""

import base64
import os

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from test_report import launch_chromium, needs_chromium

from tokenflow.video.write import write_video

BT709, LIMITED = 1, 1  # as FFmpeg and ISO/IEC 23091-2 number them
SIZES = 512, 720, 1024
PATCHES = [
    *((200, 30, 30), (30, 180, 40), (40, 50, 200), (220, 210, 40)),
    *((30, 200, 200), (200, 40, 190), (128, 128, 128), (235, 235, 235)),
    *((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)),
    *((255, 255, 255), (0, 0, 0), (16, 16, 16), (250, 5, 250)),
]
# FFmpeg's default is quick, and wrong by up to seven levels whatever the video.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


def draw_patches(size):
    """Sixteen patches of one colour each."""
    rows = np.reshape(PATCHES, (4, 4, 3)).astype(np.uint8)
    return rows.repeat(size // 4, 0).repeat(size // 4, 1)


def draw_gradients(size):
    """All of red, green and blue, in smooth gradients; 4:2:0 would blur single pixels."""
    y, x = np.mgrid[:size, :size] / size
    return np.stack([255 * x, 255 * y, 128 + 127 * np.sin(3 * x + 2 * y)], -1).astype(np.uint8)


def check_colours(shown, size):
    """Both pictures are shown within two levels, except at edges and in what crf 12 rounds away."""
    patches, gradients = (frame.astype(int) for frame in shown)
    inside = np.abs(patches - draw_patches(size)).reshape(4, size // 4, 4, size // 4, 3)
    assert inside[:, 16:-16, :, 16:-16].max() <= 2
    assert np.percentile(np.abs(gradients - draw_gradients(size)), 99) <= 2


@pytest.fixture(scope="module", params=SIZES)
def colours(request, tmp_path_factory):
    """A video of both pictures, and its size."""
    path, size = tmp_path_factory.mktemp("colours") / "colours.mp4", request.param
    write_video(path, [draw_patches(size), draw_gradients(size)], 12)
    return path, size


def test_ffmpeg_shows_the_colours_that_were_written(colours):
    path, size = colours
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        stream = container.streams.video[0].codec_context
    for tagged in (stream, frames[0]):
        tags = tagged.colorspace, tagged.color_primaries, tagged.color_trc
        assert (*tags, tagged.color_range) == (BT709, BT709, BT709, LIMITED)
    # Players that do not look into the stream read the container's box: two bytes each, and no full range.
    assert b"colrnclx\0\1\0\1\0\1\0" in path.read_bytes()
    check_colours([f.to_ndarray(format="rgb24", interpolation=EXACT) for f in frames], size)


SHOW_FRAMES = """
const [source, count, done] = arguments, shown = [];
const video = Object.assign(document.createElement("video"), { muted: true, src: source });
const canvas = document.createElement("canvas");
video.onerror = () => done(video.error.message);
document.body.append(video);
const read = () => {
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0);
  shown.push(canvas.toDataURL("image/png"));
  if (shown.length === count) return done(shown);
  video.requestVideoFrameCallback(read);
  video.currentTime = 1.5 / 12;
};
video.requestVideoFrameCallback(read);
video.currentTime = 0.5 / 12;
"""


@pytest.fixture(scope="module")
def browser():
    # Without a GPU's shaders, Chromium converts by libyuv, whose factor for blue in BT.709 is 2, not 2.11.
    driver = launch_chromium("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@needs_chromium
def test_a_browser_shows_the_colours_that_were_written(colours, browser):
    path, size = colours
    source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    shown = browser.execute_async_script(SHOW_FRAMES, source, 2)
    assert isinstance(shown, list), shown
    images = [np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8) for url in shown]
    check_colours([cv2.imdecode(image, cv2.IMREAD_COLOR)[..., ::-1] for image in images], size)


def test_the_same_frames_give_the_same_file(tmp_path):
    rng = np.random.default_rng(0)
    still = rng.integers(20, 236, (64, 8, 3)).repeat(8, 0).repeat(8, 1)
    moving = np.stack([np.roll(still, 3 * index, axis=1) for index in range(13)])
    noise = (moving + rng.integers(-20, 20, moving.shape)).astype(np.uint8)
    files, held, cores = set(), [], os.sched_getaffinity(0)
    for size in rng.integers(100, 100_000, 20):
        held.append(rng.bytes(size))  # gives the encoder other memory each time
        os.sched_setaffinity(0, {min(cores)} if len(held) % 2 else cores)
        write_video(tmp_path / "a.mp4", noise, 12)
        files.add((tmp_path / "a.mp4").read_bytes())
    os.sched_setaffinity(0, cores)
    assert len(files) == 1
