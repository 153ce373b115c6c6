"""What figures say in words: what is good, what is poor, and which option to change.

The thresholds are rules of thumb, chosen with the figures of docs/benchmarks.md in view. They have not been
measured. A floor that is poor itself, such as a noisy source, never makes an edit poor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

from tokenflow.evaluation.meters import EDIT, PER_FRAME, RECONSTRUCTION, SOURCE, VAE, Values

# Below this PSNR (dB) textures and small objects of the source are lost, also in an edit. It is no higher,
# since Stable Diffusion's VAE itself has 23.4 +- 3.8 on photographs of 256x256 pixels (COCO; the model card
# of stabilityai/sd-vae-ft-mse).
POOR_PSNR = 20.0
WORST_FIRST = POOR, FAIR, GOOD = "poor", "fair", "good"


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know: how good it is, why, and what to do (empty if nothing)."""

    level: str
    text: str
    advice: str = ""


# What keeps more of the source, and what changes more, by technique.
KEEP = {
    "pnp": "raise pnp_attn_t or pnp_f_t",
    "sdedit": "lower start",
    "controlnet": "raise control_scale",
}
CHANGE = {
    "pnp": "lower pnp_attn_t and pnp_f_t",
    "sdedit": "raise start",
    "controlnet": "lower control_scale",
}
STEADIER = "lower guidance_scale or keyframe_interval"


def verdict(figures: Values, technique: str | None = None) -> list[Finding]:
    """Findings about an edit, or about a reconstruction if there is no edit, the poor ones first.

    figures: by figure and video. technique: pnp, sdedit, controlnet, or None for another program's edit,
    to which no option can be recommended.
    """
    findings = list(_reconstruction(figures))
    if any(EDIT in by_name for by_name in figures.values()):
        for rule in (_steadiness, _sharpness, _drift, _flicker, _prompt, _structure):
            findings += rule(figures, technique)
    return sorted(findings, key=lambda finding: WORST_FIRST.index(finding.level))


def _graded(value: float, fair: float, poor: float) -> str:
    """The level of a value that is good below `fair` and poor from `poor` on; less is better."""
    return GOOD if value < fair else FAIR if value < poor else POOR


def _floor(figures: Values, key: str) -> float:
    """The largest value that the source and the VAE's round trip have themselves."""
    return max((figures[key].get(name, 0.0) for name in (SOURCE, VAE)), default=0.0)


def _value(figures: Values, key: str, name: str = EDIT) -> float | None:
    return figures.get(key, {}).get(name)


def _more(beyond: float) -> str:
    return f"{beyond:.1f} more" if beyond >= 0.05 else "no more"


def _for(technique: str | None, advice: str) -> str:
    return advice if technique else ""


def _reconstruction(figures: Values) -> Iterator[Finding]:
    psnr, vae = (_value(figures, "psnr", name) for name in (RECONSTRUCTION, VAE))
    if psnr is None:
        return
    text = f"The reconstruction has a PSNR of {psnr:.1f} dB against the source"
    levels = [_graded(-psnr, -25, -POOR_PSNR)]
    if (sharpness := _value(figures, "sharpness", RECONSTRUCTION)) is not None:
        text += f" and {sharpness:.0%} of its sharpness"
        # Edges that are softer alone make it 0.6, as in the reconstruction of data/shapes.mp4.
        levels.append(_graded(-sharpness, -0.5, -0.3))
    level = min(levels, key=WORST_FIRST.index)
    if vae is not None:
        text += f", the VAE's round trip alone {vae:.1f} dB"
    advice = ""
    if level != GOOD:
        small = vae is not None and vae < psnr + 3
        advice = (
            "use larger frames (H, W of preprocess.py) or another checkpoint, since the VAE is the reason"
            if small
            else "use more steps or a better inversion_prompt in preprocess.py"
        )
    yield Finding(level, f"{text}; an edit keeps no more of it.", advice)


def _steadiness(figures: Values, technique: str | None) -> Iterator[Finding]:
    for gap, fair, poor, what in (
        ("1", 7, 11, "From one frame to the next"),
        ("8", 15, 25, "Over eight frames"),
    ):
        edited = _value(figures, f"warp_{gap}")
        if edited is None:
            continue
        added = _grey_levels(edited - _floor(figures, f"warp_{gap}"))
        level = _graded(added, fair, poor)
        text = (
            f"{what}, the edit adds changes of {added:.1f} grey levels beyond the source's motion."
            if added >= 0.05
            else f"{what}, the edit is as steady as the video was before."
        )
        alone = _value(figures, f"warp_{gap}", PER_FRAME)
        if alone:
            text += f" The warp error is {edited / alone:.0%} of that of frame-by-frame editing."
        advice = f"{STEADIER}; or {KEEP[technique]}" if technique in KEEP else ""
        yield Finding(level, text, advice if level != GOOD else "")


def _grey_levels(warp_error: float) -> float:
    """The root mean square change, in grey levels, that a warp error (x 1e-3) stands for."""
    return 255 * sqrt(max(0.0, warp_error) / 1e3)


def _sharpness(figures: Values, technique: str | None) -> Iterator[Finding]:
    edited = _value(figures, "sharpness")
    if edited is None:
        return
    other, name = _value(figures, "sharpness", PER_FRAME), "the same edit frame by frame"
    if other is None:
        other, name = _value(figures, "sharpness", VAE), "the VAE's round trip"
    if other is None:
        other, name = 1.0, "the source"
    share = edited / other if other else 1.0
    level = _graded(-share, -0.7, -0.4)
    text = f"The edit has {share:.0%} of the sharpness of {name}"
    if level != GOOD:
        text += ", so it may be blurred and its warp error says little, unless plain surfaces are wanted"
    advice = "lower keyframe_interval, so that less is blended" if level != GOOD else ""
    yield Finding(level, f"{text}.", _for(technique, advice))


def _drift(figures: Values, technique: str | None) -> Iterator[Finding]:
    edited = _value(figures, "drift")
    if edited is None:
        return
    beyond = max(0.0, edited - _floor(figures, "drift"))
    level = _graded(beyond, 4, 8)
    text = (
        f"The mean colour drifts by {edited:.1f} grey levels from the beginning to the end, "
        f"{_more(beyond)} than without the edit."
    )
    advice = "raise keyframe_window, so that more of the video is edited jointly"
    yield Finding(level, text, _for(technique, advice) if level != GOOD else "")


def _flicker(figures: Values, technique: str | None) -> Iterator[Finding]:
    edited = _value(figures, "flicker")
    if edited is None:
        return
    beyond = max(0.0, edited - _floor(figures, "flicker"))
    level = _graded(beyond, 2, 5)
    text = (
        f"Regions that stand still in the source flicker by {edited:.1f} grey levels, "
        f"{_more(beyond)} than without the edit."
    )
    yield Finding(level, text, _for(technique, STEADIER) if level != GOOD else "")


def _prompt(figures: Values, technique: str | None) -> Iterator[Finding]:
    edited, source = (_value(figures, "clip_prompt", name) for name in (EDIT, SOURCE))
    if edited is None or source is None:
        return
    gain = edited - source
    level = _graded(-gain, -2, -0.5)
    text = f"By CLIP the edit agrees with the prompt {abs(gain):.1f} points {'more' if gain > 0 else 'less'}"
    advice = f"{CHANGE[technique]}, or raise guidance_scale" if technique in CHANGE else ""
    yield Finding(level, f"{text} than the source does.", advice if level != GOOD else "")


def _structure(figures: Values, technique: str | None) -> Iterator[Finding]:
    edited = _value(figures, "structure")
    if edited is None:
        return
    level = _graded(edited, 50, 100)
    text = f"By DINO the layout is {edited:.0f} x 1e-3 away from the source's."
    advice = f"{KEEP[technique]}, if the layout should stay" if technique in KEEP else ""
    yield Finding(level, text, advice if level != GOOD else "")
