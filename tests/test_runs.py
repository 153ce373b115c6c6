"""Runs that are divided among processes, killed, repeated, or too large for the device."""

import contextlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from test_cli import ROOT, TECHNIQUES, last_line, refusal, run
from test_damage import WAYS, damaged

import util
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.errors import UserError
from tokenflow.evaluation.report import discard_report
from tokenflow.motion.dense import DenseMotion
from tokenflow.runtime import distributed, run_folder
from tokenflow.runtime.batching import Batches, Limits
from tokenflow.runtime.distributed import Processes

N_FRAMES, STEPS, KILLS = 13, 4, 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a clip of thirteen images in `clip`."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "clip").mkdir()
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    frames = [np.roll(still, 3 * index, axis=1).astype(np.uint8) for index in range(N_FRAMES)]
    util.save_frames(folder / "clip", 0, frames)
    return folder


def invert_flags(checkpoint, save_dir):
    flags = ["--data_path", "clip", "--model", checkpoint, "--H", 64, "--W", 64, "--steps", STEPS]
    flags += ["--save_steps", STEPS, "--n_frames", N_FRAMES, "--batch_size", 2]
    return [*flags, "--keyframe_interval", 2, "--dtype", "float32", "--save_dir", save_dir]


def edit_flags(checkpoint, latents, out, technique="pnp"):
    flags = ["--data_path", "clip", "--model", checkpoint, "--prompt", "a dog"]
    flags += ["--n_inversion_steps", STEPS, "--n_timesteps", STEPS, "--n_frames", N_FRAMES]
    flags += ["--batch_size", 2, "--keyframe_interval", 2, "--keyframe_window", 6]
    flags += ["--dtype", "float32", "--latents_path", latents, "--output_path", out]
    if technique == "controlnet":
        flags += ["--controlnet", checkpoint / "controlnet"]
    return flags


def script_and_flags(name, checkpoint, save_dir, out="edits"):
    """A command that writes an inversion into `save_dir`, or an edit of the one there into `out`."""
    if name == "preprocess":
        return "preprocess.py", invert_flags(checkpoint, save_dir)
    return f"run_tokenflow_{name}.py", edit_flags(checkpoint, save_dir, out, name)


def command_of(script, flags, n_processes=1):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
    launched = launch if n_processes > 1 else []
    return [sys.executable, *launched, str(ROOT / script), *map(str, flags)]


def inversion_in(save_dir):
    return save_dir / "sd_tiny" / "clip" / f"steps_{STEPS}" / f"nframes_{N_FRAMES}"


def content(folder: Path) -> dict[str, bytes]:
    """All files under a folder, by relative path, except those that record options."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "config.yaml", "digests.json")
    }


def run_in(folder, script, flags, printed, kill_after=None, environment=None):
    """Run a command in a forked process, and put the path that it printed into the queue `printed`.

    kill_after: UNet passes until the process is killed, and seconds after the last of them. What counts
    is the passes, since how long they take depends on what else the machine does.
    """
    os.environ |= environment or {}
    if kill_after:
        passes, seconds = kill_after
        predict_noise, counter = StableDiffusion.predict_noise, itertools.count(1)

        def counted(self, *args):
            if next(counter) == passes:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return predict_noise(self, *args)

        StableDiffusion.predict_noise = counted
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        result = run(script, *flags, cwd=folder)
    if os.environ.get("RANK", "0") == "0":
        printed.put(folder / last_line(result))
    else:
        assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.fixture(scope="module")
def server():
    """Forks processes that need not import torch again."""
    context = multiprocessing.get_context("forkserver")
    preloaded = ["test_runs", "tokenflow.inversion.invert", "tokenflow.editing.edit"]
    context.set_forkserver_preload(preloaded)
    return context


def exit_code(server, *args):
    """How a forked process that calls `run_in` ends."""
    return exit_codes(server, args)[0]


def exit_codes(server, *calls):
    """How forked processes end that call `run_in` at the same time."""
    processes = [server.Process(target=run_in, args=args) for args in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def whole(server, source, checkpoint):
    """The files that uninterrupted runs of one process write, by command."""
    printed, files = server.SimpleQueue(), {}
    for name in ("preprocess", *TECHNIQUES):
        command = script_and_flags(name, checkpoint, "whole")
        assert exit_code(server, source, *command, printed) == 0
        files[name] = content(printed.get().parent)
    return files


def test_two_processes_of_torchrun_equal_one(source, checkpoint, whole):
    command = command_of(*script_and_flags("preprocess", checkpoint, "shared"), 2)
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert content((source / last_line(result)).parent) == whole["preprocess"]


def folder_of_two(server, source, command):
    """Where a command in two forked processes, told of each other as torchrun would, says its result is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["HF_HUB_OFFLINE"] = "1"
    printed = server.SimpleQueue()
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} | shared for rank in "01"]
    calls = [(source, *command, printed, None, environment) for environment in ranks]
    assert exit_codes(server, *calls) == [0, 0]
    return printed.get().parent


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_two_processes_equal_one(server, source, checkpoint, whole, technique):
    """They make a sweep of Plug-and-Play, the first of whose edits is that of one process."""
    script, flags = script_and_flags(technique, checkpoint, "whole", "shared_edits")
    flags += ["--pnp_attn_t", 0.5, 1] if technique == "pnp" else []
    folder = folder_of_two(server, source, (script, flags))
    if technique == "pnp":
        assert (folder / "pnp_clip_sweep" / "report.html").is_file()
        discard_report(folder := folder / "pnp_clip")
    assert content(folder) == whole[technique]


def test_more_processes_than_frames(server, source, checkpoint):
    script, flags = script_and_flags("preprocess", checkpoint, "single")
    prompted = [*flags, "--n_frames", 1, "--inversion_prompt", "a cat"]
    folder = folder_of_two(server, source, (script, prompted))
    assert (folder / "inverted.mp4").is_file()
    script, flags = script_and_flags("pnp", checkpoint, "single", "single_edits")
    folder = folder_of_two(server, source, (script, [*flags, "--n_frames", 1, "--mask", "auto"]))
    assert (folder / "edited.mp4").is_file() and (folder / "mask.mp4").is_file()


def test_a_process_that_dies_ends_the_run(source, checkpoint):
    """The others are not left waiting, and the error names the process."""
    flags = [*invert_flags(checkpoint, "died"), "--n_frames", 0]
    script = source / "dies.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import preprocess\n"
        "from tokenflow.diffusion.stable_diffusion import StableDiffusion\n"
        "def fails(*args, **kwargs): raise FloatingPointError('of this process')\n"
        "if os.environ['RANK'] == '1': StableDiffusion.decode_latents = fails\n"
        "preprocess.main()\n"
    )
    command = command_of(script, flags, 2)
    ended = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=600)
    assert ended.returncode != 0
    assert "error (process 1): of this process" in ended.stderr and ended.stdout == ""


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """It knows it by its index, since another thread of it takes "cuda" for the GPU of index 0."""
    monkeypatch.setattr(distributed, "PartialState", lambda **options: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, own in {"cuda": "cuda:1", "cuda:2": "cuda:2", "cpu": "cpu"}.items():
        assert Processes(torch.device(device)).device == torch.device(own)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match="2 processes.*--num_processes 1"):
            Processes(torch.device(device))


@pytest.mark.parametrize(
    "name, save_dir, passes", [("preprocess", "killed", (4, 16)), ("pnp", "whole", (2, 10))]
)
def test_killed_runs_are_resumed(server, source, checkpoint, whole, name, save_dir, passes):
    """Killed at many moments and run again, a command writes the files of an uninterrupted run."""
    command = script_and_flags(name, checkpoint, save_dir, "killed_edits")
    rng, kills, printed = random.Random(0), 0, server.SimpleQueue()
    while True:
        kill_after = (rng.randint(*passes), rng.uniform(0, 0.02)) if kills < KILLS else None
        if not (code := exit_code(server, source, *command, printed, kill_after)):
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 4
    assert content(printed.get().parent) == whole[name]


def test_a_run_that_was_stopped_halfway_is_resumed(source, checkpoint, monkeypatch):
    """A resumed run repeats no finished segment or step; --overwrite repeats all of them."""
    seen = []
    predict_noise = StableDiffusion.predict_noise

    def counted(self, latents, *args):
        seen.append(len(latents))
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        return predict_noise(self, latents, *args)

    monkeypatch.setattr(StableDiffusion, "predict_noise", counted)
    for script, flags, halfway in (
        ("preprocess.py", invert_flags(checkpoint, "stopped"), 40),
        ("run_tokenflow_pnp.py", edit_flags(checkpoint, "stopped", "stopped_edits"), 20),
    ):
        seen.clear()
        stop_at, evaluations = halfway, []
        assert run(script, *flags, cwd=source).returncode == 130
        stop_at = None
        for path in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json"):
            with damaged(checkpoint / path, "missing"):  # a passing problem
                refusal(run(script, *flags, cwd=source))
        for more in ([], ["--overwrite"], []):
            seen.clear()
            last_line(run(script, *flags, *more, cwd=source))
            evaluations.append(sum(seen))
        assert 0 < evaluations[0] < 0.8 * evaluations[1] and evaluations[2] == 0


def test_what_a_stopped_inversion_left_is_checked(source, checkpoint, whole, monkeypatch, tmp_path):
    """Damaged files are recomputed, and the result is that of an uninterrupted run."""
    flags, predict_noise = invert_flags(checkpoint, "harmed"), StableDiffusion.predict_noise
    final = inversion_in(source / "harmed")
    partial = run_folder.unfinished_path(final)

    def stops(self, latents, *args):
        if len(list((partial / ".progress").glob("Reconstructing*"))) == 2:
            raise KeyboardInterrupt
        return predict_noise(self, latents, *args)

    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusion, "predict_noise", stops)
        assert run("preprocess.py", *flags, cwd=source).returncode == 130
    shutil.copytree(partial, tmp_path / "left")
    features = [f"source_features/{name}_1.npy" for name in ("nearest", "features")]
    ways = itertools.cycle(WAYS)
    for names in (  # of one stage each, since an early one makes all later files new
        ["source/00003.png", ".run.json", ".progress/read"],
        ["vae/00001.png", "latents/clean_latents.npy", "latents/noisy_latents_1.npy"],
        [*features, "source_features/layers.json", "frames/00000.png"],
    ):
        # The source features that are there have taken their part of the disk.
        free = SimpleNamespace(free=10**9 if ".run.json" in names else 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: free)
        for folder in (partial, final):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "left", partial)
        for name, way in zip(names, ways, strict=False):
            data = (partial / name).read_bytes()
            (partial / name).unlink()
            if WAYS[way]:
                (partial / name).write_bytes(WAYS[way](data))
        result = run("preprocess.py", *flags, cwd=source)
        assert last_line(result) and "are not kept" not in result.stderr
        assert content(final) == whole["preprocess"], names


@pytest.mark.parametrize(("mask", "steps_done"), [("none", [["2"]]), ("auto", [[], ["2"]])])
def test_motion_is_found_when_it_is_needed(
    source, checkpoint, tmp_path, monkeypatch, mask, steps_done
):
    """For a consensus after the third of four steps, and for a mask; not again when only decoding is left."""
    flags = [*invert_flags(checkpoint, tmp_path), "--inversion_prompt", "a cat"]
    inverted = last_line(run("preprocess.py", *flags, cwd=source))
    flags = [*edit_flags(checkpoint, tmp_path, tmp_path), "--consensus", 1, "--fuse", 0]
    flags += ["--mask", mask]
    steps, found = tmp_path / "pnp_clip" / ".steps", []
    find, decode = DenseMotion.find_all, StableDiffusion.decode_latents

    def noted(*args):
        found.append(sorted(path.stem for path in steps.glob("[0-9].npy")))
        return find(*args)

    def stops(self, latents):
        if (steps / f"{STEPS}.npy").exists():
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(DenseMotion, "find_all", noted)
    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusion, "decode_latents", stops)
        assert run("run_tokenflow_pnp.py", *flags, cwd=source).returncode == 130
    assert found == steps_done
    monkeypatch.setattr(StableDiffusion, "predict_noise", None)  # not to be called
    result = run("run_tokenflow_pnp.py", *flags, cwd=source)
    assert last_line(result) and "resumed after the last step" in result.stderr
    assert found == steps_done
    assert (source / inverted).with_name("motion").is_dir()


def test_edits_along_the_flow(server, source, checkpoint, whole, monkeypatch):
    """Two processes find the source's flow; then one makes the same edit with what they have kept."""
    flags = "pnp", checkpoint, "whole"
    shared, alone = (
        (script, [*options, "--correspondences", "flow"])
        for script, options in (script_and_flags(*flags, out) for out in ("flow_2", "flow_1"))
    )
    edited = content(folder_of_two(server, source, shared))
    assert edited["frames/00006.png"] != whole["pnp"]["frames/00006.png"]
    monkeypatch.setattr(
        "tokenflow.motion.to_keyframes.FlowToKeyframes.measure", None
    )  # not to be called
    result = run(alone[0], *alone[1], cwd=source)
    assert content((source / last_line(result)).parent) == edited
    assert re.search(r"motion takes up to \d+ MB of disk in \S+/flow$", result.stderr, re.MULTILINE)


def test_a_second_run_into_the_same_folder_is_refused(source, checkpoint, whole):
    inversion, edit = inversion_in(source / "whole"), source / "edits" / "pnp_clip"
    for script, flags, folder in (
        ("preprocess.py", invert_flags(checkpoint, "whole"), inversion),
        ("run_tokenflow_pnp.py", edit_flags(checkpoint, "whole", "edits"), edit),
    ):
        with run_folder.lock(folder):
            result = run(script, *flags, "--overwrite", cwd=source)
            refusal(result, folder.name, f"process {os.getpid()} on")
        assert not list(folder.parent.glob(".lock*")) and not list(folder.parent.glob(".partial*"))
    assert content(edit) == whole["pnp"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Allocation would exceed allowed memory. (out of memory)"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_batches_are_halved_until_they_fit(error):
    passed = []

    def fits_three(items):
        if len(items) > 3:
            raise error
        passed.append(len(items))
        return 10 * items

    items = torch.arange(13)
    assert torch.equal(Batches(12, adapts=True).map(fits_three, items), 10 * items)
    assert passed == [3, 3, 3, 3, 1]
    with pytest.raises(type(error)):
        Batches(12, adapts=False).map(fits_three, items)
    with pytest.raises(ZeroDivisionError):
        Batches(12, adapts=True).map(lambda items: 1 // 0, items)


def test_a_size_that_failed_is_remembered(tmp_path):
    limits = Limits(tmp_path / "progress")
    limits.lower("joint", 5)
    for known in (limits, Limits(tmp_path / "progress")):
        assert Batches(8, limits=known, kind="joint").size == 5
        assert Batches(3, limits=known, kind="joint").size == 3
        assert Batches(8, limits=known, kind="decoding").size == 8
        assert Batches(8, adapts=False, limits=known, kind="joint").size == 8  # as asked for
    (tmp_path / "progress" / "at_once_joint").write_text("?")
    assert Batches(8, limits=Limits(tmp_path / "progress"), kind="joint").size == 8


def test_what_did_not_fit_is_known_to_a_resumed_run(source, checkpoint, monkeypatch):
    """No later stage and no resumed run tries again what was too much."""
    seen, stop_at = [], None

    def limit(cls, name, most):
        function = getattr(cls, name)

        def limited(self, batch, *args, **kwargs):
            seen.append((name, len(batch) > most))
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            if len(batch) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return function(self, batch, *args, **kwargs)

        monkeypatch.setattr(cls, name, limited)

    limit(UNet2DConditionModel, "forward", 3)  # one stream of three keyframes
    limit(AutoencoderKL, "encode", 1)
    limit(AutoencoderKL, "decode", 1)
    few = ["--batch_size", "auto", "--n_frames", 5]
    inversion = [*invert_flags(checkpoint, "narrow"), *few, "--steps", 2, "--save_steps", 2]
    edit = [*edit_flags(checkpoint, "narrow", "narrow_edits"), *few]
    edit += ["--n_inversion_steps", 2, "--n_timesteps", 2]
    for script, flags, halfway in (
        ("preprocess.py", inversion, 25),
        ("run_tokenflow_pnp.py", edit, 14),
    ):
        seen.clear()
        stop_at = halfway
        assert run(script, *flags, cwd=source).returncode == 130
        failed = {name for name, fails in seen if fails}
        assert "forward" in failed
        stop_at, before = None, len(seen)
        last_line(run(script, *flags, cwd=source))
        again = {name for name, fails in seen[before:] if fails}
        assert len(seen) > before and not again & failed, again


def test_out_of_memory_is_one_line(source, checkpoint, whole, monkeypatch):
    def runs_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(StableDiffusion, "predict_noise", runs_out)
    result = run("run_tokenflow_pnp.py", *edit_flags(checkpoint, "whole", "large"), cwd=source)
    assert result.returncode == 1 and "--batch_size auto" in result.stderr.splitlines()[-1]
