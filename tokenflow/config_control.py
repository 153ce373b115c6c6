"""What ControlNets are given of a video: the options that inversions and edits share."""

from dataclasses import dataclass

from tokenflow.diffusion.versions import VERSIONS
from tokenflow.errors import UserError
from tokenflow.options import for_each, option


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How ControlNets are conditioned: the same keys for the inversion and for the edit."""

    controlnet: tuple[str, ...] = ()
    """ControlNets, one for each of control: hub ids or folders in diffusers layout. None: those that are
    known for sd_version."""
    control: tuple[str, ...] = option(
        ("canny",), choices=("canny", "depth", "softedge", "tile", "lineart", "path")
    )
    """Control images of each ControlNet. canny: edges. depth: depth maps. softedge, lineart: found by
    controlnet_aux. tile: the frames themselves. path: the frames of control_path."""
    control_path: str | None = None
    """Video file or folder of the control images for control path: one for each frame of the whole
    source."""
    canny_low: int = option(100, 0, 10_000)
    """Lower threshold of the Canny edges: weaker gradients, in grey levels, are no edges."""
    canny_high: int = option(200, 0, 10_000)
    """Upper threshold of the Canny edges: stronger gradients, in grey levels, are edges; those between both
    thresholds are if they continue one."""
    depth_model: str | None = option(None, none="auto")
    """Depth model of transformers: a hub id or a folder. auto: the depth checkpoint's own, and
    Intel/dpt-hybrid-midas for a ControlNet."""
    control_scale: tuple[float, ...] = option((1.0,), 0, 2)
    """Factor on what the ControlNets add to the UNet: one for all, or one for each of control."""

    @property
    def control_scales(self) -> tuple[float, ...]:
        """The strength of each ControlNet."""
        return for_each("control_scale", self.control_scale, "control", self.control)

    def known_controlnets(self, sd_version: str) -> tuple[str, ...]:
        """Hub ids of a version's ControlNets for the conditions. Raises UserError if one is not known."""
        known = VERSIONS[sd_version].controlnets
        for control in self.control:
            if control not in known:
                others = [name for name, v in VERSIONS.items() if control in v.controlnets]
                instead = " or ".join(f"sd_version {name}" for name in others) or "another control"
                raise UserError(
                    f"controlnet: none is known for {control} under sd_version {sd_version}; name one, or "
                    f"use {instead}"
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
