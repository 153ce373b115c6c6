"""The sound of videos: cut to the frames that are used, and there at the right time."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
from test_cli import last_line, run
from videos import store_turned, turn

from tokenflow.inversion.frames import FrameChoice
from tokenflow.video.read import decode_frames, mean_rate
from tokenflow.video.sound import keep_sound
from tokenflow.video.write import write_video

RATE = 44_100
LOW, HIGH = 440, 1000  # Hz
N_FRAMES, FPS = 24, 12
CODECS = {  # by the container: what is written, and what comes out
    "a.mp4": ("aac", "aac"),
    "a.ts": ("aac", "aac"),  # with headers that mp4 does without
    "mp3.mkv": ("libmp3lame", "mp3"),
    "mp3.avi": ("libmp3lame", "mp3"),
    "opus.mkv": ("libopus", "opus"),
    "ac3.mov": ("ac3", "ac3"),
    "alac.mov": ("alac", "alac"),
    "pcm.mov": ("pcm_s16le", "aac"),
    "mp2.mkv": ("mp2", "aac"),
}


def make_tones(n_channels=1, seconds=2, rate=RATE):
    """A low tone, and from the middle on a high one: float32 (channels, samples)."""
    time = np.arange(round(seconds * rate)) / rate
    pitch = np.where(time < seconds / 2, LOW, HIGH)
    tones = 0.5 * np.sin(2 * np.pi * pitch * time)
    return np.stack([tones] * n_channels).astype(np.float32)


def write_with_sound(path, codec, frames, tones, times=None, late=0, broken=()):
    """Write a video whose frames are shown at `times`, and whose sound begins `late` seconds after the first.

    broken: the packets of the sound that are noise.
    """
    rate = 48_000 if codec == "libopus" else RATE
    layout = "stereo" if len(tones) == 2 else "mono"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=1000)
        video.height, video.width = frames.shape[1:3]
        sound = container.add_stream(codec, rate=rate, layout=layout)
        for frame, time in zip(frames, times or np.arange(len(frames)) / FPS, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = round(1000 * time)
            container.mux(video.encode(picture))
        container.mux(video.encode())
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        whole = av.AudioFrame.from_ndarray(tones, format="fltp", layout=layout)
        whole.sample_rate, whole.pts, whole.time_base = RATE, round(late * RATE), Fraction(1, RATE)
        rng, n_packets = np.random.default_rng(0), -1
        for frame in [*resampler.resample(whole), None]:
            for packet in sound.encode(frame):
                if (n_packets := n_packets + 1) in broken:
                    noise = av.Packet(rng.bytes(packet.size))
                    noise.pts, noise.dts, noise.time_base = packet.pts, packet.dts, packet.time_base
                    noise.duration, noise.stream = packet.duration, packet.stream
                    packet = noise
                container.mux(packet)


def hear(path):
    """The codec of a video's sound, and the shares of the low and the high tone in each tenth of a second."""
    with av.open(str(path)) as container:
        pictures, stream = container.streams.video[0], container.streams.audio[0]
        first = float(pictures.start_time * pictures.time_base)
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
        samples, start = [], None
        for frame in container.decode(stream):
            start = frame.time - first if start is None else start
            samples += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        name = stream.codec.canonical_name
    late = round(start * RATE)  # after the first picture, or before it
    whole = np.concatenate([np.zeros(max(0, late)), *samples])[max(0, -late) :]
    tenths = whole[: len(whole) // (RATE // 10) * (RATE // 10)].reshape(-1, RATE // 10)
    spectra = np.abs(np.fft.rfft(tenths * np.hanning(RATE // 10)))  # in steps of 10 Hz
    shares = spectra / np.maximum(spectra.sum(1, keepdims=True), 1e-6)
    return name, shares[:, LOW // 10], shares[:, HIGH // 10]


@pytest.fixture(scope="module")
def frames():
    return np.zeros((N_FRAMES, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("name", CODECS)
def test_sound_is_cut_to_the_frames(tmp_path, frames, name):
    """Frames 6 to 17 of 24 are used: the low tone sounds for the half of them, and then the high one."""
    codec, expected = CODECS[name]
    write_with_sound(tmp_path / name, codec, frames, make_tones())
    keep_sound(tmp_path / name, tmp_path / "sound.m4a", Fraction(6, FPS), Fraction(18, FPS))
    write_video(tmp_path / "edited.mp4", frames[:12], FPS, tmp_path / "sound.m4a")
    found, low, high = hear(tmp_path / "edited.mp4")
    assert found == expected and 9 <= len(low) <= 10
    assert low[:5].min() > 0.4 and high[6:9].min() > 0.4
    _, low_before, high_before = hear(tmp_path / name)
    assert np.abs(low[:9] - low_before[5:14]).max() < 0.05
    assert np.abs(high[:9] - high_before[5:14]).max() < 0.05
    with av.open(str(tmp_path / "edited.mp4")) as container:
        assert container.duration == av.time_base  # no longer than the pictures


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sound_that_begins_late_and_in_stereo(tmp_path, frames, codec):
    write_with_sound(tmp_path / "a.mov", codec, frames, make_tones(n_channels=2), late=0.5)
    keep_sound(tmp_path / "a.mov", tmp_path / "sound.m4a", Fraction(0), Fraction(2))
    write_video(tmp_path / "edited.mp4", frames, FPS, tmp_path / "sound.m4a")
    _, low, high = hear(tmp_path / "edited.mp4")
    assert np.flatnonzero(low > 0.4).tolist() == [*range(5, 15)]
    assert np.flatnonzero(high > 0.4).tolist() == [*range(15, len(high))] and len(high) >= 19
    with av.open(str(tmp_path / "edited.mp4")) as container:
        assert container.streams.audio[0].channels == 2


def test_without_sound_there_is_none(tmp_path, clip, frames):
    (tmp_path / "folder").mkdir()
    write_with_sound(tmp_path / "short.mp4", "aac", frames, make_tones(seconds=1))
    starts = {clip: 0, tmp_path / "folder": 0, tmp_path / "short.mp4": Fraction(3, 2)}
    for source, start in starts.items():
        keep_sound(source, tmp_path / "sound.m4a", start, Fraction(1))
        assert not (tmp_path / "sound.m4a").exists()
    write_video(tmp_path / "edited.mp4", frames, FPS, tmp_path / "sound.m4a")
    with av.open(str(tmp_path / "edited.mp4")) as container:
        assert not container.streams.audio


@pytest.mark.parametrize("fps, is_kept", [(None, True), (12, True), (24, False)])
def test_sound_is_left_out_at_another_speed(tmp_path, frames, caplog, fps, is_kept):
    caplog.set_level("INFO")
    write_with_sound(tmp_path / "a.mp4", "aac", frames, make_tones())
    choice = FrameChoice(H=64, W=64, resize="crop", start_frame=12, stride=2, fps=fps)
    rate = mean_rate(choice.times(tmp_path / "a.mp4", 6))
    choice.write_sound(tmp_path / "a.mp4", tmp_path / "sound.m4a", 6, rate)
    assert rate == (fps or FPS) / 2 and (tmp_path / "sound.m4a").exists() == is_kept
    assert ("the sound is left out" in caplog.text) != is_kept


BROKEN = {"a.mp4": "aac", "ac3.mkv": "ac3", "mp2.mkv": "mp2"}


@pytest.mark.parametrize("name", [*BROKEN, "unknown.mp4"])
def test_broken_sound_is_left_out(tmp_path, frames, caplog, name):
    broken = () if name == "unknown.mp4" else range(1000)
    path = tmp_path / name
    write_with_sound(path, BROKEN.get(name, "aac"), frames, make_tones(), broken=broken)
    if not broken:
        path.write_bytes(path.read_bytes().replace(b"mp4a", b"????").replace(b"esds", b"????"))
    keep_sound(path, tmp_path / "sound.m4a", Fraction(0), Fraction(2))
    assert not (tmp_path / "sound.m4a").exists()
    assert f"{path}: its sound cannot be read" in caplog.text


@pytest.mark.parametrize("codec", ["aac", "mp2"])
def test_sound_with_broken_pieces(tmp_path, frames, codec):
    write_with_sound(tmp_path / "a.mkv", codec, frames, make_tones(), broken=[0, 1, 20])
    keep_sound(tmp_path / "a.mkv", tmp_path / "sound.m4a", Fraction(1, 2), Fraction(3, 2))
    write_video(tmp_path / "edited.mp4", frames[:18], FPS, tmp_path / "sound.m4a")
    with av.open(str(tmp_path / "edited.mp4")) as container:
        assert container.streams.audio[0].duration > 0


@pytest.mark.parametrize(
    "options, start, fps, no_sound",
    [([], 0, 4, ["--sound", "false"]), (["--start_frame", 1, "--stride", 2], 0.2, 1.9, [])],
)
def test_a_phones_video_through_both_stages(tmp_path, checkpoint, options, start, fps, no_sound):
    """It is turned, wide, of variable rate, and has sound."""
    frames = np.full((8, 72, 128, 3), (90, 110, 130), np.uint8)
    frames[:, :, :32] = (220, 40, 40)  # red at the left
    frames[:, :16, 32:] = (40, 200, 60)  # green above
    times = [0, 0.2, 0.5, 0.7, 1, 1.3, 1.5, 1.75]
    write_with_sound(tmp_path / "phone.mov", "aac", store_turned(frames), make_tones(), times)
    turn(tmp_path / "phone.mov")
    flags = ["--data_path", "phone.mov", "--model", checkpoint, "--n_frames", 0]
    invert = [*flags, "--H", "auto", "--W", 128, "--steps", 2, "--save_steps", 2, *options]
    inverted = tmp_path / last_line(run("preprocess.py", *invert, cwd=tmp_path))
    config = json.loads(inverted.with_name("manifest.json").read_text())["config"]
    assert (config["H"], config["W"]) == (64, 128)
    (tmp_path / "phone.mov").unlink()  # an edit needs no more of it than the inversion has
    edit = [*flags, "--n_inversion_steps", 2, "--n_timesteps", 2, "--prompt", "a blue square"]
    edited = tmp_path / last_line(run("run_tokenflow_sdedit.py", *edit, cwd=tmp_path))
    source = next(decode_frames(edited.with_name("comparison.mp4")))[:, :128]
    assert source[32, 8].argmax() == 0 and source[8, 80].argmax() == 1  # upright
    for video in (inverted, edited, edited.with_name("comparison.mp4")):
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            assert abs(stream.average_rate - fps) < 0.1
            assert abs(container.duration / av.time_base - stream.frames / fps) < 0.1
        codec, low, high = hear(video)
        turning = round(10 * (1 - start))
        assert codec == "aac" and low[:turning].min() > 0.4 and high[turning + 1 : 17].min() > 0.4
    # Sound that is damaged is left out with a warning, but not looked at if none is wanted.
    inverted.with_name("sound.m4a").write_bytes(b"")
    silently = run("run_tokenflow_sdedit.py", *edit, "--overwrite", *no_sound, cwd=tmp_path)
    with av.open(str(tmp_path / last_line(silently))) as container:
        assert not container.streams.audio
    assert ("sound.m4a is damaged" in silently.stderr) == (not no_sound)
