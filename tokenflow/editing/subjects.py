"""What `evaluate.py` compares: finished edits with their inversions, or any two videos."""

import logging
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.editing.identity import read_identity
from tokenflow.errors import DamagedError, UserError
from tokenflow.evaluation.report import PAGE, SHEET, TABLE
from tokenflow.evaluation.subject import EDIT, PER_FRAME, SOURCE, VAE, Subject
from tokenflow.inversion.files import Inversion
from tokenflow.runtime.digests import check
from tokenflow.video.read import frame_rate, mean_rate, read_times
from util import list_images

log = logging.getLogger("tokenflow")

# The option that only one technique has.
TECHNIQUES = {"pnp_attn_t": "pnp", "start": "sdedit", "control_scale": "controlnet"}
SAME_RATE = Fraction(1, 100)  # by which rates may differ that are rounded, as 30 and 29.97 are


def find_subjects(config: EvaluateConfig) -> list[Subject]:
    """Everything that a configuration asks to evaluate. Raises UserError for what cannot be."""
    if not config.edits:
        return [_find_videos(config)]
    named = list({Path(edit).resolve(): Path(edit) for edit in config.edits}.values())
    # A pattern such as tokenflow-results/* also names the last report over all.
    folders = [path for path in named if path.is_dir() or path.name not in (PAGE, SHEET, TABLE)]
    return [_find_edit(folder, config) for folder in folders or named]


def _find_edit(folder: Path, config: EvaluateConfig) -> Subject:
    if (folder / TABLE).is_file() and not (folder / "frames").exists():
        raise UserError(
            f"edits: {folder} has only a report of several edits; name the edits, which its {TABLE} lists"
        )
    if not (folder / "config.yaml").is_file():
        raise UserError(f"edits: {folder} is not the folder of an edit: it has no config.yaml")
    try:
        check(folder)
        options, identity = read_identity(folder / "config.yaml")
    except DamagedError as damage:
        raise UserError(
            f"edits: {damage}; finish or recompute the edit with the command that began it"
        ) from damage
    inversion = _find_inversion(folder, options, identity, config.latents_path)
    fps = inversion.manifest.frame_rate
    return Subject(
        name=folder.resolve().name,
        folder=folder,
        **_find_frames(config, inversion.list_videos(), folder / "frames", fps),
        fps=fps,
        resize=config.resize,
        prompt=config.prompt or options["prompt"],
        technique=next((t for key, t in TECHNIQUES.items() if key in options), None),
        options=options,
        playable={EDIT: folder / "edited.mp4", VAE: folder / "vae_reconstruction.mp4"},
        inversion=inversion.folder,
    )


def _find_videos(config: EvaluateConfig) -> Subject:
    edited = Path(config.edited)
    fps = frame_rate(edited)
    return Subject(
        name=edited.stem,
        folder=Path(config.output_path or edited.parent / f"{edited.stem}_report"),
        **_find_frames(config, {SOURCE: Path(config.source)}, edited, fps),
        fps=fps,
        resize=config.resize,
        prompt=config.prompt,
        options={"source": config.source, "edited": config.edited},
    )


def _find_inversion(
    folder: Path, options: dict[str, Any], identity: dict, latents_path: str | None
) -> Inversion:
    """The inversion that an edit was made from, by its identity in the edit's config.yaml."""
    latents, problem = Path(latents_path or options["latents_path"]), ""
    # Of all videos, since the name of this one may have been that of a folder that has moved.
    for path in latents.glob(f"*/*/steps_{options['n_inversion_steps']}/nframes_*/manifest.json"):
        inversion = Inversion(path.parent)
        try:
            if inversion.manifest.identity == identity:
                check(path.parent, lambda name: name.endswith(".png"))
                return inversion
        except DamagedError as damage:  # perhaps of another inversion
            problem += f"{damage}; recompute that inversion with preprocess.py, or "
    raise UserError(
        f"edits: the inversion of {folder} is not in {latents}; {problem}run this where the edit "
        "was run, or give --latents_path"
    )


def _find_frames(
    config: EvaluateConfig, compared: dict[str, Path], edit: Path, fps: Fraction
) -> dict[str, Any]:
    """The videos of a subject, and how many of their frames are compared: as many as all have, or fewer."""
    if config.frame_by_frame:
        compared |= {PER_FRAME: Path(config.frame_by_frame)}
    videos, wanted = compared | {EDIT: edit}, config.n_frames
    shown = {name: _pair_frames(path, fps) for name, path in videos.items()}
    shortest = min(shown, key=lambda name: len(shown[name]))
    if (count := len(shown[shortest])) < max(2, wanted):
        raise UserError(
            f"n_frames: {videos[shortest]} has only {count} frames; at least {max(2, wanted)} are needed"
        )
    return {"frames": videos, "shown": shown, "n_frames": wanted or count}


def _pair_frames(video: Path, fps: Fraction) -> Sequence[int]:
    """The frames of a video, as many as it has, that belong to those of an edit of `fps` frames a second.

    Those of a folder belong to the edit's one by one. If the rates are unequal, those of the same time do.
    """
    if video.is_dir():
        return range(len(list_images(video)))
    times = list(read_times(video))
    rate = mean_rate(times)
    if abs(rate / fps - 1) < SAME_RATE:
        return range(len(times))
    log.info(
        f"{video} plays {float(rate):.4g} frames per second and the edit {float(fps):.4g}: each frame of the "
        "edit is compared with the one that is nearest in time; to pair them one by one, give folders"
    )
    middles = [(before + after) / 2 for before, after in pairwise(times)]
    n_frames = int(len(times) / rate * fps + SAME_RATE)
    return [bisect_left(middles, index / fps) for index in range(n_frames)]
