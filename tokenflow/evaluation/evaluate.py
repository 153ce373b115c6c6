"""From finished edits, or two videos, to their reports."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.diffusion.device import choose_device
from tokenflow.evaluation.contact_sheet import moments
from tokenflow.evaluation.meters import (
    EDIT,
    SOURCE,
    VAE,
    AlongFlow,
    Curves,
    Drift,
    Recent,
    Values,
    beside_source,
    measure,
    summarize,
)
from tokenflow.evaluation.networks import available
from tokenflow.evaluation.report import PAGE, PARTS, Entry, thumbnails, write_measured, write_report
from tokenflow.evaluation.subject import Subject
from tokenflow.evaluation.verdict import verdict
from tokenflow.motion.optical_flow import Flow, dis_flow, raft_flow
from tokenflow.runtime.run_folder import lock, stage
from util import write_video

T = TypeVar("T")

log = logging.getLogger("tokenflow")


def evaluate(config: EvaluateConfig, subjects: list[Subject]) -> Path:
    """Measure everything that a configuration names, write the reports, and return the path of the last."""
    device, _ = choose_device(config.device, "float32")
    flow = raft_flow(device) if config.flow == "raft" else dis_flow()
    with ExitStack() as held:
        for subject in subjects:
            held.enter_context(lock(subject.folder))
        entries = []
        for _, members in groupby(subjects, key=attrgetter("compared_with")):
            for subject, entry in evaluate_together(list(members), config, flow, device):
                write_measured(subject.folder, entry)
                write_report(subject.folder / PAGE, entry.name, [entry])
                _say(entry)
                entries.append(entry)
        for line in dict.fromkeys(line for entry in entries for line in entry.skipped):
            log.info("skipped: %s", line)
        page = joint_folder(subjects, config) / PAGE
        if len(subjects) > 1 or page.parent != subjects[0].folder:
            page.parent.mkdir(parents=True, exist_ok=True)
            write_report(page, f"{len(entries)} edits", entries)
    return page


def evaluate_together(
    subjects: list[Subject], config: EvaluateConfig, flow: Flow, device: torch.device
) -> Iterator[tuple[Subject, Entry]]:
    """Measure edits that are compared with the same videos, which pass once for all of them."""
    first = subjects[0]
    meters, skipped = available(config.clip, config.dino, first.prompt, device)
    if VAE not in first.frames:
        skipped.append("floors of the VAE: only an edit's folder has its round trip")
    alone = partial(beside_source, device=device), Drift(float(first.fps), first.n_frames)
    seen = Seen(first.n_frames)
    meters = [AlongFlow(flow), *alone, *meters, seen]
    videos = {name: first.read(name) for name in first.frames if name != EDIT}
    doing = f"Measuring {first.name if len(subjects) == 1 else f'{len(subjects)} edits'}"
    videos[SOURCE] = tqdm(videos[SOURCE], doing, first.n_frames, unit="frame")
    edits = {f"{EDIT} {index}": subject for index, subject in enumerate(subjects)}
    videos |= {name: subject.read(EDIT) for name, subject in edits.items()}
    curves, written = measure(videos, meters), {}
    for name, subject in edits.items():

        def own(of: dict[str, T], name: str = name) -> dict[str, T]:
            return {
                EDIT if n == name else n: x for n, x in of.items() if n not in edits or n == name
            }

        of_edit = {key: own(of) for key, of in curves.items()}
        yield subject, _entry(subject, of_edit, own(seen.pictures), skipped, written)


class Seen:
    """Meter that measures nothing, and keeps small frames of each video of its `moments`."""

    def __init__(self, n_frames: int) -> None:
        self.moments, self.n_seen, self._kept = moments(n_frames), 0, []

    def __call__(self, recent: Recent) -> Values:
        """No values."""
        if self.n_seen in self.moments:
            self._kept.append(
                thumbnails({name: [frames[-1]] for name, frames in recent.items()}, 1)
            )
        self.n_seen += 1
        return {}

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """The small frames of each video: uint8 RGB (n, H, W, 3)."""
        return {name: np.concatenate([kept[name] for kept in self._kept]) for name in self._kept[0]}


def _entry(
    subject: Subject,
    curves: Curves,
    pictures: dict[str, np.ndarray],
    skipped: list[str],
    written: dict[str, Path],
) -> Entry:
    """What the page shows of one edit; writes the videos that it shows and nobody has written yet."""
    figures = summarize(curves, float(subject.fps))
    return Entry(
        name=subject.name,
        prompt=subject.prompt,
        videos={name: _playable(subject, name, written) for name in subject.frames},
        fps=subject.fps,
        n_frames=subject.n_frames,
        figures=figures,
        curves=curves,
        findings=verdict(figures, subject.technique),
        skipped=skipped,
        options=subject.options,
        pictures=pictures,
    )


def _playable(subject: Subject, name: str, written: dict[str, Path]) -> Path:
    """One of the videos as H.264 in the report's folders, written if it is not there.

    written: those that were, for another edit that is compared with the same videos; they are copied.
    """
    if name in subject.playable:
        return subject.playable[name]
    path = subject.folder / PARTS / f"{name}.mp4"
    if name in written:
        with stage(path) as unfinished:
            shutil.copyfile(written[name], unfinished)
    else:
        write_video(path, subject.read(name), subject.fps)
        written[name] = path
    return path


def joint_folder(subjects: list[Subject], config: EvaluateConfig) -> Path:
    """The folder of the report over everything, absolute if the edits' folders are."""
    if config.output_path:
        return Path(config.output_path)
    if len(subjects) == 1:
        return subjects[0].folder
    folders = [subject.folder for subject in subjects]
    shared = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return Path(shared if all(f.is_absolute() for f in folders) else os.path.relpath(shared))


def _say(entry: Entry) -> None:
    log.info("%s:", entry.name)
    for finding in entry.findings:
        advice = f" To do: {finding.advice}." if finding.advice else ""
        log.info("%s: %s%s", finding.level, finding.text, advice)
