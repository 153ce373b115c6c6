"""How ControlNets are conditioned: the options that inversions and edits share."""

from dataclasses import dataclass
from functools import partial

from tokenflow.cli import for_each, option
from tokenflow.diffusion.versions import VERSIONS
from tokenflow.errors import UserError

level_option = partial(option, low=0, high=10_000)  # grey levels of a gradient


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How ControlNets are conditioned: the same keys for the inversion and for the edit."""

    controlnet: tuple[str, ...] = option(
        "ControlNets to use instead of those that are known for sd_version, one for each of control: hub "
        "ids, or folders in diffusers layout",
        (),
    )
    control: tuple[str, ...] = option(
        "what each ControlNet is given of the source's frames; canny: their Canny edges, depth: their "
        "depth, softedge and lineart: what the package controlnet_aux finds, tile: the frames "
        "themselves, path: the frames of control_path",
        ("canny",),
        choices=("canny", "depth", "softedge", "tile", "lineart", "path"),
    )
    control_path: str | None = option(
        "video file or folder of images that a ControlNet is given (with control: path), a frame for each "
        "frame of the whole source",
        None,
    )
    canny_low: int = level_option(
        "lower threshold of the Canny edges: a weaker gradient, in grey levels, is no edge", 100
    )
    canny_high: int = level_option(
        "upper threshold of the Canny edges: a stronger gradient, in grey levels, is an edge; one "
        "between both thresholds is an edge if it continues one",
        200,
    )
    depth_model: str | None = option(
        "model of transformers that finds the depth of frames: a hub id or a folder; auto: the depth "
        "checkpoint's own, and Intel/dpt-hybrid-midas for a ControlNet",
        None,
        none="auto",
    )
    control_scale: tuple[float, ...] = option(
        "strength of the ControlNets: factor on what each adds to the UNet, one for all, or one for each of "
        "control; 0: it has no effect",
        (1.0,),
        low=0,
        high=2,
    )

    @property
    def control_scales(self) -> tuple[float, ...]:
        """The strength of each ControlNet."""
        return for_each("control_scale", self.control_scale, "control", self.control)

    def known_controlnets(self, sd_version: str) -> tuple[str, ...]:
        """Hub ids of a version's ControlNets for the conditions. Raises UserError if one is not known."""
        known = VERSIONS[sd_version].controlnets
        for control in self.control:
            if control not in known:
                raise UserError(
                    f"controlnet: none is known for {control} under sd_version {sd_version}; name one, or "
                    f"use {self._instead(control)}"
                )
        return tuple(known[control] for control in self.control)

    def check_controls(self) -> None:
        """Raise UserError for conditions, ControlNets and scales that do not belong together."""
        if not self.control:
            raise UserError("control: it is empty; name what the ControlNet is given")
        if self.controlnet and len(self.controlnet) != len(self.control):
            raise UserError(
                f"controlnet: {len(self.controlnet)} for {len(self.control)} of control; give one for each"
            )
        for_each("control_scale", self.control_scale, "control", self.control)
        if "path" in self.control and self.control_path is None:
            raise UserError(
                "control_path: missing; control: path needs a video or a folder of images"
            )
        if "path" not in self.control and self.control_path is not None:
            raise UserError(
                f"control_path: {self.control_path} is not used, because control is "
                f"{' '.join(self.control)}; add path to it"
            )

    @staticmethod
    def _instead(control: str) -> str:
        """What a user can do who has no ControlNet for a condition."""
        versions = [
            f"sd_version {name}" for name, v in VERSIONS.items() if control in v.controlnets
        ]
        return " or ".join(versions) or "another control"
