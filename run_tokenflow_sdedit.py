"""Edit a video with SDEdit and TokenFlow.

    python run_tokenflow_sdedit.py --data_path wolf.mp4 --prompt "a robotic wolf in the snow" --start 0.8

The source is noised part of the way (start) and denoised with the new prompt. With less noise the
edit stays closer to the source. Run preprocess.py first.
The last line on stdout is the path of the edited video.
"""

from tokenflow.cli import command, parse
from tokenflow.config import SDEditConfig


@command
def main() -> None:
    """Parse, open, edit, write, and print where the result is."""
    config = parse(SDEditConfig, __doc__, "config_sdedit.yaml")

    # Slow imports, after the configuration is known to be valid.
    from tokenflow.editing.run import open_edit
    from tokenflow.editing.techniques import sdedit
    from tokenflow.inversion.files import CLEAN

    with open_edit(config, "sdedit") as run:
        if not run.is_finished:
            manifest = run.inversion.manifest
            latents = run.latents(CLEAN), run.latents(manifest.inverted), manifest.inverted_timestep
            technique = sdedit(config, run.schedule, run.sd.scheduler, *latents)
            run.write(run.edit(technique))
    print(run.video)


if __name__ == "__main__":
    main()
