"""Where the pixels of a frame are in other frames of the source: found when an edit needs it, and kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from tokenflow.motion.averaging import find_reliability
from tokenflow.motion.optical_flow import DenseInverseSearch
from tokenflow.motion.pairs import KeptPairs
from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.distributed import Processes


@dataclass(frozen=True)
class DenseMotion(KeptPairs):
    """For each pixel of a frame the optical flow to another one, and how far it can be relied on.

    What is kept, (H, W, 3), is (dx, dy) in pixels, and from 0 to 1. found: how far apart frames are whose
    motion this process has seen.
    """

    found: set[int] = field(default_factory=set)

    def measure(self, frame: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The flow between two frames, uint8 RGB (H, W, 3), and its reliability: (2, H, W, 3)."""
        flow = DenseInverseSearch()
        there, back = flow.find(frame, other), flow.find(other, frame)
        forth = np.dstack([there, find_reliability(frame, other, there, back)])
        return np.stack([forth, np.dstack([back, find_reliability(other, frame, back, there)])])

    def find_all(self, distances: Sequence[int], processes: Processes) -> None:
        """Find what is not known yet of used frames so far apart; processes divide the pairs."""
        distances = [apart for apart in distances if apart not in self.found]
        if not distances:
            return
        self.create(distances, processes)
        frames = range(self.n_used)
        pairs = [(i, i + d) for i in frames for d in distances if i + d < self.n_used]
        pairs, hidden = processes.share(pairs), not processes.is_main
        each = in_parallel(lambda pair: self.find(*pair), pairs)
        for _ in tqdm(each, "Finding motion", len(pairs), unit="pair", disable=hidden):
            pass
        processes.wait()
        self.found.update(distances)
