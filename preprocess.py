"""Invert a video: encode its frames, run DDIM inversion, save the latents, reconstruct the video.

The last line on stdout is the path of the reconstruction, inverted.mp4, or, without one, of the folder.
Look at it: an edit can be no better than it is. A run that was killed is gone on with.
"""

from cli import command, parse
from config import PreprocessConfig


@command
def main() -> None:
    """Parse, invert, and print where the result is."""
    config = parse(PreprocessConfig, __doc__)

    # Slow imports, left until the configuration is known to be right.
    from invert_video import run_inversion

    print(run_inversion(config))


if __name__ == "__main__":
    main()
