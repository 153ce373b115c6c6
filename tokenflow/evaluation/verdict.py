"""What metrics say in words: what is good, what is poor, and which option to change.

The thresholds are rules of thumb, chosen with the numbers of docs/benchmarks.md in view. They have not been
measured. A source that is poor itself, such as a noisy one, never makes an edit poor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt

from tokenflow.evaluation.meters import Means
from tokenflow.evaluation.subject import EDIT, PER_FRAME, RECONSTRUCTION, SOURCE, VAE

# Below this PSNR (dB) textures and small objects of the source are lost, also in an edit. It is no higher,
# since Stable Diffusion's VAE itself has 23.4 +- 3.8 on photographs of 256x256 pixels (COCO; the model card
# of stabilityai/sd-vae-ft-mse).
POOR_PSNR = 20.0
WORST_FIRST = POOR, FAIR, GOOD = "poor", "fair", "good"

# By technique: which options keep more of the source, and which change more.
OPTIONS = {
    "pnp": ("raise pnp_attn_t or pnp_f_t", "lower pnp_attn_t and pnp_f_t"),
    "sdedit": ("lower start", "raise start"),
    "controlnet": ("raise control_scale", "lower control_scale"),
    None: ("", ""),
}
STEADIER = "Lower guidance_scale or keyframe_interval"

Values = Mapping[str, float]  # of one metric, by video


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know: how good it is, why, and what to do (empty if nothing)."""

    level: str
    text: str
    advice: str = ""


def verdict(metrics: Means, technique: str | None = None) -> list[Finding]:
    """Findings about an edit, or about a reconstruction if there is no edit, the poor ones first.

    technique: pnp, sdedit, controlnet, or None for another program's edit, to which no option can be
    recommended.
    """
    findings = []
    if RECONSTRUCTION in metrics.get("psnr", {}):
        findings.append(judge_reconstruction(metrics["psnr"], metrics.get("sharpness", {})))
    for key, judge in JUDGES.items():
        if EDIT in metrics.get(key, {}):
            finding = judge(metrics[key], technique)
            findings.append(finding if technique else replace(finding, advice=""))
    findings = [replace(f, advice="") if f.level == GOOD else f for f in findings]
    return sorted(findings, key=lambda finding: WORST_FIRST.index(finding.level))


def judge_reconstruction(psnr: Values, sharpness: Values) -> Finding:
    """How much of the source there is for an edit to keep."""
    level = _grade(-psnr[RECONSTRUCTION], fair=-25, poor=-POOR_PSNR)
    text = f"The reconstruction has a PSNR of {psnr[RECONSTRUCTION]:.1f} dB against the source"
    if RECONSTRUCTION in sharpness:
        text += f" and {sharpness[RECONSTRUCTION]:.0%} of its sharpness"
        # Edges that are softer alone make it 0.6, as in the reconstruction of data/shapes.mp4.
        other = _grade(-sharpness[RECONSTRUCTION], fair=-0.5, poor=-0.3)
        level = min(level, other, key=WORST_FIRST.index)
    advice = "Use more steps or a better inversion_prompt in preprocess.py."
    if VAE in psnr:
        text += f"; the VAE's round trip alone has {psnr[VAE]:.1f} dB"
        if psnr[VAE] < psnr[RECONSTRUCTION] + 3:
            advice = "The VAE is the limit: use larger frames (H, W in preprocess.py) or another checkpoint."
    return Finding(level, f"{text}. An edit keeps no more of the source than that.", advice)


def judge_steadiness(
    warp_errors: Values, technique: str | None, when: str, fair: float, poor: float
) -> Finding:
    """Whether frames differ by more than the source's motion."""
    keep, _ = OPTIONS[technique]
    # Warp errors are squares, x 1e-3, and become grey levels.
    added = 255 * sqrt(_exceed_source(warp_errors) / 1e3)
    text = f"{when}, the edit changes by {added:.1f} grey levels beyond the source's motion."
    if added < 0.05:
        text = f"{when}, the edit is as steady as the source."
    if warp_errors.get(PER_FRAME):
        share = warp_errors[EDIT] / warp_errors[PER_FRAME]
        text += f" Its warp error is {share:.0%} of that of frame-by-frame editing."
    return Finding(_grade(added, fair, poor), text, f"{STEADIER}, or {keep}.")


def judge_sharpness(sharpness: Values, technique: str | None) -> Finding:
    """Whether the edit is blurred; beside it is the video that is nearest to what it could be."""
    other, what = 1.0, "the source"
    for name, words in ((VAE, "the VAE's round trip"), (PER_FRAME, "the same edit frame by frame")):
        if name in sharpness:
            other, what = sharpness[name], words
    share = sharpness[EDIT] / other if other else 1.0
    level = _grade(-share, fair=-0.7, poor=-0.4)
    text = f"The edit has {share:.0%} of the sharpness of {what}."
    if level != GOOD:
        text += (
            " Unless plain surfaces are wanted, it is blurred, and a low warp error means little."
        )
    return Finding(level, text, "Lower keyframe_interval, so that less is blended.")


def judge_change(
    changes: Values, technique: str | None, what: str, advice: str, fair: float, poor: float
) -> Finding:
    """Whether colours drift or flicker by more grey levels than without the edit."""
    added = _exceed_source(changes)
    more = f"{added:.1f} more" if added >= 0.05 else "no more"
    text = f"{what} by {changes[EDIT]:.1f} grey levels, {more} than without the edit."
    return Finding(_grade(added, fair, poor), text, advice)


def judge_clip_score(scores: Values, technique: str | None) -> Finding:
    """Whether the edit shows what the prompt says."""
    gain = scores[EDIT] - scores[SOURCE]
    more = "higher" if gain > 0 else "lower"
    text = f"The edit's CLIP score is {abs(gain):.1f} points {more} than the source's."
    _, change = OPTIONS[technique]
    advice = f"To follow the prompt more, {change}, or raise guidance_scale."
    return Finding(_grade(-gain, fair=-2, poor=-0.5), text, advice)


def judge_structure(distances: Values, technique: str | None) -> Finding:
    """Whether the layout stayed."""
    text = f"The structure distance (DINO) between edit and source is {distances[EDIT]:.0f} x 1e-3."
    keep, _ = OPTIONS[technique]
    advice = f"If the layout should stay, {keep}."
    return Finding(_grade(distances[EDIT], fair=50, poor=100), text, advice)


JUDGES = {
    "warp_1": partial(judge_steadiness, when="From one frame to the next", fair=7, poor=11),
    "warp_8": partial(judge_steadiness, when="Over eight frames", fair=15, poor=25),
    "sharpness": judge_sharpness,
    "drift": partial(
        judge_change,
        what="From the first second to the last, the mean colour drifts",
        advice="Raise keyframe_window, so that more of the video is edited jointly.",
        fair=4,
        poor=8,
    ),
    "flicker": partial(
        judge_change,
        what="Regions that stand still in the source flicker",
        advice=f"{STEADIER}.",
        fair=2,
        poor=5,
    ),
    "clip_prompt": judge_clip_score,
    "structure": judge_structure,
}


def _grade(value: float, fair: float, poor: float) -> str:
    """The level of a value that is good below `fair` and poor from `poor` on; less is better."""
    return GOOD if value < fair else FAIR if value < poor else POOR


def _exceed_source(values: Values) -> float:
    """By how much the edit exceeds what the source and the VAE's round trip have themselves."""
    return max(0.0, values[EDIT] - max(values.get(name, 0.0) for name in (SOURCE, VAE)))
