"""Videos as people have them are read as a player shows them. tests/cases/README.txt describes the files."""

import logging
import shutil
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from test_write import PATCHES as ALL_PATCHES
from videos import turn, write_frames

import util
from tokenflow.config import PreprocessConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.editing.mask import read_mask
from tokenflow.errors import UserError
from tokenflow.inversion.frames import FrameChoice, choose_size, find_frame_rate
from tokenflow.video.read import decode_frames, frame_rate, mean_rate, read_times

CASES = Path(__file__).parent / "cases"
PATCHES = np.array(ALL_PATCHES[:8])


def draw(index: int) -> np.ndarray:
    """Frame `index` of the picture that the cases show."""
    frame = np.full((96, 96, 3), (90, 110, 130), np.uint8)
    frame[:24] = (40, 200, 60)
    frame[:, :24] = (220, 40, 40)
    frame[48:72, 48:72] = 20 + 14 * index
    return frame


def assert_alike(frames, expected, levels=8) -> None:
    """Assert that frames differ by at most so many grey levels away from edges, where codecs ring."""
    frames, expected = np.stack(list(frames)), np.stack(list(expected))
    assert frames.shape == expected.shape and frames.dtype == np.uint8
    inner = np.abs(frames.astype(int) - expected)[:, 4::8, 4::8]
    assert inner.max() <= levels and inner.mean() < 1.5


def patches_of(frame: np.ndarray) -> np.ndarray:
    """The mean colours of the eight patches of a frame, in reading order."""
    height, width = frame.shape[0] // 2, frame.shape[1] // 4
    rows = frame.reshape(2, height, 4, width, 3).swapaxes(1, 2).reshape(8, height, width, 3)
    return rows[:, height // 4 : -height // 4, width // 4 : -width // 4].mean((1, 2))


def choice(**options) -> FrameChoice:
    defaults = {"H": 64, "W": 64, "resize": "crop", "start_frame": 0, "stride": 1}
    return FrameChoice(**defaults | options)


@pytest.mark.parametrize(
    "name, count",
    [("plain.mp4", 16), ("cover_first.mkv", 16), ("still_track_first.mov", 16), ("anim.webp", 8)],
)
def test_frames_and_their_rate(name, count):
    """The stream that moves is read, whichever stands first."""
    assert_alike(decode_frames(CASES / name), [draw(index) for index in range(count)])
    assert frame_rate(CASES / name) == (10 if name == "anim.webp" else 12)


def test_sound_with_a_cover_is_no_video(tmp_path):
    with av.open(str(CASES / "cover_first.mkv")) as source, av.open(tmp_path / "a.mp3", "w") as to:
        sound = to.add_stream("libmp3lame", rate=44100)
        cover = to.add_stream_from_template(source.streams.video[0])
        cover.disposition = source.streams.video[0].disposition
        packet = next(source.demux(video=0))
        packet.stream = cover
        to.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        to.mux(sound.encode(silence))
        to.mux(sound.encode())
    with pytest.raises(UserError, match="holds no video"):
        next(decode_frames(tmp_path / "a.mp3"))


def test_whole_display_matrix():
    plain = np.stack(list(decode_frames(CASES / "plain.mp4")))
    assert np.array_equal(np.stack(list(decode_frames(CASES / "hflip.mp4"))), plain[:, :, ::-1])
    assert np.array_equal(np.stack(list(decode_frames(CASES / "vflip.mp4"))), plain[:, ::-1])


@pytest.mark.parametrize("a, b, c, d", [(0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (-1, 0, 0, -1)])
def test_turned_and_mirrored(tmp_path, a, b, c, d):
    """The point (x, y) of what is stored is shown at (a x + c y, b x + d y)."""
    turned = Path(shutil.copy(CASES / "plain.mp4", tmp_path))
    turn(turned, a, b, c, d)
    x, y = np.meshgrid(np.arange(96), np.arange(96))
    both = decode_frames(CASES / "plain.mp4"), decode_frames(turned)
    for stored, shown in zip(*both, strict=True):
        assert shown.flags.c_contiguous  # as torch needs it
        # A negative index counts from the other side, as a mirrored picture does.
        shown_y, shown_x = (b * x + d * y - (b + d < 0)) % 96, (a * x + c * y - (a + c < 0)) % 96
        assert np.array_equal(shown[shown_y, shown_x], stored)


def test_rate_of_the_frames_used(caplog):
    """A screen recording: 40 frames in two thirds of a second, then one every two seconds."""
    with caplog.at_level(logging.INFO):
        used = choice().times(CASES / "screen.mp4", 40)
        assert find_frame_rate(CASES / "screen.mp4", used) == 60 and not caplog.records
        every = choice().times(CASES / "screen.mp4", 0)
        assert len(every) == 50 and 2 < find_frame_rate(CASES / "screen.mp4", every) < 3
    assert "frame rate varies, frames are 0.0167 to 2.02 s apart" in caplog.text
    assert mean_rate(choice(stride=2, start_frame=1).times(CASES / "screen.mp4", 19)) == 30
    assert mean_rate(choice(fps=29.97).times(CASES / "screen.mp4", 0)) == Fraction("29.97")


def test_rate_is_what_rounded_time_stamps_mean(tmp_path):
    """Matroska rounds to milliseconds; raw DV calls itself 60,000 frames per second."""
    ntsc = Fraction(30000, 1001)
    for name, codec, pixels, size in (
        ("a.mkv", "libx264", "yuv420p", (64, 64)),
        ("a.dv", "dvvideo", "yuv411p", (480, 720)),
    ):
        frames = [np.full((*size, 3), 40 + index, np.uint8) for index in range(5)]
        write_frames(tmp_path / name, frames, codec, pixels, rate=ntsc)
        assert frame_rate(tmp_path / name) == ntsc


def test_a_folder_plays_as_fast_as_it_is_told(tmp_path):
    util.save_frames(tmp_path, 0, [draw(index) for index in range(3)])
    for name in (".00003.png", "._00003.png"):  # of file managers
        (tmp_path / name).write_bytes(b"no image")
    assert len(list(decode_frames(tmp_path))) == 3 and frame_rate(tmp_path) == 24
    assert mean_rate(list(read_times(tmp_path, Fraction(15)))) == 15


def test_pixels_become_square(tmp_path):
    """Of 96x96 pixels, 171x96 square ones: the bars keep their shares."""
    frames = list(decode_frames(CASES / "sar.mp4"))
    wide = [cv2.resize(draw(index), (171, 96)) for index in range(16)]
    assert_alike(frames, wide, levels=25)
    write_frames(
        tmp_path / "narrow.mp4", [draw(0)], "libx264", "yuv444p", pixel_shape=Fraction(1, 2)
    )
    assert next(decode_frames(tmp_path / "narrow.mp4")).shape == (192, 96, 3)


def test_colours_of_hdr_and_of_hd(caplog):
    """Within two levels on the mean of a patch; SD of no tags stays BT.601."""
    with caplog.at_level(logging.INFO):
        for frame in decode_frames(CASES / "hdr_pq.mp4"):
            assert np.abs(patches_of(frame) - PATCHES).max() <= 2.1
    assert caplog.text.count("high dynamic range will become BT.709") == 1
    for frame in decode_frames(CASES / "untag_709_720p.mp4"):
        assert np.abs(patches_of(frame) - PATCHES).max() <= 2.1


def test_hlg_of_a_phone(tmp_path):
    """White of 203 cd/m2 and the colours of BT.709, in HLG by the formulas of BT.2100; four levels."""
    to_bt2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    luma = np.array([0.2627, 0.6780, 0.0593])
    light = (PATCHES / 255) ** 2.4 @ np.transpose(to_bt2020) * 203 / 1000
    scene = light * (light @ luma)[:, None] ** (-0.2 / 1.2)
    curve = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), curve)
    y = signal @ luma
    cb, cr = (signal[:, 2] - y) / 1.8814, (signal[:, 0] - y) / 1.4746
    stored = 64 * np.stack([64 + 876 * y, 512 + 896 * cb, 512 + 896 * cr]).round()
    picture = stored.astype(np.uint16).T.reshape(2, 4, 3).repeat(64, 0).repeat(32, 1)
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 128, 128, "yuv444p16le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = 9, 18, 9
        frame = av.VideoFrame.from_ndarray(picture, format="yuv444p16le")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.abs(patches_of(next(decode_frames(tmp_path / "a.mkv"))) - PATCHES).max() <= 4


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.mpg", "mpeg2video", {"flags": "+ilme+ildct", "b": "3M"}),
        ("a.mp4", "libx264", {"x264-params": "bff=1", "crf": "5"}),
    ],
)
def test_interlaced_frames_have_no_comb(tmp_path, caplog, name, codec, options):
    """A bar moves by four pixels from field to field; each frame becomes its first field."""
    fields = np.full((20, 96, 128, 3), 60, np.uint8)
    for index, field in enumerate(fields):
        field[20:80, 8 + 4 * index : 32 + 4 * index] = 220
    frames = fields[::2].copy()
    frames[:, ::2] = fields[1::2, ::2]  # the lower field is the first
    write_frames(tmp_path / name, frames, codec, "yuv420p", rate=25, **options)
    with caplog.at_level(logging.INFO):
        read = np.stack(list(decode_frames(tmp_path / name))).astype(int)
    assert caplog.text.count("it is interlaced, and will be deinterlaced") == 1
    assert read.shape == frames.shape and np.abs(read - fields[::2]).mean() < 1
    assert np.abs(frames.astype(int) - fields[::2]).mean() > 3


def test_transparency_is_white_and_in_masks_black(tmp_path):
    lower = np.stack(list(decode_frames(CASES / "plain.mp4")))
    lower[:, :48] = 255
    assert_alike(decode_frames(CASES / "alpha.mov"), lower)
    # Nothing but yellow on white, though blue is hidden under full transparency.
    for frame in decode_frames(CASES / "sprite.apng"):
        colours = np.unique(frame.reshape(-1, 3), axis=0)
        assert np.array_equal(colours, [(255, 200, 0), (255, 255, 255)])
    picture = np.dstack([draw(0), np.full((96, 96), 255, np.uint8)])
    picture[:48, :, 3] = 0
    write_frames(tmp_path / "a.webm", [picture], "libvpx-vp9", "yuva420p")
    assert_alike(decode_frames(tmp_path / "a.webm"), [np.vstack([lower[0, :48], draw(0)[48:]])])
    (tmp_path / "images").mkdir()
    pixels = np.full((64, 64, 4), (255, 255, 255, 0), np.uint8)
    pixels[16:32, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    assert (util.read_image(tmp_path / "images" / "0.png") == 255).all()
    (mask,) = read_mask(tmp_path / "images", choice(), 1)
    assert np.array_equal(mask, pixels[..., 3] > 0)
    (mask,) = read_mask(CASES / "alpha.mov", choice(H=96, W=96), 1)
    assert not mask[:48].any()


def test_a_broken_frame_is_left_out(tmp_path, caplog):
    shutil.copy(CASES / "broken_mid.avi", tmp_path)
    video = tmp_path / "broken_mid.avi"
    whole = [draw(index) for index in range(16) if index != 5]
    assert_alike(decode_frames(video), whole)
    assert len(choice().times(video, 0)) == 15
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "broken_mid.avi: frame 5 at 0.42 s is broken and left out" in record.message
    choice().write(video, tmp_path / "frames", 15)
    with pytest.raises(UserError, match="there are only 15 frames"):
        choice().write(video, tmp_path / "frames", 16)


def test_nothing_else_is_touched():
    """Frames of square pixels in SD, of whatever tags, are FFmpeg's to the bit."""
    for name in ("plain.mp4", "screen.mp4", "cover_first.mkv"):
        with av.open(str(CASES / name)) as container:
            stream = container.streams.best("video")
            stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert np.array_equal(np.stack(list(decode_frames(CASES / name))), np.stack(stored))


def config(video, **options) -> PreprocessConfig:
    return PreprocessConfig(data_path=str(video), model="tiny", **options)


def test_auto_keeps_the_aspect_ratio(tmp_path, checkpoint):
    """At the number of pixels of the training, or by one side that is given."""
    found = Checkpoint.find(str(checkpoint))
    wide, high = tmp_path / "wide", tmp_path / "high"
    for folder, shape in ((wide, (90, 160, 3)), (high, (160, 90, 3))):
        folder.mkdir()
        util.write_image(folder / "0.png", np.zeros(shape, np.uint8))
    assert choose_size(config(wide), found) == (512, 512)
    assert choose_size(config(wide, H=None), found) == (384, 704)
    assert choose_size(config(high, W=None), found) == (704, 384)
    assert choose_size(config(wide, H=None, W=1024), found) == (576, 1024)
    assert choose_size(config(wide, H=64, W=None), found) == (64, 128)
    with pytest.raises(UserError, match="H: 70 is not a multiple of 64"):
        choose_size(config(wide, H=70, W=None), found)
