"""Inverts and edits a clip of the world of shapes in a folder, stage by stage, as the commands do."""

import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.clips import Clip
from benchmarks.meter import Meter
from tokenflow.cli import parse
from tokenflow.config import ControlNetConfig, PnPConfig, PreprocessConfig, SDEditConfig
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.denoise import Denoiser, TokenFlowDenoiser
from tokenflow.editing.edit import EditRun
from tokenflow.editing.sweep import open_edits
from tokenflow.editing.techniques import ControlNet, PlugAndPlay, SDEdit, Technique
from tokenflow.inversion.invert import open_inversion
from util import load_frames, save_frames

CONFIGS = {"pnp": PnPConfig, "sdedit": SDEditConfig, "controlnet": ControlNetConfig}


@dataclass(frozen=True)
class Method:
    """One way to edit a clip. Two methods of the same `repr` are the same, in another run of Python too.

    edit, inversion: flags of the command that edits, and of preprocess.py; "{model}" stands for the
    checkpoint. technique: pnp, sdedit or controlnet; or a folder of the inversion, whose frames are taken
    as they are.
    """

    edit: str = ""
    inversion: str = ""
    technique: str = "pnp"
    denoiser: type[Denoiser] = TokenFlowDenoiser


@dataclass(frozen=True)
class Commands:
    """One clip, drawn in a folder of PNGs, and what the commands do to it.

    steps: of the inversion and of the edits. options: flags of preprocess.py and of the edits, such as
    --dtype. Stages are measured by the `meter`.
    """

    folder: Path
    clip: Clip
    size: int  # height and width in pixels
    steps: int
    model: Path
    options: list[str] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)

    def invert(self, flags: str = "") -> Path:
        """Invert the clip as preprocess.py does, unless it is inverted; returns the inversion's folder."""
        argv = [*self._common, "--inversion_prompt", self.clip.source_prompt]
        argv += ["--save_dir", self._latents(flags), "--H", str(self.size), "--W", str(self.size)]
        argv += ["--steps", str(self.steps), "--save_steps", str(self.steps), *self._split(flags)]
        config = parse(PreprocessConfig, "", argv=argv)
        self._draw()
        stage = self.meter.stage
        with open_inversion(config) as run:
            if not run.is_finished:
                with stage("inversion: weights"):
                    self._read_weights(run.sd)
                with stage("inversion"):
                    run.read_frames()
                    run.invert()
                with stage("reconstruction"):
                    run.reconstruct()
                with stage("inversion: videos"):
                    run.finish()
        return run.final.folder

    def edit(self, method: Method) -> np.ndarray:
        """Edit the clip as a run_tokenflow_*.py does: the frames (N, H, W, 3)."""
        inverted, frames = self.invert(method.inversion), range(self.clip.n_frames)
        if method.technique not in CONFIGS:
            return load_frames(inverted / method.technique, frames)
        argv = [*self._common, "--latents_path", self._latents(method.inversion)]
        argv += ["--prompt", self.clip.prompt, "--output_path", tempfile.mkdtemp(dir=self.folder)]
        argv += ["--n_inversion_steps", str(self.steps), "--n_timesteps", str(self.steps)]
        argv += self._split(method.edit)
        yaml = f"config_{method.technique}.yaml"
        config = parse(CONFIGS[method.technique], "", yaml, argv)
        stage = self.meter.stage
        with open_edits([config], method.technique) as edits:
            for run in edits:
                with stage("edit: weights"):
                    self._read_weights(run.sd)
                with stage("edit"):
                    edited = run.edit(build_technique(run, method.technique), method.denoiser)
                with stage("edit: decoding, videos"):
                    run.write(edited)
        return load_frames(edits.result.parent / "frames", frames)

    @property
    def _common(self) -> list[str]:
        clip = ["--data_path", str(self.folder / "clip"), "--n_frames", str(self.clip.n_frames)]
        return [*clip, "--model", str(self.model), *self.options]

    def _latents(self, flags: str) -> str:
        """Where inversions with these flags go."""
        return str(self.folder / f"latents {flags}".replace("/", "_"))

    def _split(self, flags: str) -> list[str]:
        return shlex.split(flags.format(model=self.model))

    def _draw(self) -> None:
        folder = self.folder / "clip"
        if not folder.exists():
            folder.mkdir(parents=True)
            for index, frame in enumerate(self.clip.draw(self.size)):
                save_frames(folder, index, frame[None])

    def _read_weights(self, sd: StableDiffusion) -> None:
        """Read what loading only maps to files on a CPU, lest the first pass be charged with it."""
        for network in filter(None, (sd.vae, sd.text_encoder, sd.text_encoder_2, sd.unet)):
            for parameter in network.parameters():
                parameter.sum()
        self.meter.watch(sd.unet)


def build_technique(run: EditRun, name: str) -> Technique:
    """What the command of that technique gives to the run of an edit."""
    if name == "pnp":
        return PlugAndPlay(run.config, run.schedule, run.source)
    if name == "sdedit":
        return SDEdit(run.config, run.schedule, run.source, run.sd.scheduler)
    run.find_control_images()
    return ControlNet(run.config, run.schedule, run.source, run.control_images)
