"""The configuration of `evaluate.py`."""

from dataclasses import dataclass

from tokenflow.cli import option
from tokenflow.config import MAX_FRAMES, RESIZE
from tokenflow.config_model import check_device
from tokenflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of `evaluate.py`."""

    edits: tuple[str, ...] = option(
        "folders of finished edits, as run_tokenflow_*.py write them; several get a report each and one "
        "over all",
        (),
    )
    source: str | None = option(
        "instead of edits: the source video of an edit by any program, a file or a folder of images",
        None,
    )
    edited: str | None = option("the edited video that belongs to source", None)
    frame_by_frame: str | None = option(
        "a video in which the same edit was made frame by frame, for comparison; for one edit only",
        None,
    )
    prompt: str | None = option(
        "what the edited video shows, in words; None: the prompt in each edit's config.yaml", None
    )
    n_frames: int = option(
        "number of frames to compare, from the first; 0: all that source and edit both have",
        0,
        low=0,
        high=MAX_FRAMES,
    )
    resize: str = option(
        "how videos of another size become as large as the edit; crop: cut out the centre, stretch: change "
        "the aspect ratio, pad: add black borders",
        "crop",
        choices=RESIZE,
    )
    flow: str = option(
        "optical flow of the source; dis: OpenCV's dense inverse search, raft: the network of torchvision, "
        "which must be installed",
        "dis",
        choices=("dis", "raft"),
    )
    clip: str | None = option(
        "CLIP model for the agreement with the prompt and the frame consistency: a hub id, or a folder in "
        "transformers layout; None: leave them out",
        "openai/clip-vit-base-patch32",
    )
    dino: str | None = option(
        "vision transformer trained by DINO for the structure distance: a hub id, or a folder in "
        "transformers layout; None: leave it out",
        "facebook/dino-vitb8",
    )
    device: str = option(
        "where the networks run: auto, cpu, mps, cuda, or cuda:N for the GPU of index N; "
        "auto: the first of CUDA, MPS and the CPU that is available",
        "auto",
    )
    latents_path: str | None = option(
        "folder of all inversions, where the sources of edits are; None: the latents_path in each edit's "
        "config.yaml",
        None,
    )
    output_path: str | None = option(
        "folder of the report; None: the folder of the edit, the one that several edits share, or a new one "
        "beside the edited video",
        None,
    )

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.edits and (self.source or self.edited):
            raise UserError("edits: give either edits, or source and edited")
        if not self.edits and not (self.source and self.edited):
            missing = "edited" if self.source else "source" if self.edited else "edits"
            raise UserError(f"{missing}: missing; give edits, or source and edited")
        if self.frame_by_frame and len(self.edits) > 1:
            raise UserError(
                "frame_by_frame: it belongs to one edit; give one folder in edits, or leave it out"
            )
