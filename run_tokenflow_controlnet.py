"""Edit a video with a Canny ControlNet and TokenFlow.

The edges of the source's frames hold the layout; their video is saved as control.mp4. An inversion
under the same ControlNet is used where there is one. Run preprocess.py first.
The last line on stdout is the path of the edited video.
"""

from pathlib import Path

from cli import command, parse_with_yaml
from config import ControlNetConfig


@command
def main() -> None:
    """Parse, edit, and print where the result is."""
    default = Path(__file__).parent / "configs" / "config_controlnet.yaml"
    config = parse_with_yaml(ControlNetConfig, __doc__, default)

    # Slow imports, left until the configuration is known to be right.
    import torch

    from control import canny
    from edit_video import Edit, run_edit
    from editor import Technique
    from techniques import controlnet
    from util import load_frames, save_frames, write_video_from_folders

    def technique(job: Edit) -> Technique:
        folder = job.folder / "control"
        folder.mkdir(exist_ok=True)
        for index in range(job.n_frames):
            frame = load_frames(job.inversion.source, [index])
            save_frames(folder, index, canny(frame, config.canny_low, config.canny_high))
        video = job.folder / "control.mp4"
        write_video_from_folders(video, [folder], job.n_frames, job.inversion.fps)

        def images(frames: torch.Tensor) -> torch.Tensor:
            return job.sd.to_images(load_frames(folder, frames.tolist()))

        scales = job.inversion.control_scale, config.control_scale
        return controlnet(job.schedule, job.first_latents, images, *scales)

    print(run_edit(config, "controlnet", technique))


if __name__ == "__main__":
    main()
