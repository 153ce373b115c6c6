"""The edits of one command: one, or all of a sweep, which share what they can and get a report together."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenflow.config import EditConfig
from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.config_sweep import differences, label
from tokenflow.editing.check import check_edit
from tokenflow.editing.edit import STEPS, EditRun
from tokenflow.editing.identity import Identity
from tokenflow.editing.shared import Shared
from tokenflow.editing.subjects import find_subjects
from tokenflow.errors import UserError
from tokenflow.evaluation.evaluate import evaluate
from tokenflow.evaluation.report import PAGE, discard_report
from tokenflow.runtime.run_folder import open_run_folder, remove, share

log = logging.getLogger("tokenflow")


@contextmanager
def open_edits(configs: Sequence[EditConfig], technique: str) -> Iterator["Edits"]:
    """The edits of these configurations, all of which are checked first; several are evaluated at the end.

    technique: first part of the folders' names. Edits that turn out to be the same are made once.
    """
    shared, edits = Shared(), {}
    for config, settings in zip(configs, differences([asdict(c) for c in configs]), strict=True):
        with _blame(settings):
            edit = check_edit(config, technique, shared)
        edits.setdefault(edit.identity.digest, (edit, settings))
    first, _ = next(iter(edits.values()))
    with ExitStack() as held:
        held.enter_context(share(first.inversion.folder))
        first.check_inversion()
        folder = None
        if len(edits) > 1:
            folder = held.enter_context(_open_sweep([edit for edit, _ in edits.values()]))
        opened = Edits(list(edits.values()), folder)
        held.enter_context(opened.current)
        yield opened
    if folder and first.processes.is_main and not (folder / PAGE).exists():
        done = tuple(str(video.parent) for video in opened.videos)
        config = EvaluateConfig(
            edits=done,
            output_path=str(folder),
            device=first.config.device,
            latents_path=first.config.latents_path,
        )
        evaluate(config, find_subjects(config))
    first.processes.wait()


@contextmanager
def _open_sweep(edits: Sequence[EditRun]) -> Iterator[Path]:
    """The folder of a sweep of these edits; while the block lasts, no other run can work there."""
    first, identity = edits[0], Identity.of_sweep([edit.identity for edit in edits])
    if first.n_frames < 2:
        raise UserError(f"n_frames: {first.n_frames}, but a sweep compares videos; edit at least 2")
    parent, name = Path(first.config.output_path), f"{first.name}_sweep"
    with ExitStack() as held:
        with first.processes.main_first():
            is_main = first.processes.is_main
            folder = held.enter_context(open_run_folder(parent, name, identity.text, is_main))
        yield folder
        if first.processes.is_main:
            remove(folder / STEPS)


class Edits:
    """One edit, or those of a sweep in the order of their settings.

    edits: each with the settings that tell it from the others. folder: of a sweep. current: closes the edit
    that is open.
    """

    def __init__(
        self, edits: Sequence[tuple[EditRun, Mapping[str, Any]]], folder: Path | None
    ) -> None:
        self.edits, self.folder, self.current = edits, folder, ExitStack()
        self.videos: list[Path] = []

    def __iter__(self) -> Iterator[EditRun]:
        """Open one edit after the other; each is closed when the next one is asked for."""
        for number, (edit, settings) in enumerate(self.edits, start=1):
            if self.folder:
                log.info("edit %d of %d: %s", number, len(self.edits), label(settings))
            self.current.enter_context(_blame(settings))
            scratch = self.folder / STEPS if self.folder else None
            run = self.current.enter_context(edit.open(scratch))
            if self.folder and run.processes.is_main and not run.is_finished:
                discard_report(self.folder)  # of what this edit was before
            self.videos.append(run.video)
            yield run
            self.current.close()

    @property
    def result(self) -> Path:
        """The edited video, or the folder of a sweep's report."""
        return self.folder or self.videos[0]


@contextmanager
def _blame(settings: Mapping[str, Any]) -> Iterator[None]:
    """Name a combination's settings, if there are any, in what goes wrong in the block."""
    try:
        yield
    except (UserError, FloatingPointError) as error:
        if not settings:
            raise
        raise type(error)(f"{label(settings)}: {error}") from error
