"""Sweeps: several values of options give the edits of all combinations, each as if it were made alone."""

import csv
import itertools
import math
import shutil
import weakref

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from test_cli import TECHNIQUES, last_line, refusal, run
from test_evaluation import page_data
from test_lora import factors, kohya, write  # noqa: F401 (factors is a fixture)
from test_runs import content

import util
from tokenflow.config import ControlNetConfig, PnPConfig, SDEditConfig
from tokenflow.config_sweep import SHARED, combine, differences, label, parse_sweep
from tokenflow.diffusion import parts
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing import edit as editing
from tokenflow.editing import shared
from tokenflow.editing.shared import Shared
from tokenflow.errors import UserError
from tokenflow.options import dump
from tokenflow.video.read import decode_frames
from tokenflow.video.write import write_video

N_FRAMES, STEPS = 4, 2
NEEDED = {"data_path": "a.mp4", "prompt": "a dog"}


def test_all_combinations_in_the_order_of_the_options():
    values = {**NEEDED, "pnp_f_t": ["0.2", "1"], "prompt": ["a cat", "a dog"], "seed": 3}
    configs = combine(PnPConfig, values)
    found = [(c.prompt, c.pnp_f_t, c.seed) for c in configs]
    assert found == [(*pair, 3) for pair in itertools.product(("a cat", "a dog"), (0.2, 1.0))]
    apart = differences([vars(config) for config in configs])
    assert [label(settings) for settings in apart[:2]] == [
        "prompt a cat, pnp_f_t 0.2",
        "prompt a cat, pnp_f_t 1.0",
    ]
    (alone,) = combine(PnPConfig, {**NEEDED, "pnp_f_t": ["0.2"]})
    assert alone == PnPConfig(**NEEDED, pnp_f_t=0.2) and differences([vars(alone)]) == [{}]


def test_an_option_that_takes_a_list_is_swept_by_a_list_of_lists():
    def swept(name, value):
        return [getattr(c, name) for c in combine(ControlNetConfig, {**NEEDED, name: value})]

    assert swept("control", ["canny"]) == [("canny",)]
    assert swept("lora", ["a", "b"]) == [("a", "b")]
    assert swept("lora", [[], ["a"], "b"]) == [(), ("a",), ("b",)]
    assert swept("control_scale", [[0.5], [1.0]]) == [(0.5,), (1.0,)]


def test_flags_and_yaml(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("data_path: a.mp4\nprompt: [cat, dog]\nstart: [0.7, 0.8]\n")
    flags = ["--config_path", str(file), "--start", "0.9", "--use_ddim_noise", "true", "false"]
    configs = parse_sweep(SDEditConfig, "", "config_sdedit.yaml", [*flags, "--resume"])
    assert [(c.prompt, c.start, c.use_ddim_noise) for c in configs] == [
        *itertools.product(("cat", "dog"), (0.9,), (True, False))
    ]
    with pytest.raises(UserError, match="prompt: a robotic wolf: .* in quotes"):
        parse_sweep(PnPConfig, "", "config_pnp.yaml", ["--prompt", "a", "robotic", "wolf"])


@pytest.mark.parametrize(
    "values, words",
    [
        *(
            # A list of lists is a sweep of an option that takes a list itself.
            ({name: [["1"], ["2"]] if name == "embeddings" else ["1", "2"]}, f"{name}: .* share it")
            for name in SHARED
        ),
        ({"pnp_attn_t": []}, "pnp_attn_t: its list is empty"),
        ({"pnp_attn_t": [0.5, [1]]}, "pnp_attn_t 1: pnp_attn_t: .* is not a number"),
        ({"pnp_attn_t": [0.5, 1.5]}, "pnp_attn_t 1.5: pnp_attn_t: 1.5 is out of range"),
        ({"prompt": ["a dog", " "], "seed": [1, 2]}, "seed 1, prompt  : prompt: it is empty"),
        ({"seed": list(range(9)), "pnp_f_t": [0] * 8}, "seed, pnp_f_t: 72 combinations"),
        ({"lora": [["a"], ["a", "b"]], "lora_scale": [1, 2]}, "lora a: lora_scale: 2 numbers"),
    ],
)
def test_mistakes_name_the_option_or_the_combination(values, words):
    with pytest.raises(UserError, match=f"^{words}"):
        combine(PnPConfig, {**NEEDED, **values})


def test_what_is_shared_is_made_anew_for_another_key():
    shared, made = Shared(), []
    for key in (1, 1, 2, 1, 1):
        assert shared.get("thing", key, lambda key=key: made.append(key) or -key) == -key
    assert made == [1, 2, 1] and shared.get("other", 1, str) == ""


@pytest.fixture(scope="module")
def work(tmp_path_factory, checkpoint, clip_frames):
    """A folder with a clip and its inversion, and the flags of edits of it."""
    folder = tmp_path_factory.mktemp("sweeps")
    write_video(folder / "clip.mp4", clip_frames[:N_FRAMES], 12)
    common = ["--data_path", "clip.mp4", "--model", checkpoint, "--n_frames", N_FRAMES]
    flags = [*common, "--H", 64, "--W", 64, "--steps", STEPS, "--save_steps", STEPS]
    flags += ["--inversion_prompt", "a red square", "--keyframe_interval", 2]
    last_line(run("preprocess.py", *flags, cwd=folder))
    edit = [*common, "--prompt", "a blue circle", "--n_inversion_steps", STEPS]
    return folder, [*edit, "--n_timesteps", STEPS, "--keyframe_interval", 2]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(parts, "on_hub", lambda model_id: False)


def without(flags, *names):
    """Flags but for these, so that YAML decides about them."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs for word in pair if pair[0].removeprefix("--") not in names]


def edit_of(path):
    """The files of an edit, without its report."""
    files = content(path).items()
    return {name: data for name, data in files if not name.startswith("report")}


@pytest.mark.parametrize(
    "technique, sweep",
    [
        ("pnp", {"mask": ["auto"], "fuse": [0, 1], "pnp_f_t": [0.3]}),
        ("pnp", {"lora": [["lora.safetensors"], []]}),
        ("sdedit", {"prompt": ["a dog", "= # a <cat>"]}),
        ("controlnet", {"control_scale": [[0.2], [1.0]]}),
    ],
)
def test_each_edit_is_as_if_made_alone(
    work,
    checkpoint,
    factors,  # noqa: F811
    monkeypatch,
    technique,
    sweep,
):
    folder, flags = work
    write(folder / "lora.safetensors", kohya(factors))
    script, made = f"run_tokenflow_{technique}.py", []
    if technique == "controlnet":
        flags = [*flags, "--controlnet", checkpoint / "controlnet"]

    def counted(of, make):
        return lambda *args, **options: made.append(of) or make(*args, **options)

    monkeypatch.setattr(Checkpoint, "load", counted("checkpoint", Checkpoint.load))
    monkeypatch.setattr(editing, "open_motion", counted("motion", editing.open_motion))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    out = "_".join([technique, *sweep])
    flags = without(flags, *sweep)
    swept = run(script, *flags, "--config_path", "sweep.yaml", "--output_path", out, cwd=folder)
    result = folder / last_line(swept)
    assert result == folder / out / f"{technique}_clip_sweep"
    assert made.count("checkpoint") == 1 and made.count("motion") == 1
    assert sorted(path.name for path in result.iterdir()) == [
        "config.yaml",
        "edits.csv",
        "edits.png",
        "report.html",
    ]

    configs = combine(TECHNIQUES[technique], {**NEEDED, **sweep})
    entries = page_data(result / "report.html")["entries"]
    assert len(entries) == len(configs) == math.prod(map(len, sweep.values()))
    names = [f"{technique}_clip", *(f"{technique}_clip_{n}" for n in range(2, len(configs) + 1))]
    rows = list(csv.DictReader((result / "edits.csv").open()))
    assert not any(text.startswith("=") for row in rows for text in row.values())  # a formula
    for name, config, entry, row in zip(names, configs, entries, rows, strict=True):
        assert entry["name"] == row["edit"] == name
        settings = {
            key: entry["options"][key] for key, several in sweep.items() if len(several) > 1
        }
        assert settings == {key: yaml.safe_load(dump(config))[key] for key in settings}
        assert set(entry["settings"]) == set(settings) <= set(row)
        assert float(row["psnr"]) == pytest.approx(entry["figures"]["psnr"]["edit"])
        if config is configs[0]:
            continue  # it was made alone
        one = folder / "one.yaml"
        one.write_text(yaml.safe_dump({key: entry["options"][key] for key in sweep}))
        options = "--config_path", one, "--output_path", f"alone_{out}"
        expected = folder / last_line(run(script, *flags, *options, cwd=folder)).parent
        assert edit_of(folder / out / name) == edit_of(expected)
        texts = [(path / "config.yaml").read_text() for path in (folder / out / name, expected)]
        assert texts[0] == texts[1].replace(f"alone_{out}", out)


@pytest.mark.parametrize("technique", ["pnp", "controlnet"])
def test_where_things_lie_tells_no_edits_apart(
    work,
    checkpoint,
    factors,  # noqa: F811
    monkeypatch,
    tmp_path,
    technique,
):
    folder, flags = work
    write(folder / "lora.safetensors", kohya(factors))
    options = ["--lora", "lora.safetensors", "--mask", "clip.mp4", "--output_path", "places"]
    elsewhere = ["--data_path", folder / "clip.mp4", "--mask", folder / "clip.mp4"]
    elsewhere += ["--lora", "same.safetensors", "--latents_path", folder / "latents"]
    elsewhere += ["--output_path", folder / "places", "--model", f"{checkpoint.parent}/./tiny"]
    if technique == "controlnet":
        options += ["--controlnet", checkpoint / "controlnet", "--control", "path"]
        options += ["--control_path", "clip.mp4"]
        shutil.copytree(checkpoint / "controlnet", tmp_path / "network")
        elsewhere += ["--controlnet", "network", "--control", "path"]
        elsewhere += ["--control_path", folder / "clip.mp4"]
    script = f"run_tokenflow_{technique}.py"
    edited = folder / last_line(run(script, *flags, *options, cwd=folder))
    monkeypatch.setattr(StableDiffusion, "predict_noise", None)  # not to be called
    shutil.copy(folder / "lora.safetensors", tmp_path / "same.safetensors")
    again = run(script, *flags, *elsewhere, cwd=tmp_path)
    assert last_line(again) == edited and "exists already" in again.stderr
    flags = ["--edits", edited.parent, "--latents_path", folder / "latents"]
    last_line(run("evaluate.py", *flags, "--clip", "None", "--dino", "None", cwd=tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # files of float16 are missed first
def test_an_edits_controlnets_do_not_outlive_it(work, checkpoint, monkeypatch, dtype):
    folder, flags = work
    made, use_controlnets = [], shared.use_controlnets

    def noted(*args):
        assert not any(earlier() for earlier in made)
        sd = use_controlnets(*args)
        made.append(weakref.ref(sd.controlnet))
        return sd

    monkeypatch.setattr(shared, "use_controlnets", noted)
    other = shutil.copytree(checkpoint / "controlnet", folder / f"controlnet_{dtype}")
    weights = other / "diffusion_pytorch_model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    several = [[f"{checkpoint}/controlnet"], [str(other)]]
    (folder / "networks.yaml").write_text(yaml.safe_dump({"controlnet": several}))
    flags = [*flags, "--config_path", "networks.yaml", "--output_path", f"networks_{dtype}"]
    flags += ["--dtype", dtype]
    last_line(run("run_tokenflow_controlnet.py", *flags, cwd=folder))
    assert len(made) == 2


def test_a_sweep_that_was_stopped_is_resumed(work, monkeypatch):
    folder, flags = work
    flags = [*flags, "--pnp_attn_t", 0, 1, "--output_path", "stopped"]
    passes, predict_noise = [], StableDiffusion.predict_noise

    def counted(self, *args):
        passes.append(1)
        if len(passes) == stop_at:
            raise KeyboardInterrupt
        return predict_noise(self, *args)

    def repeated(*more):
        passes.clear()
        result = run("run_tokenflow_pnp.py", *flags, *more, cwd=folder)
        return result, len(passes)

    stop_at = None
    monkeypatch.setattr(StableDiffusion, "predict_noise", counted)
    result, whole = repeated("--output_path", "whole")
    complete = folder / last_line(result).parent
    stop_at = whole - 1  # in the second edit's last step
    assert repeated()[0].returncode == 130
    sweep = folder / "stopped" / "pnp_clip_sweep"
    assert sweep.is_dir() and not (sweep / "report.html").exists()
    stop_at = None
    result, left = repeated()
    assert folder / last_line(result) == sweep and 0 < left < whole // 2
    for name in ("pnp_clip", "pnp_clip_2"):
        assert edit_of(sweep.parent / name) == edit_of(complete / name)
    page = sweep / "report.html"
    written = page.stat().st_mtime_ns
    assert repeated()[1] == 0 and page.stat().st_mtime_ns == written
    # The sweep's own file repeats it, too.
    file = sweep / "config.yaml"
    again = run("run_tokenflow_pnp.py", "--config_path", file, *flags[:2], cwd=folder)
    assert last_line(again) == last_line(result)


@pytest.mark.parametrize(
    "sweep, words",
    [
        ({"pnp_attn_t": [0.5, 2]}, ["pnp_attn_t 2: pnp_attn_t: 2 is out of range"]),
        ({"n_timesteps": [2, 3]}, ["n_timesteps 3: n_timesteps: 3 steps visit"]),
        ({"mask": ["none", "none.mp4"]}, ["mask none.mp4: mask: none.mp4 is neither"]),
        ({"mask": ["none", "short"]}, ["mask short: mask: short has 2 frames for 4"]),
        ({"mask": "black"}, ["mask: black is white nowhere in the 4 frames"]),
        ({"mask": "wrong.yaml"}, ["wrong.yaml: is no video"]),
        ({"mask": "empty"}, ["empty: holds no images"]),
        ({"mask": "auto", "prompt": "a red square "}, ["mask: auto", "are the same"]),
        ({"lora": [[], ["none.safetensors"]]}, ["lora none.safetensors: lora: none.safetensors"]),
        ({"device": ["cpu", "auto"]}, ["device: the edits of a sweep share it"]),
        ({"seed": [1, 2], "n_frames": 1}, ["n_frames: 1", "at least 2"]),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(work, monkeypatch, sweep, words):
    folder, flags = work
    if not (folder / "short").exists():
        (folder / "short").mkdir()
        util.save_frames(folder / "short", 0, decode_frames(folder / "clip.mp4"))
        for index in range(2, N_FRAMES):
            util.frame_path(folder / "short", index).unlink()
        for name in ("black", "empty"):
            (folder / name).mkdir()
        dark = np.full(
            (N_FRAMES, 64, 64, 3), 100, np.uint8
        )  # as of a mask whose white is 1 or a colour
        util.save_frames(folder / "black", 0, dark)

    def loads(*args, **options):
        raise AssertionError("it is too late")

    monkeypatch.setattr(Checkpoint, "load", loads)
    (folder / "wrong.yaml").write_text(yaml.safe_dump(sweep))
    flags = [*without(flags, *sweep), "--config_path", "wrong.yaml", "--output_path", "refused"]
    refusal(run("run_tokenflow_pnp.py", *flags, cwd=folder), *words)
    assert not (folder / "refused").exists()


def test_a_failure_names_its_settings(work, monkeypatch):
    """What goes wrong later in one edit leaves the edits before it, and not the sweep's folder."""
    folder, flags = work

    def fails(self, *args):
        if (folder / "failed" / "pnp_clip_2").exists():
            raise FloatingPointError("it went wrong")
        return predict_noise(self, *args)

    predict_noise = StableDiffusion.predict_noise
    monkeypatch.setattr(StableDiffusion, "predict_noise", fails)
    flags = [*flags, "--pnp_f_t", 0, 1, "--output_path", "failed"]
    result = run("run_tokenflow_pnp.py", *flags, cwd=folder)
    assert result.returncode == 1 and "error: pnp_f_t 1.0: it went wrong" in result.stderr
    assert [path.name for path in (folder / "failed").iterdir()] == ["pnp_clip"]
