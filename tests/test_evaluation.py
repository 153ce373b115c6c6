"""evaluate.py: its metrics against truths that are known, its verdict, its report, and what it refuses."""

import csv
import json
import shutil
import sys
from collections import Counter
from glob import glob
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_tiny_clip, build_tiny_dino
from test_cli import edit_flags, last_line, refusal, run
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, ViTModel

import util
from benchmarks.flow import accuracy
from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.editing.subjects import find_subjects
from tokenflow.evaluation import meters, networks
from tokenflow.evaluation.contact_sheet import LABEL_HEIGHT, contact_sheet
from tokenflow.evaluation.evaluate import joint_folder
from tokenflow.evaluation.meters import METRICS, AlongFlow, BesideSource, Drift, summarize
from tokenflow.evaluation.report import write_table
from tokenflow.evaluation.subject import EDIT, PER_FRAME, RECONSTRUCTION, SOURCE, VAE
from tokenflow.evaluation.verdict import FAIR, GOOD, POOR, verdict
from tokenflow.motion.optical_flow import DenseInverseSearch, NetworkFlow, find_consistent
from tokenflow.video import read as video_read
from tokenflow.video.read import decode_frames, frame_rate
from tokenflow.video.write import write_video

CPU = torch.device("cpu")


def curves_of(*of, **videos):
    """The curves of videos, by what they are, the source first."""
    measured = meters.measure(np.stack([*videos.values()], axis=1), of)
    return meters.name_curves(measured, {name: i for i, name in enumerate(videos)})


@pytest.fixture(scope="module")
def pattern():
    """A picture with detail at every scale: uint8 (96, 96, 3)."""
    rng = np.random.default_rng(0)
    waves = [
        np.kron(rng.integers(0, 256, (n, n, 3)), np.ones((96 // n,) * 2 + (1,)))
        for n in (6, 12, 24)
    ]
    return np.mean(waves, axis=0).astype(np.uint8)


def test_flow_and_where_it_is_valid(pattern):
    """A picture that moves 3 pixels to the right: its last 3 columns leave the frame."""
    moved = np.roll(pattern, 3, axis=1)
    moved[:, :3] = 0
    flow, valid = DenseInverseSearch().find_valid(pattern, moved)
    assert np.abs(flow[10:-10, 10:-10] - (3, 0)).mean() < 0.1
    assert valid[10:-10, 10:-10].mean() > 0.98 and not valid[:, -2:].any()
    # Flows that do not lead back are valid nowhere; without motion everything is.
    right = np.full((8, 8, 2), (2.0, 0.0), np.float32)
    assert not find_consistent(right, right).any()
    assert find_consistent(0 * right, 0 * right).all()
    assert find_consistent(right, -right).sum() == 8 * 6


def test_a_network_gets_frames_that_it_takes():
    """RAFT takes sides of at least 128 pixels that are multiples of 8, and values in [-1, 1]."""

    def network(first, second):
        assert first.shape == second.shape == (1, 3, 128, 144)
        assert first.min() == -1 and second.max() == 1
        return [None, torch.ones(1, 2, 128, 144)]

    black, white = np.zeros((90, 140, 3), np.uint8), np.full((90, 140, 3), 255, np.uint8)
    assert NetworkFlow(network, CPU).find(black, white).shape == (90, 140, 2)


def test_metrics_of_a_still_video(pattern):
    """The source stands still; the edit is alternately 3 grey levels brighter and darker."""
    source = np.stack([np.clip(pattern, 10, 240)] * 10)
    edit = source + np.uint8([253, 3] * 5)[:, None, None, None]
    of = AlongFlow(DenseInverseSearch()), BesideSource(), Drift(2, 10)
    curves = curves_of(*of, source=source, edit=edit)
    assert {len(curve) for by_name in curves.values() for curve in by_name.values()} == {10}
    metrics = summarize(curves, 2)
    assert metrics["flicker"] == {SOURCE: 0, EDIT: pytest.approx(6)}
    assert metrics["warp_1"][EDIT] == pytest.approx(1e3 * (6 / 255) ** 2)
    assert metrics["warp_4"][EDIT] == metrics["warp_8"][EDIT] == metrics["warp_8"][SOURCE] == 0
    assert curves["warp_4"][EDIT][:4] == [None] * 4 and curves["warp_4"][EDIT][4] is not None
    assert metrics["psnr"] == {EDIT: pytest.approx(20 * np.log10(255 / 3), abs=1e-3)}
    assert metrics["sharpness"][EDIT] == pytest.approx(1)
    assert metrics["drift"][EDIT] == pytest.approx(3)  # from the mean of one frame of each kind
    equal = summarize(curves_of(BesideSource(), source=source, edit=source), 2)
    assert equal["psnr"][EDIT] == 100 and equal["ssim"][EDIT] == pytest.approx(1)


def test_colours_that_drift_and_detail_that_is_lost(pattern):
    source = np.stack([np.clip(pattern, 0, 200)] * 20)
    rising = np.arange(20, dtype=np.uint8)[:, None, None, None]
    redder = source + rising * np.uint8([2, 0, 0])
    metrics = summarize(curves_of(Drift(5, 20), source=source, edit=redder), 5)
    # From the first five frames to the last: 15 frames of 2 levels, in one of three channels.
    assert metrics["drift"] == pytest.approx({SOURCE: 0, EDIT: 30 / np.sqrt(3)}, abs=1e-6)
    plain = np.full_like(source, 90)
    assert set(curves_of(BesideSource(), source=source, edit=plain)["sharpness"][EDIT]) == {0}
    # Regions that move, or change in the source, are not still.
    moving = np.stack([np.roll(pattern, 2 * i, axis=1) for i in range(4)])
    for video in (moving, (source + 5 * rising)[:4]):
        assert not curves_of(AlongFlow(DenseInverseSearch()), source=video, edit=video)["flicker"]


def test_warp_errors_are_close_to_those_of_the_exact_flow():
    """On shapes, whose flow is known: docs/evaluation.md says how far the estimate can be trusted."""
    rows = accuracy(n_clips=2, n_frames=10, gaps=(1, 8))
    assert len(rows) == 4
    for row in rows:
        assert row["endpoint error"] < (0.5 if row["gap"] == 1 else 2)
        assert row["not visible in both"] < 0.05
        # An edit that flickers is told from one that does not, and by nearly as much as in truth.
        gained = row["flickering, dis"] - row["ideal, dis"]
        assert gained == pytest.approx(row["flickering, exact"] - row["ideal, exact"], rel=0.25)


@pytest.fixture(scope="module")
def models(tmp_path_factory, checkpoint):
    """Folders of a tiny CLIP and of a tiny vision transformer, of random weights."""
    folder = tmp_path_factory.mktemp("models")
    return build_tiny_clip(folder / "clip", checkpoint), build_tiny_dino(folder / "dino")


def test_clip_agrees_with_transformers_own(models, pattern):
    clip, prompt = str(models[0]), "a red circle"
    frames = np.stack([pattern[:32, :32], pattern[40:72, 40:72]])  # as large as the model's images
    curves = curves_of(networks.Clip(clip, prompt, CPU), source=frames, edit=frames[::-1])
    model, tokenizer = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    mean, std = map(torch.tensor, (networks.OPENAI_CLIP_MEAN, networks.OPENAI_CLIP_STD))
    pixels = ((torch.from_numpy(frames) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        output = model(pixel_values=pixels, **tokenizer(prompt, return_tensors="pt"))
    expected = ((output.image_embeds @ output.text_embeds.T)[:, 0] * 100).tolist()
    assert curves["clip_prompt"][SOURCE] == pytest.approx(expected, abs=1e-3)
    assert curves["clip_prompt"][EDIT] == pytest.approx(expected[::-1], abs=1e-3)
    neighbours = 100 * float(output.image_embeds[0] @ output.image_embeds[1])
    assert curves["clip_frames"][EDIT] == [None, pytest.approx(neighbours, abs=1e-3)]


def test_structure_distance(models, pattern):
    """Against self-similarities that are computed from the last layer's input."""
    dino, other = str(models[1]), pattern[::-1]
    structure = networks.Structure(dino, CPU)
    curves = curves_of(structure, source=[pattern], vae=[pattern], edit=[other])
    network = ViTModel.from_pretrained(dino)
    means = networks.IMAGENET_DEFAULT_MEAN, networks.IMAGENET_DEFAULT_STD
    images = networks.as_images(np.stack([pattern, other]), 32, "stretch", *means)
    with torch.inference_mode():
        before = network(images, output_hidden_states=True).hidden_states[-2]
        keys = network.layers[-1].attention.k_proj(network.layers[-1].layernorm_before(before))
        alike = F.cosine_similarity(keys[:, :, None], keys[:, None], dim=-1)
    expected = 1e3 * (alike[0] - alike[1]).square().mean().item()
    assert curves["structure"][VAE] == [0] and expected > 1
    assert curves["structure"][EDIT] == [pytest.approx(expected, rel=1e-3)]


def test_lpips_gets_each_video_beside_the_source(monkeypatch):
    taken = []

    def make(net, verbose):
        network = torch.nn.Module()
        network.forward = lambda a, b: taken.append((a, b)) or torch.zeros(len(a))
        return network

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=make))
    black, white = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    for device in (CPU, torch.device("meta")):
        curves = curves_of(networks.Lpips(device), source=black, vae=black, edit=white)
        assert curves["lpips"] == {VAE: [0], EDIT: [0]}
        assert all(images.device == device for images in taken[-1])
    (others, source), _ = taken
    assert source.unique().tolist() == [-1] and others.flatten(1).mean(1).tolist() == [-1, 1]


def test_missing_networks_are_named(tmp_path):
    meters, skipped = networks.load_meters(str(tmp_path), None, None, CPU)
    assert not meters and len(skipped) == 4
    for words in (f"consistency: clip: the folder {tmp_path}", "dino names", "LPIPS", "no prompt"):
        assert any(words in line for line in skipped)


@pytest.mark.parametrize(
    "key, values, technique, level, words",
    [
        ("psnr", {VAE: 31.0, RECONSTRUCTION: 30.0}, None, GOOD, "30.0 dB"),
        ("psnr", {VAE: 19.5, RECONSTRUCTION: 19.0}, None, POOR, "larger frames"),
        ("psnr", {VAE: 30.0, RECONSTRUCTION: 22.0}, None, FAIR, "inversion_prompt"),
        ("warp_1", {SOURCE: 0.3, VAE: 0.4, EDIT: 0.9}, "pnp", GOOD, "5.7 grey levels"),
        ("warp_1", {SOURCE: 0.1, EDIT: 2.5}, "pnp", POOR, "Lower guidance_scale"),
        ("warp_1", {SOURCE: 0.1, EDIT: 2.5}, "sdedit", POOR, "lower start"),
        ("warp_1", {SOURCE: 0.1, EDIT: 2.5}, None, POOR, ""),
        ("warp_1", {SOURCE: 2.4, EDIT: 2.5}, None, GOOD, "2.6 grey"),  # a noisy source
        ("warp_1", {SOURCE: 2.4, EDIT: 2.4}, None, GOOD, "as steady as the source"),
        ("warp_8", {EDIT: 5.0, PER_FRAME: 10.0}, "pnp", FAIR, "50% of that of frame-by-frame"),
        ("sharpness", {VAE: 0.9, EDIT: 0.3}, "pnp", POOR, "33% of the sharpness of the VAE"),
        ("sharpness", {VAE: 0.9, PER_FRAME: 0.3, EDIT: 0.3}, "pnp", GOOD, "frame by frame"),
        ("drift", {SOURCE: 3.0, EDIT: 12.0}, "pnp", POOR, "Raise keyframe_window"),
        ("flicker", {SOURCE: 1.0, EDIT: 1.5}, "pnp", GOOD, "1.5 grey levels, 0.5 more"),
        ("clip_prompt", {SOURCE: 25.0, EDIT: 25.2}, "sdedit", POOR, "raise start"),
        ("clip_prompt", {SOURCE: 22.0, EDIT: 29.0}, "pnp", GOOD, "7.0 points higher"),
        ("structure", {EDIT: 120.0}, "controlnet", POOR, "raise control_scale"),
    ],
)
def test_verdict(key, values, technique, level, words):
    (finding,) = verdict({key: values}, technique)
    assert finding.level == level and words in f"{finding.text} {finding.advice}"
    assert bool(finding.advice) == (level != GOOD and (technique is not None or key == "psnr"))


@pytest.mark.parametrize("sharpness, level", [(0.3, POOR), (0.45, FAIR), (0.61, GOOD)])
def test_a_blurred_reconstruction(sharpness, level):
    """Edges that are softer alone are good, as in data/shapes.mp4, where all textures are there."""
    metrics = {"psnr": {RECONSTRUCTION: 26.0}, "sharpness": {RECONSTRUCTION: sharpness}}
    (finding,) = verdict(metrics)
    assert finding.level == level and f"{sharpness:.0%} of its sharpness" in finding.text


def test_what_is_poor_comes_first():
    metrics = {"sharpness": {EDIT: 0.9}, "drift": {EDIT: 4.0}, "flicker": {EDIT: 9.0}}
    assert [finding.level for finding in verdict(metrics)] == [POOR, FAIR, GOOD]


@pytest.fixture(scope="module")
def edited(tmp_path_factory, checkpoint, clip):
    """A folder with a clip, its inversion, and two edits of it in `out`, the second with a mask."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copy(clip, folder / "clip.mp4")
    flags = ["--data_path", "clip.mp4", "--model", checkpoint, "--H", 64, "--W", 64, "--steps", 5]
    flags += ["--save_steps", 5, "--n_frames", 7, "--keep_source", "false"]
    last_line(run("preprocess.py", *flags, cwd=folder))
    for prompt, more in {"a blue circle": [], "</script><b>a red circle": ["--mask", clip]}.items():
        edit = [*edit_flags(checkpoint, "pnp"), "--prompt", prompt, *more]
        last_line(run("run_tokenflow_pnp.py", *edit, cwd=folder))
    return folder


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('type="application/json">')[1].split("</script>")[0])


@pytest.fixture(scope="module")
def evaluated(edited, models):
    """What evaluate.py prints about both edits, and the folders that it read pictures from."""
    flags = ["--edits", "out/pnp_clip", "out/pnp_clip_2", "--clip", models[0], "--dino", models[1]]
    read, read_image = [], video_read.read_image

    def note(path, background):
        read.append(path.parent)
        return read_image(path, background)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_read, "read_image", note)
        # With one prompt they are measured together.
        return run("evaluate.py", *flags, "--prompt", "a circle", cwd=edited), read


def test_edits_are_measured_together(edited, evaluated):
    result, read = evaluated
    # Once for all edits, and once more for a video of them; of an edit the first for its size, and one ahead.
    assert sorted(Counter(read).values()) == [7, 9, 9, 14, 14]
    assert str(last_line(result)) == "out/report.html"
    assert result.stderr.count("Not measured: LPIPS") == 1
    assert "The reconstruction has" in result.stderr
    out, names = edited / "out", ["pnp_clip", "pnp_clip_2"]
    joint = page_data(out / "report.html")["entries"]
    assert [entry["name"] for entry in joint] == names
    for folder, entry in zip([out / name for name in names], joint, strict=True):
        (own,) = page_data(folder / "report.html")["entries"]
        written = json.loads((folder / "report" / "figures.json").read_text())
        assert own["figures"] == entry["figures"] == written["figures"]
        assert written["options"]["guidance_scale"] == 5
        assert set(own["figures"]) == set(METRICS) - {"lpips", "warp_8"}
        for kind in (SOURCE, VAE, RECONSTRUCTION, EDIT):
            assert kind in own["figures"]["warp_1"]
            for page, data in ((folder, own), (out, entry)):
                assert frame_rate(page / data["videos"][kind]) == 12
        # Everything again, straight from the frames.
        frames = util.load_frames(folder / "frames", range(7))
        source = np.stack([*decode_frames(folder / "report" / "source.mp4")])
        assert source.shape == frames.shape
        inversion = next((edited / "latents").glob("*/clip/*/*"))
        source = util.load_frames(inversion / "source", range(7))
        again = summarize(curves_of(BesideSource(), source=source, edit=frames), 12)
        assert own["figures"]["psnr"][EDIT] == pytest.approx(again["psnr"][EDIT], rel=1e-3)


def test_which_edits_a_pattern_names(edited, evaluated, monkeypatch):
    """The report that the first evaluation has left beside the edits is none; twice the same is one."""
    monkeypatch.chdir(edited)
    everything = sorted(glob("out/*"))
    assert everything[:2] == ["out/edits.csv", "out/edits.png"]
    everything += ["out/pnp_clip_2/", f"{edited}/out/pnp_clip_2"]
    subjects = find_subjects(EvaluateConfig(edits=tuple(everything)))
    assert [subject.name for subject in subjects] == ["pnp_clip", "pnp_clip_2"]
    refusal(run("evaluate.py", "--edits", "out", cwd=edited), "edits: out has", "its edits.csv")
    refusal(run("evaluate.py", "--edits", "out/edits.csv", cwd=edited), "not the folder of an edit")


def test_a_new_edit_discards_the_old_ones_report(edited, evaluated, checkpoint):
    edit = [*edit_flags(checkpoint, "pnp"), "--prompt", "a blue circle"]
    assert "exists already" in run("run_tokenflow_pnp.py", *edit, cwd=edited).stderr
    assert (edited / "out" / "pnp_clip" / "report.html").exists()
    last_line(run("run_tokenflow_pnp.py", *edit, "--overwrite", cwd=edited))
    assert not [*(edited / "out" / "pnp_clip").glob("report*")]


def test_long_labels_of_a_contact_sheet_are_not_cut_off():
    """A long prompt would hide the settings behind it: its label has as many lines as it needs."""
    frames, prompt = np.zeros((8, 32, 32, 3), np.uint8), "a robotic wolf in the snow, " * 8
    one, many = (contact_sheet({text: frames}) for text in ("pnp_wolf", prompt + "pnp_attn_t 0.3"))
    n_lines, rest = divmod(len(many) - len(frames[0]), LABEL_HEIGHT)
    assert len(one) == LABEL_HEIGHT + 32 and n_lines >= 5 and rest == 0
    lines = many[:-32].reshape(n_lines, LABEL_HEIGHT, -1)
    assert (lines < 128).any(axis=(1, 2)).all()  # text in each
    assert (many[:-32, -4:] == 255).all()  # and none at the border


def test_no_name_or_prompt_breaks_a_contact_sheet():
    """Escape sequences, line ends and half of a character are blanks; both ends of endless text are drawn."""
    frames = np.zeros((8, 32, 32, 3), np.uint8)
    odd, plain = (contact_sheet({t: frames}) for t in ("a\x1b[1m\n\u2028\udcffb", "a [1m   b"))
    assert np.array_equal(odd, plain)
    sheets = [
        contact_sheet({f"wolf {'w' * n} pnp_attn_t {s}": frames}) for n, s in ((9**5, 1), (9**6, 2))
    ]
    assert len(sheets[0]) == len(sheets[1]) == 16 * LABEL_HEIGHT + 32
    assert not np.array_equal(*sheets)


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    """Numbers stay numbers; text that a spreadsheet would compute gets a quote in front."""
    prompts = "=cmd|'/c calc'!A0", "+1", "-1+1", "@SUM(A1)", "\t=1", "a = b"
    options = [{"prompt": prompt, "seed": -i} for i, prompt in enumerate(prompts)]
    entries = [SimpleNamespace(name="=1+1", metrics={"drift": {EDIT: -1.5}}) for _ in prompts]
    write_table(tmp_path / "edits.csv", entries, options)
    with (tmp_path / "edits.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["edit", "prompt", "seed", "drift"]
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        quoted = prompt if prompt == "a = b" else f"'{prompt}"
        assert row == ["'=1+1", quoted, str(-i), "-1.5"]


def test_the_joint_report_is_named_as_the_edits_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = EvaluateConfig(edits=("a",))
    elsewhere = str(tmp_path / "elsewhere")
    for folder, edits in {
        "out": ["out/a", "out/b"],
        ".": ["a", "b"],
        "..": ["a", "../b"],
        elsewhere: [f"{elsewhere}/a", f"{elsewhere}/b"],
    }.items():
        subjects = [SimpleNamespace(folder=Path(edit)) for edit in edits]
        assert joint_folder(subjects, config) == Path(folder)


def test_preprocess_writes_a_report_of_its_reconstruction(edited):
    folder = next((edited / "latents").glob("*/clip/*/*"))
    (entry,) = page_data(folder / "report.html")["entries"]
    assert set(entry["figures"]) == {"psnr", "ssim", "sharpness"}
    assert len(entry["curves"]["psnr"][RECONSTRUCTION]) == 7 and "save_dir" not in entry["options"]
    assert all((folder / video).is_file() for video in entry["videos"].values())
    assert entry["findings"][0]["text"].startswith("The reconstruction")


def test_evaluate_any_two_videos(tmp_path, clip, clip_frames, models):
    """The source is larger and longer than the edit, which a frame-by-frame edit is compared with."""
    write_video(tmp_path / "theirs.mp4", 255 - clip_frames[:5, 8:56, 8:56], 12)
    (tmp_path / "alone").mkdir()
    util.save_frames(tmp_path / "alone", 0, 255 - clip_frames)
    flags = ["--source", clip, "--edited", "theirs.mp4", "--frame_by_frame", "alone"]
    flags += ["--clip", models[0], "--dino", "None", "--prompt", "a red circle"]
    result = run("evaluate.py", *flags, cwd=tmp_path)
    assert str(last_line(result)) == "theirs_report/report.html"
    assert "Not measured: structure distance: dino names no model" in result.stderr
    assert "Not measured: the VAE's round trip" in result.stderr
    (entry,) = page_data(tmp_path / "theirs_report" / "report.html")["entries"]
    assert set(entry["figures"]["warp_1"]) == {SOURCE, PER_FRAME, EDIT} and entry["n_frames"] == 5
    for name in (SOURCE, PER_FRAME, EDIT):
        frames = [*decode_frames(tmp_path / "theirs_report" / entry["videos"][name])]
        assert np.shape(frames) == (5, 48, 48, 3)


@pytest.mark.parametrize(
    "fps, expected", [(24, [0, 2, 4, 6]), (12, range(8)), (6, [0, 0, 1, 1, 2, 2])]
)
def test_videos_of_unequal_rates_are_paired_by_time(tmp_path, caplog, fps, expected):
    caplog.set_level("INFO")
    frames = np.arange(0, 240, 30, np.uint8)[:, None, None, None] * np.ones((64, 64, 3), np.uint8)
    n_frames = max(expected) + 1 + (fps == 24)
    write_video(tmp_path / "source.mp4", frames[:n_frames], fps)
    write_video(tmp_path / "edited.mp4", frames, 12)
    options = {"source": f"{tmp_path}/source.mp4", "edited": f"{tmp_path}/edited.mp4"}
    (subject,) = find_subjects(EvaluateConfig(**options))
    assert subject.n_frames == len(expected)
    for name, indices in ((SOURCE, expected), (EDIT, range(len(expected)))):
        shown = [round(frame.mean() / 30) for frame in subject.read(name)]
        assert shown == [*indices]
    said = f"source.mp4 plays {fps} frames per second and the edit 12"
    assert (said in caplog.text) == (fps != 12)
