"""Edit a video with a Canny ControlNet and TokenFlow.

The edges of the source's frames hold the layout; their video is saved as control.mp4. An inversion
under the same ControlNet is used where there is one. Run preprocess.py first.
The last line on stdout is the path of the edited video.
"""

from pathlib import Path

from config import ControlNetConfig, command, parse_with_yaml


@command
def main() -> None:
    """Parse, edit, and print where the result is."""
    default = Path(__file__).parent / "configs" / "config_controlnet.yaml"
    config = parse_with_yaml(ControlNetConfig, __doc__, default)

    # Slow imports, left until the configuration is known to be right.
    import torch

    from control import canny
    from diffusion import Control
    from edit_video import Edit, run_edit
    from editor import Technique
    from inversion import noisy
    from util import load_frames, save_frames, write_video_from_folders

    def technique(job: Edit) -> Technique:
        folder = job.folder / "control"
        folder.mkdir(exist_ok=True)
        for index in range(job.n_frames):
            frame = load_frames(job.inversion.source, [index])
            save_frames(folder, index, canny(frame, config.canny_low, config.canny_high))
        video = job.folder / "control.mp4"
        write_video_from_folders(video, [folder], job.n_frames, job.inversion.fps)
        # The source stream sees what the inversion saw.
        scales = torch.tensor(
            [job.inversion.control_scale, config.control_scale, config.control_scale]
        )

        def control(frames: torch.Tensor) -> Control:
            images = job.sd.to_images(load_frames(folder, frames.tolist()))  # n 3 H W
            return Control(images.repeat(3, 1, 1, 1), scales.repeat_interleave(len(frames)))

        latents = job.latents(noisy(job.schedule.timesteps[0]))
        return Technique(latents, job.schedule, control=control)

    print(run_edit(config, "controlnet", technique))


if __name__ == "__main__":
    main()
