"""From finished edits, or two videos, to their reports."""

import logging
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from tokenflow.diffusion.checkpoints import choose_device
from tokenflow.evaluation.config import EvaluateConfig
from tokenflow.evaluation.figures import (
    SOURCE,
    VAE,
    AlongFlow,
    Drift,
    beside_source,
    measure,
    summarize,
)
from tokenflow.evaluation.networks import available
from tokenflow.evaluation.report import (
    PAGE,
    PARTS,
    Entry,
    contact_sheet_of,
    write_measured,
    write_report,
)
from tokenflow.evaluation.subjects import Subject, find_subjects
from tokenflow.evaluation.verdict import verdict
from tokenflow.optical_flow import Flow, dis_flow, raft_flow
from tokenflow.runtime.run_folder import locked
from util import write_video

log = logging.getLogger("tokenflow")


def evaluate(config: EvaluateConfig) -> Path:
    """Measure everything that the configuration names, write the reports, and return the path of the last.

    Everything that can be checked is checked first.
    """
    device, _ = choose_device(config.device, "float32")
    subjects = find_subjects(config)
    flow = raft_flow(device) if config.flow == "raft" else dis_flow()
    with ExitStack() as held:
        for subject in subjects:
            held.enter_context(locked(subject.folder))
        entries = []
        for subject in subjects:
            entry = evaluate_one(subject, config, flow, device)
            write_measured(subject.folder, entry)
            write_report(subject.folder / PAGE, entry.name, [entry])
            _say(entry)
            entries.append(entry)
        page = _joint_folder(subjects, config) / PAGE
        if len(subjects) > 1 or page.parent != subjects[0].folder:
            write_report(page, f"{len(entries)} edits", entries)
    return page


def evaluate_one(
    subject: Subject, config: EvaluateConfig, flow: Flow, device: torch.device
) -> Entry:
    """Measure one edit, and write the videos that its report shows and nobody has written yet."""
    meters, skipped = available(config.clip, config.dino, subject.prompt, device)
    if VAE not in subject.frames:
        skipped.append("floors of the VAE: only an edit's folder has its round trip")
    alone = partial(beside_source, device=device), Drift(float(subject.fps), subject.n_frames)
    meters = [AlongFlow(flow), *alone, *meters]
    videos = {name: subject.read(name) for name in subject.frames}
    doing = f"Measuring {subject.name}"
    videos[SOURCE] = tqdm(videos[SOURCE], doing, subject.n_frames, unit="frame")
    curves = measure(videos, meters)
    figures = summarize(curves, float(subject.fps))
    pictures = {name: subject.read(name) for name in subject.frames}
    return Entry(
        name=subject.name,
        prompt=subject.prompt,
        videos={name: _playable(subject, name) for name in subject.frames},
        fps=subject.fps,
        n_frames=subject.n_frames,
        figures=figures,
        curves=curves,
        findings=verdict(figures, subject.technique),
        skipped=skipped,
        options=subject.options,
        sheet=contact_sheet_of(pictures, subject.n_frames),
    )


def _playable(subject: Subject, name: str) -> Path:
    """One of the videos as H.264 in the report's folders, written if it is not there."""
    if name in subject.playable:
        return subject.playable[name]
    path = subject.folder / PARTS / f"{name}.mp4"
    write_video(path, subject.read(name), subject.fps)
    return path


def _joint_folder(subjects: list[Subject], config: EvaluateConfig) -> Path:
    """The folder of the report over everything."""
    if config.output_path:
        return Path(config.output_path)
    if len(subjects) == 1:
        return subjects[0].folder
    shared = os.path.commonpath([subject.folder.absolute() for subject in subjects])
    return Path(os.path.relpath(shared))


def _say(entry: Entry) -> None:
    for line in entry.skipped:
        log.info("skipped: %s", line)
    for finding in entry.findings:
        advice = f" To do: {finding.advice}." if finding.advice else ""
        log.info("%s: %s%s", finding.level, finding.text, advice)
