"""The configuration of `evaluate.py`."""

from dataclasses import dataclass

from tokenflow.config import MAX_FRAMES, RESIZE
from tokenflow.config_model import DeviceConfig
from tokenflow.errors import UserError
from tokenflow.options import option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DeviceConfig):
    """Options of `evaluate.py`."""

    edits: tuple[str, ...] = ()
    """Folders of finished edits. Several get a report each, and one over all."""
    source: str | None = None
    """Source video, a file or a folder of images, of an edit by any program. Instead of edits."""
    edited: str | None = None
    """Edited video that belongs to source."""
    frame_by_frame: str | None = None
    """Video of the same edit made frame by frame, for comparison. For one edit only."""
    prompt: str | None = None
    """Prompt that describes the edited video. None: as in each edit's config.yaml."""
    n_frames: int = option(0, 0, MAX_FRAMES)
    """Number of frames to compare, from the first. 0: all."""
    resize: str = option("crop", choices=RESIZE)
    """How videos of another size are fitted to the edit. crop: cut out the centre. stretch: change the
    aspect ratio. pad: add black borders."""
    flow: str = option("dis", choices=("dis", "raft"))
    """Optical flow of the source. dis: dense inverse search of OpenCV. raft: network of torchvision, which
    must be installed."""
    clip: str | None = "openai/clip-vit-base-patch32"
    """CLIP model of the CLIP scores: a hub id, or a folder in transformers layout. None: no CLIP scores."""
    dino: str | None = "facebook/dino-vitb8"
    """DINO model of the structure distance: a hub id, or a folder in transformers layout. None: no
    structure distance."""
    latents_path: str | None = None
    """Folder of all inversions. None: as in each edit's config.yaml."""
    output_path: str | None = None
    """Folder of the report. None: that of the edit, the one that several edits share, or a new one beside
    the edited video."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edits and (self.source or self.edited):
            raise UserError("edits: give either edits, or source and edited")
        if not self.edits and not (self.source and self.edited):
            missing = "edited" if self.source else "source" if self.edited else "edits"
            raise UserError(f"{missing}: missing; give edits, or source and edited")
        if self.frame_by_frame and len(self.edits) > 1:
            raise UserError(
                "frame_by_frame: it belongs to one edit; give one folder in edits, or leave it out"
            )
