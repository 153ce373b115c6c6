"""Held-out clips of the world of shapes, each with an edit and the exact truth about both."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from shapes.world import (
    BACKGROUND,
    OBJECT,
    VALUES,
    Scene,
    find_flow,
    find_top_layer,
    pixel_centers,
    render,
    sample_scene,
)

FIRST_SEED = 2_000_000  # far from the seeds that the checkpoint and the judge were trained on
SIZE = 128  # pixels
BOTH_PLAIN = {"texture": "plain", "background_texture": "plain"}
BOTH_TEXTURED = {"texture": "striped", "background_texture": "dotted"}


@dataclass(frozen=True)
class Kind:
    """Which attributes an edit changes; what source and edited clip have, where it is not random."""

    changes: tuple[str, ...]
    source: dict[str, str] = field(default_factory=dict)
    edited: dict[str, str] = field(default_factory=dict)


# Any few that follow each other hold textured and plain clips.
KINDS = {
    "colour": Kind(("color",)),
    "plain source": Kind(tuple(BOTH_PLAIN), source=BOTH_PLAIN),
    "texture": Kind(("texture",)),
    "plain target": Kind(tuple(BOTH_PLAIN), source=BOTH_TEXTURED, edited=BOTH_PLAIN),
    "background": Kind(("background_color",)),
    "plain source and target": Kind(("color", "background_color"), source=BOTH_PLAIN),
    "several": Kind(("color", "background_texture")),
}


@dataclass(frozen=True)
class Clip:
    """A scene and the attributes that an edit gives it."""

    kind: str
    scene: Scene
    changes: dict[str, str]
    n_frames: int

    @cached_property
    def frames(self) -> np.ndarray:
        """The source: uint8 RGB (N, H, W, 3)."""
        return np.stack(list(self.draw(SIZE)))

    def draw(self, size: int) -> Iterator[np.ndarray]:
        """The source's frames, uint8 RGB (H, W, 3), at a height and width of `size` pixels."""
        return (render(self.scene, time, size)[0] for time in range(self.n_frames))

    @property
    def is_plain(self) -> bool:
        """Whether its kind of edit starts from, or leads to, plain surfaces; else it is textured."""
        return BOTH_PLAIN in (KINDS[self.kind].source, KINDS[self.kind].edited)

    @property
    def source_prompt(self) -> str:
        """Caption of the source."""
        return self.scene.attributes.caption()

    @property
    def prompt(self) -> str:
        """Caption of the edited clip."""
        return self.scene.with_attributes(**self.changes).attributes.caption()

    def truth(self, edited: bool) -> dict[str, str]:
        """The value that each edited, or each kept, attribute must have after the edit."""
        attributes = self.scene.with_attributes(**self.changes).attributes
        names = [name for name in VALUES if (name in self.changes) == edited]
        return {name: getattr(attributes, name) for name in names}

    @property
    def plain_layers(self) -> list[int]:
        """Those of BACKGROUND and OBJECT that are plain in the source, which does not show how they move."""
        attributes = self.scene.attributes
        textures = {BACKGROUND: attributes.background_texture, OBJECT: attributes.texture}
        return [layer for layer, texture in textures.items() if texture == "plain"]

    def find_layers(self, time: int) -> np.ndarray:
        """Which layer is seen at each pixel of a frame (H, W)."""
        return find_top_layer(self.scene, time, pixel_centers(SIZE))

    def stays(self, time: int) -> np.ndarray:
        """Pixels (H, W), bool, of the layers that the edit does not name."""
        is_object = self.find_layers(time) == OBJECT
        background_changes = any(name.startswith("background") for name in self.changes)
        object_changes = any(not name.startswith("background") for name in self.changes)
        return (is_object & (not object_changes)) | (~is_object & (not background_changes))

    def find_flow(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact flow (H, W, 2) in pixels from frame i to frame j, and where it is valid (H, W)."""
        return find_flow(self.scene, i, j, SIZE)


def held_out_clips(n_clips: int, n_frames: int) -> list[Clip]:
    """The first `n_clips` held-out clips; the kinds of edit take turns."""
    return [
        _clip(FIRST_SEED + index, list(KINDS)[index % len(KINDS)], n_frames)
        for index in range(n_clips)
    ]


def _clip(seed: int, name: str, n_frames: int) -> Clip:
    rng, kind = np.random.default_rng(seed), KINDS[name]
    scene = sample_scene(rng, barred=False, **kind.source)
    changes = dict(kind.edited)
    for attribute in kind.changes:
        taken = {getattr(scene.attributes, attribute)}
        if attribute in ("color", "background_color"):  # of one colour, the object would be unseen
            taken |= {scene.attributes.color, scene.attributes.background_color, *changes.values()}
        free = [value for value in VALUES[attribute] if value not in taken]
        changes.setdefault(attribute, str(rng.choice(free)))
    return Clip(name, scene, changes, n_frames)
