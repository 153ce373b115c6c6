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
    import numpy as np
    import torch

    from control import canny
    from edit_video import Edit, run_edit
    from techniques import Technique, controlnet
    from util import load_frames, write_video

    def technique(job: Edit) -> Technique:
        def edges(frames: list[int]) -> np.ndarray:
            shown = load_frames(job.inversion.source, frames)
            return canny(shown, config.canny_low, config.canny_high)

        def images(frames: torch.Tensor) -> torch.Tensor:
            return job.sd.to_images(edges(frames.tolist()))

        if job.processes.is_main:
            video = (edges([index])[0] for index in range(job.n_frames))
            write_video(job.folder / "control.mp4", video, job.inversion.manifest.frame_rate)
        scales = job.inversion.control_scale, config.control_scale
        return controlnet(job.schedule, job.first_latents, job.n_frames, images, *scales)

    print(run_edit(config, "controlnet", technique))


if __name__ == "__main__":
    main()
