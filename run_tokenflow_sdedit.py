"""Edit a video with SDEdit and TokenFlow.

The source is noised part of the way (start) and denoised with the new prompt; the less noise, the
closer the edit stays to the source. Run preprocess.py first.
The last line on stdout is the path of the edited video.
"""

from pathlib import Path

from cli import command, parse_with_yaml
from config import SDEditConfig


@command
def main() -> None:
    """Parse, edit, and print where the result is."""
    default = Path(__file__).parent / "configs" / "config_sdedit.yaml"
    config = parse_with_yaml(SDEditConfig, __doc__, default)

    # Slow imports, left until the configuration is known to be right.
    from edit_video import Edit, run_edit
    from inversion import CLEAN
    from techniques import Technique, sdedit

    def technique(job: Edit) -> Technique:
        made = job.inversion.manifest
        clean, inverted = job.latents(CLEAN), job.latents(made.inverted)
        return sdedit(
            config,
            job.schedule,
            job.sd.scheduler,
            clean,
            inverted,
            made.inverted_timestep,
            job.n_frames,
        )

    print(run_edit(config, "sdedit", technique))


if __name__ == "__main__":
    main()
