"""Whole edits, from frames to edited frames, against the authors' published algorithm and the paper's.

The published side is the slow reference. Of the code under test it uses only the loading of checkpoints.
"""

import numpy as np
import pytest
from reference import Reference
from test_cli import ROOT, last_line, run

import util

STEPS, N_FRAMES, BATCH_SIZE, SEED, GUIDANCE = 5, 6, 2, 3, 7.5
SOURCE_PROMPT, PROMPT = "a red square", "a blue circle"
NEGATIVE = "ugly, blurry, low res, unrealistic, unaesthetic"


@pytest.fixture(scope="module")
def frames(clip_frames):
    """Uint8 RGB (6, 128, 128, 3), whose texture makes nearest neighbours unambiguous."""
    noise = np.random.default_rng(0).integers(-25, 25, (128, 128 + 5 * N_FRAMES, 3))
    large = clip_frames[:N_FRAMES].repeat(2, 1).repeat(2, 2).astype(int)
    moved = [noise[:, 5 * i : 5 * i + 128] for i in range(N_FRAMES)]
    return (large + np.stack(moved)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def work(tmp_path_factory, frames, checkpoint):
    folder = tmp_path_factory.mktemp("published")
    (folder / "clip").mkdir()
    util.save_frames(folder / "clip", 0, frames)
    flags = ["--data_path", "clip", "--model", checkpoint, "--H", 128, "--W", 128, "--steps", STEPS]
    flags += ["--save_steps", STEPS, "--n_frames", N_FRAMES, "--inversion_prompt", SOURCE_PROMPT]
    flags += ["--inversion", "ddim", "--dtype", "float32"]
    video = last_line(run("preprocess.py", *flags, cwd=folder))
    return folder, util.load_frames(folder / video.parent / "frames", range(N_FRAMES))


@pytest.fixture(scope="module")
def reference(sd, frames):
    """The reference, with the clip inverted."""
    return Reference(sd, frames, SOURCE_PROMPT, STEPS, BATCH_SIZE)


def assert_same_video(ours, theirs):
    """Assert 44 dB, and 98 % of the values within one grey level; ties account for the rest."""
    difference = np.abs(ours.astype(float) - theirs.astype(float))
    assert 10 * np.log10(255**2 / (difference**2).mean()) > 44
    assert (difference <= 1).mean() > 0.98


def test_reconstruction(work, reference):
    assert_same_video(work[1], reference.reconstruct())


@pytest.mark.parametrize(
    "technique, propagation", [("pnp", "previous"), ("sdedit", "previous"), ("pnp", "flanking")]
)
def test_edit(work, reference, checkpoint, technique, propagation):
    folder, _ = work
    flags = ["--data_path", "clip", "--model", checkpoint, "--n_inversion_steps", STEPS]
    flags += ["--n_timesteps", STEPS, "--n_frames", N_FRAMES, "--batch_size", BATCH_SIZE]
    flags += ["--keyframe_interval", BATCH_SIZE, "--prompt", PROMPT, "--seed", SEED]
    if (technique, propagation) == (
        "pnp",
        "previous",
    ):  # what is not a flag is the authors' setting
        flags += ["--config_path", ROOT / "configs" / "published.yaml"]
    else:
        flags += ["--negative_prompt", NEGATIVE, "--guidance_scale", GUIDANCE]
        flags += ["--propagation", propagation]
        flags += ["--start", 0.8] if technique == "sdedit" else []
    if propagation == "flanking":
        # With previous these are the defaults.
        flags += ["--consensus", 0, "--fuse", 0, "--guidance", "every_frame"]
        flags += ["--relevance", 0, "--own_weight", 1]
    video = last_line(run(f"run_tokenflow_{technique}.py", *flags, cwd=folder))
    ours = util.load_frames(folder / video.parent / "frames", range(N_FRAMES))

    steps = (
        {"attention_steps": 2, "feature_steps": 4} if technique == "pnp" else {"skipped_steps": 1}
    )
    steps |= {"n_steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED}
    theirs = reference.edit(PROMPT, NEGATIVE, propagation=propagation, **steps)
    assert_same_video(ours, theirs)
