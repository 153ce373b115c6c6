"""From finished edits, or two videos, to their reports."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.diffusion.device import choose_device
from tokenflow.evaluation.contact_sheet import moments, shrink
from tokenflow.evaluation.meters import (
    AlongFlow,
    BesideSource,
    Drift,
    measure,
    name_curves,
    summarize,
)
from tokenflow.evaluation.networks import load_meters
from tokenflow.evaluation.report import PAGE, PARTS, Entry, write_measured, write_report
from tokenflow.evaluation.subject import EDIT, VAE, Subject
from tokenflow.evaluation.verdict import verdict
from tokenflow.motion.optical_flow import DenseInverseSearch, OpticalFlow, load_raft
from tokenflow.runtime.run_folder import lock, share, stage
from tokenflow.video.write import write_video

log = logging.getLogger("tokenflow")


def evaluate(config: EvaluateConfig, subjects: list[Subject]) -> Path:
    """Measure everything that a configuration names, write the reports, and return the path of the last."""
    device, _ = choose_device(config.device, "float32")
    flow = load_raft(device) if config.flow == "raft" else DenseInverseSearch()
    with ExitStack() as held:
        for subject in subjects:
            held.enter_context(lock(subject.folder))
            if subject.inversion:
                held.enter_context(share(subject.inversion))
        entries = []
        for _, members in groupby(subjects, key=attrgetter("compared_with")):
            for subject, entry in evaluate_together(list(members), config, flow, device):
                write_measured(subject.folder, entry)
                write_report(subject.folder / PAGE, entry.name, [entry])
                log.info("%s:", entry.name)
                for found in entry.findings:
                    log.info("%s: %s", found.level, f"{found.text} {found.advice}".strip())
                entries.append(entry)
        for line in dict.fromkeys(line for entry in entries for line in entry.skipped):
            log.info("Not measured: %s", line)
        page = joint_folder(subjects, config) / PAGE
        if len(subjects) > 1 or page.parent != subjects[0].folder:
            write_report(page, f"{len(entries)} edits", entries)
    return page


def evaluate_together(
    subjects: list[Subject], config: EvaluateConfig, flow: OpticalFlow, device: torch.device
) -> Iterator[tuple[Subject, Entry]]:
    """Measure edits that are compared with the same videos, which pass once for all of them."""
    first = subjects[0]
    networks, skipped = load_meters(config.clip, config.dino, first.prompt, device)
    if VAE not in first.frames:
        skipped.append("the VAE's round trip: only the folder of an edit has it")
    meters = [AlongFlow(flow), BesideSource(device), Drift(float(first.fps), first.n_frames)]
    shared = [name for name in first.frames if name != EDIT]  # the source first
    videos = [first.read(name) for name in shared] + [subject.read(EDIT) for subject in subjects]
    doing = "Measuring the edit" if len(subjects) == 1 else f"Measuring {len(subjects)} edits"
    videos[0] = tqdm(videos[0], doing, first.n_frames, unit="frame")
    pictures = []
    moving = _stack(videos, moments(first.n_frames), pictures)
    measured = measure(moving, [*meters, *networks])
    for column, subject in enumerate(subjects, len(shared)):
        columns = dict(zip([*shared, EDIT], [*range(len(shared)), column], strict=True))
        curves = name_curves(measured, columns)
        metrics = summarize(curves, float(subject.fps))
        entry = Entry(
            name=subject.name,
            prompt=subject.prompt,
            videos=_write_videos(subject, first),
            fps=subject.fps,
            n_frames=subject.n_frames,
            metrics=metrics,
            curves=curves,
            findings=verdict(metrics, subject.technique),
            skipped=skipped,
            options=subject.options,
            pictures={name: np.stack([p[i] for p in pictures]) for name, i in columns.items()},
        )
        yield subject, entry


def _stack(
    videos: Sequence[Iterator[np.ndarray]], shown: Sequence[int], pictures: list
) -> Iterator[np.ndarray]:
    """The frames of all videos, moment by moment: uint8 (videos, H, W, 3).

    Small copies of those of the moments `shown` are added to `pictures`.
    """
    for index, frames in enumerate(zip(*videos, strict=True)):
        if index in shown:
            pictures.append([shrink(frame) for frame in frames])
        yield np.stack(frames)


def _write_videos(subject: Subject, first: Subject) -> dict[str, Path]:
    """H.264 videos of an edit and of what it is compared with, written where they do not exist yet.

    first: an edit that is compared with the same videos, from which they are copied.
    """
    videos = {name: subject.folder / PARTS / f"{name}.mp4" for name in subject.frames}
    for name, path in videos.items():
        if name in subject.playable:
            continue
        if subject is first:
            write_video(path, subject.read(name), subject.fps)
        else:
            with stage(path) as unfinished:
                shutil.copyfile(first.folder / PARTS / path.name, unfinished)
    return videos | subject.playable


def joint_folder(subjects: Sequence[Subject], config: EvaluateConfig) -> Path:
    """The folder of the report over everything, absolute if the edits' folders are."""
    if config.output_path:
        return Path(config.output_path)
    if len(subjects) == 1:
        return subjects[0].folder
    folders = [subject.folder for subject in subjects]
    shared = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return Path(shared if all(f.is_absolute() for f in folders) else os.path.relpath(shared))
