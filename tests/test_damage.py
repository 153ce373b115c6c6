"""Files that have changed since a run wrote them lead to no traceback and no silent wrong result."""

import contextlib
import json
import shutil
import unittest.mock
from pathlib import Path

import pytest
import torch
from test_cli import edit_flags, last_line, refusal, run

from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.subjects import find_subjects
from tokenflow.evaluation import evaluate
from tokenflow.runtime.digests import NAME, _digest_list, seal
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


WAYS = {
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": flipped,
    "zeroed": lambda data: bytes(len(data)),
    "missing": None,
}


@contextlib.contextmanager
def damaged(path: Path, way: str):
    """Damage a file for the block, and restore it afterwards."""
    data = path.read_bytes()
    path.unlink() if WAYS[way] is None else path.write_bytes(WAYS[way](data))
    try:
        yield
    finally:
        path.write_bytes(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint, clip):
    """A folder, the inversion of a clip and an edit of it therein, and the flags of both commands."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(clip, folder / "clip.mp4")
    invert = ["--data_path", "clip.mp4", "--model", checkpoint, "--H", 64, "--W", 64]
    invert += ["--steps", 5, "--save_steps", 5, "--n_frames", 7, "--keyframe_interval", 3]
    invert += ["--inversion_prompt", "a red square"]
    edit = edit_flags(checkpoint, "pnp")
    inversion = (folder / last_line(run("preprocess.py", *invert, cwd=folder))).parent
    edited = (folder / last_line(run("run_tokenflow_pnp.py", *edit, cwd=folder))).parent
    return folder, inversion, edited, invert, edit


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_inversion_is_refused(finished, way):
    folder, inversion, _, _, edit = finished
    latents = sorted((inversion / "latents").glob("*.npy"))
    pictures = [inversion / name / "00002.png" for name in ("source", "vae", "frames")]
    texts = [inversion / name for name in ("inversion_prompt.txt", "manifest.json", "digests.json")]
    for path in [*latents, *pictures, *texts]:
        with damaged(path, way):
            result = run("run_tokenflow_pnp.py", *edit, "--output_path", "new", cwd=folder)
        gone = path.name == "manifest.json" and way == "missing"  # then there is no inversion
        named = "no latents" if gone else path.relative_to(folder)
        refusal(result, named, "python preprocess.py", "--data_path")
        assert not (folder / "new").exists()


@pytest.mark.parametrize("way", WAYS)
def test_finished_results_are_checked(finished, way):
    folder, inversion, edited, invert, edit = finished
    features = sorted((inversion / "source_features").iterdir())[0]
    for path in (inversion / "inverted.mp4", features):
        with damaged(path, way):
            refusal(run("preprocess.py", *invert, cwd=folder), path.name, "--overwrite")
    with damaged(edited / "frames" / "00003.png", way):
        refusal(run("evaluate.py", "--edits", edited, cwd=folder), "00003.png")
    names = ("frames/00000.png", "comparison.mp4", "contact_sheet.png", "digests.json")
    for path in [edited / name for name in names]:
        with damaged(path, way):
            refusal(run("run_tokenflow_pnp.py", *edit, cwd=folder), path.name, "--overwrite")
    assert last_line(run("preprocess.py", *invert, cwd=folder)).name == "inverted.mp4"
    assert last_line(run("run_tokenflow_pnp.py", *edit, cwd=folder)).name == "edited.mp4"


def test_damage_of_another_inversion_blocks_nothing(finished, monkeypatch):
    """Neither of one with more frames, nor of another model."""
    folder, inversion, edited, _, edit = finished
    of_model = inversion.parents[2]
    model = of_model.with_name("sd_another") / inversion.relative_to(of_model)
    monkeypatch.chdir(folder)
    for other in (inversion.with_name("nframes_8"), model):
        shutil.copytree(inversion, other)
        (other / "manifest.json").write_text("{}")
    try:
        again = last_line(run("run_tokenflow_pnp.py", *edit, cwd=folder))
        assert folder / again.parent == edited
        (subject,) = find_subjects(EvaluateConfig(edits=(str(edited),)))
        assert folder / subject.frames["source"] == inversion / "source"
        with damaged(inversion / "source" / "00002.png", "flipped"):
            refusal(run("evaluate.py", "--edits", edited, cwd=folder), "00002.png", "preprocess.py")
    finally:
        shutil.rmtree(inversion.with_name("nframes_8"))
        shutil.rmtree(model.parents[2])


@pytest.mark.parametrize("has_locks", [True, False])
def test_an_inversion_is_not_replaced_under_an_edit(finished, monkeypatch, tmp_path, has_locks):
    """Where the file system has locks, preprocess.py is refused; where it has none, the edit notices."""
    folder, inversion, _, invert, edit = finished
    shutil.copytree(folder / "latents", tmp_path / "latents")
    invert = [*invert, "--save_dir", tmp_path / "latents", "--inversion_prompt", "a cat"]
    edit = [*edit, "--latents_path", tmp_path / "latents", "--output_path", tmp_path / "edits"]
    predict_noise, replaced = StableDiffusion.predict_noise, []

    def replaces(*args):
        if not replaced:
            replaced.append(None)  # since this calls itself
            replaced.append(run("preprocess.py", *invert, "--overwrite", cwd=folder))
        return predict_noise(*args)

    monkeypatch.setattr(StableDiffusion, "predict_noise", replaces)
    if not has_locks:
        monkeypatch.setattr("tokenflow.editing.sweep.share", contextlib.nullcontext)
    result = run("run_tokenflow_pnp.py", *edit, cwd=folder)
    if has_locks:
        refusal(replaced[1], inversion.name, "at work there")
        assert last_line(result).is_file()
    else:
        last_line(replaced[1])
        refusal(result, inversion.name, "was replaced")
        assert not list(tmp_path.glob("edits/*"))


def test_an_inversion_is_not_replaced_under_its_evaluation(finished, monkeypatch):
    folder, inversion, edited, invert, _ = finished
    refused, measure = [], evaluate.evaluate_together

    def replaces(*args):
        invert_again = [*invert, "--inversion_prompt", "a cat", "--overwrite"]
        refused.append(run("preprocess.py", *invert_again, cwd=folder))
        return measure(*args)

    monkeypatch.setattr(evaluate, "evaluate_together", replaces)
    flags = ["--edits", edited, "--clip", "null", "--dino", "null", "--device", "cpu"]
    assert last_line(run("evaluate.py", *flags, cwd=folder)).is_file()
    refusal(refused[0], inversion.name, "at work there")


def test_an_edit_of_another_version_is_not_evaluated(finished):
    folder, _, edited, _, _ = finished
    path = edited / "config.yaml"
    text = path.read_text()
    for other in (
        text.replace("data_path", "path_of_data"),
        text.replace("n_inversion_steps: 5", "n_inversion_steps: five"),
        text.replace("# of the inversion", "# from the inversion"),
        "- a list",
        "a: b: c",
    ):
        path.write_text(other)
        seal(edited)
        refusal(run("evaluate.py", "--edits", edited, cwd=folder), path, "this version")
    path.write_text(text)
    seal(edited)


def test_inversions_are_told_apart_by_content(finished, checkpoint):
    """However paths are spelt and wherever things lie; another prompt does not replace what is finished."""
    folder, inversion, _, invert, _ = finished
    shutil.copytree(folder / "latents", folder / "moved", dirs_exist_ok=True)
    shutil.copy(folder / "clip.mp4", folder / "elsewhere.mp4")
    copy = shutil.copytree(inversion.parents[1], inversion.parents[1].with_name("elsewhere"))
    (folder / "tiny").symlink_to(checkpoint)
    for changes in (
        ["--data_path", folder / "clip.mp4", "--save_dir", folder / "moved"],
        ["--data_path", "./elsewhere.mp4", "--model", "tiny", "--batch_size", 2],
    ):
        result = run("preprocess.py", *invert, *changes, cwd=folder)
        assert last_line(result) and "exists already" in result.stderr
    before = (inversion / "manifest.json").read_bytes()
    for changes, words in (
        (["--inversion_prompt", "a dog"], ["inversion_prompt 'a red square', not 'a dog'"]),
        (["--seed", 2], ["seed 1, not 2"]),
        (["--fps", 25], ["fps None, not 25.0"]),
    ):
        result = run("preprocess.py", *invert, *changes, cwd=folder)
        refusal(result, inversion.relative_to(folder), *words, "--overwrite replaces it")
    assert (inversion / "manifest.json").read_bytes() == before
    shutil.rmtree(copy)  # evaluate.py would find it, too


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("timesteps"),
        lambda manifest: manifest.pop("keyframes"),
        lambda manifest: manifest.update(added=1),
        lambda manifest: manifest.update(n_frames="seven"),
        lambda manifest: manifest["keyframes"].pop("interval"),
        lambda manifest: manifest["config"].pop("H"),
        lambda manifest: manifest["config"].pop("conditioned"),
        lambda manifest: manifest["config"].update(stride="two"),
        lambda manifest: manifest.update(config=[]),
    ],
)
def test_an_inversion_of_another_version_is_refused(finished, change):
    """By edits, sweeps and evaluate.py, in one line that says how to compute it again."""
    folder, inversion, edited, _, edit = finished
    path, digests = inversion / "manifest.json", (inversion / "digests.json").read_bytes()
    text = path.read_text()
    change(manifest := json.loads(text))
    path.write_text(json.dumps(manifest))
    seal(inversion)
    try:
        for flags in (edit, [*edit, "--seed", 1, 2]):
            result = run("run_tokenflow_pnp.py", *flags, cwd=folder)
            refusal(result, path.relative_to(folder), "this version", "python preprocess.py")
        refusal(run("evaluate.py", "--edits", edited, cwd=folder), path.name, "preprocess.py")
    finally:
        path.write_text(text)
        (inversion / "digests.json").write_bytes(digests)


def test_files_of_another_version_of_the_code(finished):
    """Keys that are missing, added, or of another type are one line that says what to do."""
    folder, inversion, _, invert, _ = finished

    def change(stored, key, value):
        return {k: v for k, v in stored.items() if k != key} | ({key: value} if value else {})

    stored = json.loads((inversion / "manifest.json").read_text())
    for changed in (
        *(change(stored, key, value) for key in stored for value in (None, 3.5) if stored[key]),
        change(stored, "added", "1"),
        *(stored | {"config": change(stored["config"], key, None)} for key in ("seed", "networks")),
        stored | {"config": stored["config"] | {"added": 1}},
        stored | {"config": stored["config"] | {"steps": "many"}},
    ):
        with damaged(inversion / "manifest.json", "missing"), damaged(inversion / NAME, "missing"):
            (inversion / "manifest.json").write_text(json.dumps(changed))
            seal(inversion)
            result = run("preprocess.py", *invert, cwd=folder)
            refusal(result, "manifest.json is not as this version", "--overwrite recomputes")


def test_digests_of_another_version_are_refused(finished):
    folder, inversion, edited, invert, edit = finished
    runs = (inversion, "preprocess.py", invert), (edited, "run_tokenflow_pnp.py", edit)
    for kept, script, flags in runs:
        files = json.loads((kept / NAME).read_text())["files"]
        files = {name: {"size": 3, "digest": file["digest"]} for name, file in files.items()}
        with damaged(kept / NAME, "missing"):
            text = json.dumps({"files": files, "digest": _digest_list(files)})
            (kept / NAME).write_text(text)
            result = run(script, *flags, cwd=folder)
            refusal(result, "digests.json is not as this version", "--overwrite")


def test_edits_do_without_damaged_source_features(finished):
    folder, inversion, _, _, edit = finished
    without = run("run_tokenflow_pnp.py", *edit, "--reuse_source", "false", cwd=folder)
    expected = (folder / last_line(without)).read_bytes()
    store = inversion / "source_features"
    kinds = [next(store.glob("nearest_*")), next(store.glob("features_*")), store / "layers.json"]
    for index, way in enumerate(WAYS):
        path, out = kinds[index % 3], f"features_{way}"
        with damaged(path, way):
            result = run("run_tokenflow_pnp.py", *edit, "--output_path", out, cwd=folder)
        assert (folder / last_line(result)).read_bytes() == expected
        assert "warning: " in result.stderr and path.name in result.stderr


def test_a_damaged_mask_of_a_stopped_edit_is_found_again(finished, monkeypatch):
    folder, _, _, _, edit = finished
    flags = [*edit, "--mask", "auto", "--output_path", "masked"]
    stops = unittest.mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("tokenflow.editing.edit.denoise", stops)
    assert run("run_tokenflow_pnp.py", *flags, cwd=folder).returncode == 130
    (mask,) = (folder / "masked" / "pnp_clip" / ".steps").glob("mask_*.npy")
    sound = mask.read_bytes()
    mask.write_bytes(flipped(sound))
    assert run("run_tokenflow_pnp.py", *flags, cwd=folder).returncode == 130
    assert mask.read_bytes() == sound


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_is_not_resumed_from_a_damaged_step(tmp_path, way):
    saved = EditCheckpoint(tmp_path, (3, 4, 2, 2), Processes(torch.device("cpu")))
    for step in range(3):
        with saved.writing(step, remembers=step == 2) as (latents, memory):
            latents[torch.arange(3)] = torch.full((3, 4, 2, 2), float(step + 1))
            if memory:
                memory[torch.arange(3)] = torch.ones(3, 4, 2, 2)
    assert saved.steps_done == 2 and saved.memory(2).shape == (3, 4, 2, 2)
    with damaged(tmp_path / "2.npy", way):
        assert saved.steps_done is None
    with damaged(tmp_path / "memory_2.npy", way):  # which a step can do without
        assert saved.steps_done == 2 and saved.memory(2) is None
    assert saved.steps_done == 2 and saved.latents(2).shape == (3, 4, 2, 2)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_a_killed_run_left_are_kept_only_if_they_fit(tmp_path, way):
    rows, frames = FrameArray(tmp_path / "rows.npy"), torch.arange(3)
    rows.ensure((3, 2), torch.float32)
    rows[frames] = torch.ones(3, 2)
    rows.ensure((3, 2), torch.float32)
    assert torch.equal(rows[frames], torch.ones(3, 2))
    with damaged(rows.path, way):
        rows.ensure((3, 2), torch.float32)
        assert rows.shape == (3, 2)
