"""The ways to edit a clip that are compared: the defaults, the published algorithm, and what lies between."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import methodcaller

import numpy as np

from benchmarks.baselines import ExtendedAttention, FrameByFrame
from benchmarks.job import Job


@dataclass(frozen=True)
class Method:
    """A method of `Job`, the inversion that it starts from, and the settings that are not the defaults.

    Two methods of the same `repr` are the same, in another run of Python too.
    """

    edit: Callable[[Job], np.ndarray] = methodcaller("edit_pnp")
    inversion: str = "fixed_point"
    settings: dict = field(default_factory=dict)

    def __call__(self, job: Job) -> np.ndarray:
        """The frames (N, H, W, 3) of a job of that inversion, edited."""
        return self.edit(job.with_settings(**self.settings))


_alone = methodcaller("edit_pnp", FrameByFrame)
_previous = {"propagation": "previous"}
_unaveraged = {"consensus": 0, "fuse": 0}
_flow = {"correspondences": "flow"}
_exact_flow = methodcaller("edit_along_exact_flow")

METHODS = {
    "source": Method(methodcaller("unedited")),
    "vae": Method(methodcaller("round_trip")),
    "per_frame": Method(_alone),
    "per_frame_ddim": Method(_alone, "ddim"),
    "extended_attention": Method(methodcaller("edit_pnp", ExtendedAttention)),
    "default": Method(),
    "no_consensus": Method(settings={"consensus": 0}),
    "no_fuse": Method(settings={"fuse": 0}),
    "unaveraged": Method(settings=_unaveraged),
    "flow": Method(settings=_flow),
    "flow_unaveraged": Method(settings=_flow | _unaveraged),
    "exact_flow": Method(_exact_flow, settings=_flow),
    "exact_flow_unaveraged": Method(_exact_flow, settings=_flow | _unaveraged),
    "fuse_2": Method(settings={"fuse": 2}),
    "fuse_3": Method(settings={"fuse": 3}),
    "mask_auto": Method(settings={"mask": "auto"}),
    "previous_fixed_point": Method(settings=_previous),
    "flanking_ddim": Method(inversion="ddim"),
    "published": Method(inversion="ddim", settings=_previous),
    "sdedit": Method(methodcaller("edit_sdedit")),
    "controlnet": Method(methodcaller("edit_controlnet")),
}
# What an edit's sharpness is relative to, by inversion, and what the differences are to.
FRAME_BY_FRAME = {"fixed_point": "per_frame", "ddim": "per_frame_ddim"}
BASE = "default"


def chosen_methods(names: str) -> list[str]:
    """Methods named in a list with commas, and those that they are compared with, in the order above.

    Raises ArgumentTypeError, naming the first that there is not.
    """
    chosen = set(names.split(",")) | {BASE}
    for name in sorted(chosen - set(METHODS)):
        raise ArgumentTypeError(f"{name!r} is none of {', '.join(METHODS)}")
    chosen |= {FRAME_BY_FRAME[METHODS[name].inversion] for name in chosen}
    return [name for name in METHODS if name in chosen]
