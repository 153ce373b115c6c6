"""Images and folders of frames."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from tokenflow.errors import DamagedError, UserError, is_out_of_resources, is_text
from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.digests import digest_of, file_digest

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
BLACK, WHITE = 0, 255
MAX_SIDE = 1 << 15  # pixels of a frame, which OpenCV can resize


def check_input(path: Path) -> None:
    """Raise UserError unless `path` is a file or folder; a pipe or device could be waited for without end."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is neither a file nor a folder; give a copy that is one")


def list_images(folder: Path) -> list[Path]:
    """The image files of `folder` in natural order (2 before 10). Raises UserError if there are none."""
    images = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")  # hidden
    ]
    if not images:
        raise UserError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    for image in images:
        if not is_text(image.name):  # such a name crashes OpenCV
            raise UserError(f"{folder}: the name {image.name!r} is not UTF-8; rename that image")
    return sorted(
        images,
        key=lambda p: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.name)],
    )


def read_image(path: Path, background: int = WHITE) -> np.ndarray:
    """One image file as uint8 RGB (H, W, 3). Raises UserError.

    background: the grey that is seen where the image is transparent.
    """
    check_input(path)
    # OpenCV would show what is hidden, and reports errors of what Pillow cannot read.
    with suppress(OSError, Image.DecompressionBombError), Image.open(path) as image:
        if image.has_transparency_data:
            return lay_on(background, np.asarray(ImageOps.exif_transpose(image).convert("RGBA")))
    try:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error as error:
        if is_out_of_resources(error):
            raise
        raise UserError(f"{path}: cannot be decoded as an image ({error.err})") from error
    if image is None:
        raise UserError(f"{path}: cannot be decoded as an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def lay_on(background: int, pixels: np.ndarray) -> np.ndarray:
    """RGB and alpha, uint8 (H, W, 4), as RGB (H, W, 3) on a grey of 0 to 255."""
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def write_image(path: Path, frame: np.ndarray) -> None:
    """Write uint8 RGB (H, W, 3) as an image file. Raises OSError."""
    _, encoded = cv2.imencode(path.suffix, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    path.write_bytes(encoded)  # OpenCV itself does not notice that a disk is full


def frame_path(folder: Path, index: int) -> Path:
    """The path of frame `index` in a folder of frames."""
    return folder / f"{index:05d}.png"


def read_frame(folder: Path, index: int) -> np.ndarray:
    """A frame of a folder written by `save_frames`, as uint8 RGB (H, W, 3). Raises DamagedError."""
    try:
        return read_image(frame_path(folder, index))
    except UserError as error:  # it was not the user who wrote it
        raise DamagedError(str(error)) from error


def load_frames(folder: Path, indices: Iterable[int]) -> np.ndarray:
    """Frames of such a folder, as uint8 RGB (n, H, W, 3)."""
    return np.stack(list(in_parallel(partial(read_frame, folder), indices)))


def read_frames(folder: Path, n_frames: int) -> Iterator[np.ndarray]:
    """Yield the first `n_frames` frames of such a folder, uint8 RGB (H, W, 3), one by one."""
    return in_parallel(partial(read_frame, folder), range(n_frames))


def save_frames(folder: Path, start: int, frames: Iterable[np.ndarray]) -> int:
    """Write uint8 RGB frames (H, W, 3) as PNG into `folder`, numbered from `start`; returns how many."""
    numbered = ((frame_path(folder, index), frame) for index, frame in enumerate(frames, start))
    return sum(1 for _ in in_parallel(lambda named: write_image(*named), numbered))


def fit_frame(frame: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """Fit a frame (h, w, 3) into (height, width, 3).

    `crop` keeps the aspect ratio and cuts out the centre, `pad` keeps it and adds black borders,
    `stretch` changes it. A frame of the right size is returned unchanged.
    """
    h, w = frame.shape[:2]
    if (h, w) == (height, width):
        return frame
    ratios = height / h, width / w
    scale = {"crop": max(ratios), "pad": min(ratios), "stretch": None}[mode]
    new_h, new_w = (height, width) if scale is None else (round(h * scale), round(w * scale))
    if max(new_h, new_w) > MAX_SIDE or min(new_h, new_w) < 1:
        raise UserError(
            f"resize: a frame of {h} x {w} pixels would become {new_h} x {new_w} with {mode}; use stretch"
        )
    shrinks = new_h * new_w < h * w
    frame = cv2.resize(
        frame, (new_w, new_h), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )
    top, left = max(0, (new_h - height) // 2), max(0, (new_w - width) // 2)
    frame = frame[top : top + height, left : left + width]
    above, before = (height - frame.shape[0]) // 2, (width - frame.shape[1]) // 2
    return cv2.copyMakeBorder(
        frame,
        above,
        height - frame.shape[0] - above,
        before,
        width - frame.shape[1] - before,
        cv2.BORDER_CONSTANT,
    )


def digest_content(path: Path) -> str:
    """The digest of all bytes of a file, or of the images of a folder in their order and with their names.

    Two videos are equal if it is, wherever they lie. Raises UserError.
    """
    check_input(path)
    if not path.is_dir():
        return file_digest(path)
    images = list_images(path)
    for image in images:
        check_input(image)
    digests = in_parallel(file_digest, images)
    lines = (f"{image.name} {digest}\n" for image, digest in zip(images, digests, strict=True))
    return digest_of(line.encode() for line in lines)
