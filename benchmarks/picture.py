"""Videos side by side in one animated picture, such as that of README.md, which `make picture` makes.

python -m benchmarks.picture data/demo.webp source=demo/source "this code=demo/pnp_shapes/frames"
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from tokenflow.evaluation.contact_sheet import contact_sheet
from util import load_frames

SIDE = 256  # pixels, of each video
QUALITY = 80  # of WebP, up to 100


def main() -> None:
    """Read the frames, put them side by side, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the picture, a .webp or .gif file")
    parser.add_argument("videos", nargs="+", help="title=folder of frames, from left to right")
    parser.add_argument("--fps", type=float, default=12, help="frames per second")
    args = parser.parse_args()
    named = [video.rpartition("=") for video in args.videos]
    write_picture(args.output, {title: Path(folder) for title, _, folder in named}, args.fps)


def write_picture(output: Path, folders: dict[str, Path], fps: float) -> None:
    """Write the frames of folders side by side below their titles, as many as the shortest has."""
    n_frames = min(len(list(folder.glob("*.png"))) for folder in folders.values())
    videos = {title: load_frames(folder, range(n_frames)) for title, folder in folders.items()}
    animation = cv2.Animation()
    animation.frames = [
        cv2.cvtColor(
            np.concatenate([_draw(title, video[index]) for title, video in videos.items()], axis=1),
            cv2.COLOR_RGB2BGR,
        )
        for index in range(n_frames)
    ]
    animation.durations = np.full(n_frames, round(1000 / fps))
    cv2.imwriteanimation(str(output), animation, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])


def _draw(title: str, frame: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) enlarged below its title."""
    large = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return contact_sheet({title: large[None]})


if __name__ == "__main__":
    main()
