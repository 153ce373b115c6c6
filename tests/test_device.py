"""The census counts what it should, and no pass waits for the device more often than it must."""

from functools import partial

import torch

from benchmarks.census import Census
from benchmarks.device import (
    TalliedDenoiser,
    Tally,
    Workload,
    rows_of,
    tallied,
)
from benchmarks.job import Latents
from shapes.checkpoint import TINY, build_unet, build_vae
from tokenflow.config import PnPConfig
from tokenflow.diffusion.ddim import Schedule
from tokenflow.editing.denoise import Edit
from tokenflow.editing.source import Source
from tokenflow.editing.techniques import plug_and_play
from tokenflow.inversion.files import noisy
from tokenflow.propagation.nearest import find_nearest
from tokenflow.runtime.transfer import to_device

# Blocking copies in a pass, at most. Every pass brings its noise to the host; one that records brings
# source features too, and a decoded frame is asked whether it is finite. When layers still copied what frames
# blend, each for itself, these were 2, 3, 3, 3, 197, 4, 164 and 70 at Stable Diffusion's size.
MOST_BLOCKING = {
    ("encoding", "VAE"): 1,
    ("decoding", "VAE"): 2,
    ("text", "prompt"): 1,
    ("inversion", "plain"): 1,
    ("inversion", "with ControlNet"): 1,
    ("reconstruction", "features kept"): 3,
    ("editing", "joint"): 1,
    ("editing", "propagation, three streams"): 1,
    ("editing", "propagation, kept features"): 1,
    ("editing", "consensus of a frame"): 4,
}


def tiny_networks():
    return build_unet(TINY), build_vae(TINY)


def test_few_copies_are_waited_for():
    config = PnPConfig(data_path="", prompt="x", batch_size=3, pnp_attn_t=1, pnp_f_t=1)
    workload = Workload("tiny", 64, 64, 5, config)
    rows, edit = rows_of(workload, tiny_networks)
    blocking = {(row["stage"], row["kind"]): row["blocking_copies"] for row in rows}
    assert set(blocking) == set(MOST_BLOCKING)
    assert all(blocking[key] <= most for key, most in MOST_BLOCKING.items()), blocking
    for row in rows:
        decodes = row["stage"] == "decoding" or "consensus" in row["kind"]
        assert row["dependent"] == decodes  # whether the frame is finite
        assert row["launches"] < 1300 and row["shapes"] == 1 and row["flops"] > 1e6
        assert row["peak_bytes"] > 2 * sum(p.numel() for p in build_unet(TINY).parameters())
    kept, three = (
        {r["kind"]: r for r in rows}[f"propagation, {x}"]
        for x in ("kept features", "three streams")
    )
    assert kept["flops"] < three["flops"] and kept["disk_bytes"] > three["disk_bytes"]
    assert edit["steps"] > edit["consensus"] > edit["decoding"] > 0 < edit["consensus_share"] < 1


@torch.no_grad()
def test_few_copies_are_waited_for_in_windows():
    """Eight keyframes in windows: the passes before the first frames are done."""
    census, latents = Census(torch.device("cuda:0")), torch.zeros(8, 4, 8, 8)
    sd = tallied(Tally(census), tiny_networks)
    config = PnPConfig(data_path="", prompt="x", keyframe_interval=1, keyframe_window=7)
    schedule = Schedule.of(sd.scheduler, 10)
    source = Source(Latents({noisy(t): latents for t in schedule.timesteps}), 8)
    technique = plug_and_play(config, schedule, source)
    with census:
        edit = Edit(sd, technique, source, ("", "", ""), config)
        with TalliedDenoiser.installed(edit) as denoiser:
            t = schedule.timesteps[0]
            next(denoiser.noise(latents, t, denoiser.chunks(t)))
    ((key, row),) = sd.tally.rows.items()
    assert key == ("editing", "joint, windowed") and row.shapes > 1
    assert row.most["blocking_copies"] == 1 and row.most["dependent"] == 0


@torch.no_grad()
def test_census_by_hand():
    census = Census(torch.device("cuda:0"))
    host = torch.arange(24.0).view(4, 6)

    def counted(function):
        census.take()
        kept = function()
        counts = census.take()
        return kept, [counts.blocking_copies, counts.dependent, counts.launches, counts.flops]

    with census:
        there, counts = counted(partial(host.to, census.device))
        assert counts == [1, 0, 0, 0] and there.is_cuda
        assert counted(lambda: to_device(host, census.device))[1] == [0, 0, 0, 0]
        assert counted(lambda: there @ there.T)[1] == [0, 0, 1, 2 * 4 * 6 * 4]
        assert counted(lambda: there[1:, None].transpose(0, 1))[1] == [0, 0, 0, 0]  # views
        assert counted(lambda: there[torch.tensor([0, 2])])[1] == [1, 0, 1, 0]
        assert counted(lambda: there[there.argmax(-1)])[1] == [0, 0, 2, 0]
        assert counted(lambda: bool((there > 0).all()))[1] == [1, 1, 2, 0]
        assert counted(lambda: (host @ host.T).tolist()) == ((host @ host.T).tolist(), [0, 0, 0, 0])
        back, counts = counted(there.cpu)
        assert counts == [1, 0, 0, 0] and back.tolist() == torch.zeros(4, 6).tolist()
        found, counts = counted(lambda: find_nearest(there[None], there))
        assert found.shape == (1, 4) and counts == [0, 0, 3, 2 * 4 * 4 * 6]
        census.take()
        before = census.take().peak_bytes
        temporary = there + there  # 96 bytes
        del temporary
        again = there + there
        assert census.take().peak_bytes == before + again.nbytes
