"""Invert a video: encode its frames, run DDIM inversion, save the latents, reconstruct the video.

    python preprocess.py --data_path wolf.mp4 --inversion_prompt "a wolf in the snow"

The last line on stdout is the path of the reconstruction, inverted.mp4, or of its folder if there is none.
Look at the reconstruction: an edit can be no better. A killed run is resumed by the same command.
"""

from tokenflow.cli import command, parse
from tokenflow.config import PreprocessConfig


@command
def main() -> str:
    """Parse, open, invert, reconstruct, and return where the result is."""
    config = parse(PreprocessConfig, __doc__)

    # Slow imports, after the configuration is known to be valid.
    from tokenflow.inversion.invert import open_inversion

    with open_inversion(config) as run:
        if not run.is_finished:
            run.read_frames()
            run.invert()
            run.reconstruct()
            run.finish()
    return str(run.result)


if __name__ == "__main__":
    main()
