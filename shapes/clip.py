"""Render a clip of the world of shapes as a video: python -m shapes.clip data/shapes.mp4"""

import argparse
from pathlib import Path

from shapes.world import VALUES, render, sample_scene
from tokenflow.video.write import write_video


def main() -> None:
    """Parse, render, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("video", type=Path, help="file to write")
    parser.add_argument("--seed", type=int, default=1, help="which scene, and how it moves")
    parser.add_argument("--n_frames", type=int, default=24, help="length in frames")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--fps", type=int, default=12, help="frames per second")
    for name, values in VALUES.items():
        parser.add_argument(f"--{name}", choices=values, help=f"{name} instead of a random one")
    options = vars(parser.parse_args())
    fixed = {name: options[name] for name in VALUES if options[name] is not None}
    scene = sample_scene(options["seed"], **fixed)
    frames = (render(scene, time, options["size"])[0] for time in range(options["n_frames"]))
    write_video(options["video"], frames, options["fps"])
    print(scene.attributes.caption())


if __name__ == "__main__":
    main()
