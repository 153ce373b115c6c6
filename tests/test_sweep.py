"""Sweeps: several values of options give the edits of all combinations, each as if it were made alone."""

import csv
import itertools
import math
import shutil
import weakref

import pytest
import yaml
from loras import kohya, write_tensors
from safetensors.torch import load_file, save_file
from test_cli import TECHNIQUES, last_line, run
from test_evaluation import page_data
from test_runs import content

from tokenflow.config import ControlNetConfig, PnPConfig, SDEditConfig
from tokenflow.config_sweep import combine, differences, label, parse_sweep
from tokenflow.diffusion import parts
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing import edit as editing
from tokenflow.editing import shared
from tokenflow.editing.shared import Shared
from tokenflow.options import dump

NEEDED = {"data_path": "a.mp4", "prompt": "a dog"}


def test_all_combinations_in_the_order_of_the_options():
    values = {**NEEDED, "pnp_f_t": ["0.2", "1"], "prompt": ["a cat", "a dog"], "seed": 3}
    configs = combine(PnPConfig, values)
    found = [(c.prompt, c.pnp_f_t, c.seed) for c in configs]
    assert found == [(*pair, 3) for pair in itertools.product(("a cat", "a dog"), (0.2, 1.0))]
    apart = differences([vars(config) for config in configs])
    labels = [label(settings) for settings in apart[:2]]
    assert labels == ["prompt a cat, pnp_f_t 0.2", "prompt a cat, pnp_f_t 1.0"]
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


def test_what_is_shared_is_made_anew_for_another_key():
    shared, made = Shared(), []
    for key in (1, 1, 2, 1, 1):
        assert shared.get("thing", key, lambda key=key: made.append(key) or -key) == -key
    assert made == [1, 2, 1] and shared.get("other", 1, str) == ""


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
def test_each_edit_is_as_if_made_alone(small, checkpoint, factors, monkeypatch, technique, sweep):
    folder, flags = small
    write_tensors(folder / "lora.safetensors", kohya(factors))
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
    names = sorted(path.name for path in result.iterdir())
    assert names == ["config.yaml", "edits.csv", "edits.png", "report.html"]
    configs = combine(TECHNIQUES[technique], {**NEEDED, **sweep})
    entries = page_data(result / "report.html")["entries"]
    assert len(entries) == len(configs) == math.prod(map(len, sweep.values()))
    names = [f"{technique}_clip", *(f"{technique}_clip_{n}" for n in range(2, len(configs) + 1))]
    rows = list(csv.DictReader((result / "edits.csv").open()))
    assert not any(text.startswith("=") for row in rows for text in row.values())  # a formula
    for name, config, entry, row in zip(names, configs, entries, rows, strict=True):
        assert entry["name"] == row["edit"] == name
        swept = [key for key, several in sweep.items() if len(several) > 1]
        settings = {key: entry["options"][key] for key in swept}
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
    small, checkpoint, factors, monkeypatch, tmp_path, technique
):
    folder, flags = small
    write_tensors(folder / "lora.safetensors", kohya(factors))
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
def test_an_edits_controlnets_do_not_outlive_it(small, checkpoint, monkeypatch, dtype):
    folder, flags = small
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


def test_a_sweep_that_was_stopped_is_resumed(small, passes):
    folder, flags = small
    flags = [*flags, "--pnp_attn_t", 0, 1, "--output_path", "stopped"]

    def repeat(*more, stop_at=None):
        passes.seen.clear()
        passes.stop_at = stop_at
        return run("run_tokenflow_pnp.py", *flags, *more, cwd=folder)

    complete = folder / last_line(repeat("--output_path", "whole")).parent
    whole = len(passes.seen)
    assert repeat(stop_at=whole - 1).returncode == 130  # in the second edit's last step
    sweep = folder / "stopped" / "pnp_clip_sweep"
    assert sweep.is_dir() and not (sweep / "report.html").exists()
    result = repeat()
    assert folder / last_line(result) == sweep and 0 < len(passes.seen) < whole // 2
    for name in ("pnp_clip", "pnp_clip_2"):
        assert edit_of(sweep.parent / name) == edit_of(complete / name)
    page = sweep / "report.html"
    written = page.stat().st_mtime_ns
    repeat()
    assert not passes.seen and page.stat().st_mtime_ns == written
    # The sweep's own file repeats it, too.
    file = sweep / "config.yaml"
    again = run("run_tokenflow_pnp.py", "--config_path", file, *flags[:2], cwd=folder)
    assert last_line(again) == last_line(result)


def test_a_failure_names_its_settings(small, monkeypatch):
    """What goes wrong later in one edit leaves the edits before it, and not the sweep's folder."""
    folder, flags = small

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
