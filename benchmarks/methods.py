"""The ways to edit a clip that are compared: the defaults, the published algorithm, and what lies between."""

from argparse import ArgumentTypeError

from benchmarks.baselines import ExtendedAttention, FrameByFrame
from benchmarks.commands import Method

NAIVE = "--inversion ddim"
UNAVERAGED = "--consensus 0 --fuse 0"

METHODS = {
    "source": Method(technique="source"),
    "vae": Method(technique="vae"),
    "per_frame": Method(UNAVERAGED, denoiser=FrameByFrame),
    "per_frame_ddim": Method(UNAVERAGED, NAIVE, denoiser=FrameByFrame),
    "extended_attention": Method(UNAVERAGED, denoiser=ExtendedAttention),
    "default": Method(),
    "no_consensus": Method("--consensus 0"),
    "no_fuse": Method("--fuse 0"),
    "unaveraged": Method(UNAVERAGED),
    "flow": Method("--correspondences flow"),
    "mask_auto": Method("--mask auto"),
    "previous_fixed_point": Method("--propagation previous"),
    "flanking_ddim": Method(inversion=NAIVE),
    "published": Method("--propagation previous", NAIVE),
    "sdedit": Method("--start 0.7", technique="sdedit"),
    "controlnet": Method("--controlnet {model}/controlnet", technique="controlnet"),
}
# What an edit's sharpness is relative to, by flags of the inversion, and what the differences are to.
FRAME_BY_FRAME = {"": "per_frame", NAIVE: "per_frame_ddim"}
BASE = "default"


def parse_methods(names: str) -> dict[str, Method]:
    """The methods in a list with commas, and those that they are compared with.

    Each is a name of `METHODS`, or flags of run_tokenflow_pnp.py, such as "--guidance_scale 3". Raises
    ArgumentTypeError for another name.
    """
    chosen = {BASE: METHODS[BASE]}
    for name in names.split(","):
        if name not in METHODS and not name.startswith("--"):
            raise ArgumentTypeError(f"{name!r} is neither flags nor one of {', '.join(METHODS)}")
        chosen[name] = METHODS.get(name) or Method(name)
    alone = {FRAME_BY_FRAME[method.inversion] for method in chosen.values()}
    return {name: METHODS[name] for name in METHODS if name in alone} | chosen
