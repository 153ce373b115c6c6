"""The edit of a video: the only loop over the steps of an edit."""

from collections.abc import Iterator

import torch

from config import EditConfig
from denoiser import Denoiser, Source, TokenFlowDenoiser
from diffusion import StableDiffusion, check_finite, ddim_step
from techniques import Technique
from tokenflow_utils import install_tokenflow
from trajectory import Trajectory


def edit(
    sd: StableDiffusion,
    technique: Technique,
    source: Source,
    prompts: tuple[str, str, str],
    config: EditConfig,
    trajectory: Trajectory,
    denoiser: type[Denoiser] = TokenFlowDenoiser,
) -> Iterator[int]:
    """Edit a video; its latents go to the `trajectory`, from whose last step the edit goes on.

    Yields the number of steps done, the first time at once. Processes divide the frames of each step.
    prompts: of the source, uncond and cond streams.
    denoiser: how frames are made consistent; benchmarks put what they compare with here.
    """
    schedule, share = technique.schedule, trajectory.processes.share
    with install_tokenflow(sd.unet) as flow:
        predictor = denoiser(sd, flow, technique, source, prompts, config)
        done = trajectory.steps_done
        if done is None:
            done = 0
            with trajectory.writing(0) as latents:
                frames_of_video = torch.arange(technique.n_frames)
                for frames in share(frames_of_video.split(config.frames_at_once)):
                    latents[frames] = technique.initial(frames)
        yield done
        for step in range(done, len(schedule.timesteps)):
            t, alphas = schedule.timesteps[step], schedule.alphas[step : step + 2]
            latents = trajectory.latents(step)
            with trajectory.writing(step + 1) as cleaner:
                chunks = share(predictor.chunks(t))
                for frames, noise in predictor.noise(latents, t, chunks):
                    moved = ddim_step(latents[frames], noise, *alphas)
                    check_finite(moved, f"the edited latents at timestep {t}")
                    cleaner[frames] = moved
            yield step + 1
