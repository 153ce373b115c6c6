"""Random mistakes, in options and in what they name: each is refused in one line and leaves nothing behind.

    MISTAKES=1000 python -m pytest -q tests/test_mistakes.py

makes as many new ones; without a number, they are few and always the same.
"""

import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import TECHNIQUES, edit_flags, last_line, refusal, run

from tokenflow.config import PreprocessConfig
from tokenflow.config_sweep import MOST, SHARED
from tokenflow.options import TRUTH_VALUES

COUNT = int(os.environ.get("MISTAKES", 0))
COMMANDS = {"preprocess.py": PreprocessConfig}
COMMANDS |= {f"run_tokenflow_{name}.py": cls for name, cls in TECHNIQUES.items()}
LONG = ("n" * 300, "n/" * 3000 + "n")

# fmt: off
NO_NUMBERS = ["nan", "inf", "-inf", "1e400", "1,5", "5\n5", "1_0", "--", "9" * 5000, "9" * 309, "٩" * 30]
NO_DEVICES = ["cuda:", "auto:1", "cuda:-1", "cuda:٣", "cuda:999", "cpu:7", "mps:9", ""]
NO_SOURCES = ["none.mp4", "", ".", "/", "/dev/null", "clip.mp4/x", "~", "bad", "tiny", "a\nb", "http://x/y"]
NO_SOURCES += [f"bad/{name}" for name in ("text.mp4", "zeroed.mp4", "cut.mp4", "pictures", "folders")]
NO_MODELS = ["none", "a/b/c", "clip.mp4", ".", "bad", "/", "https://x/y", "a\nb", "../", "-", " "]
NO_FOLDERS = ["clip.mp4", "clip.mp4/x", "/proc/none", "/dev/null", "loop/x", "a/" + "n" * 256]
WRONG_PATHS = {
    "data_path": NO_SOURCES, "model": NO_MODELS, "save_dir": NO_FOLDERS, "output_path": NO_FOLDERS,
    "latents_path": [*NO_FOLDERS, "none", "", "tiny", "[*"], "controlnet": [*NO_MODELS[:-2], "tiny/unet"],
    "lora": [*NO_MODELS[:5], "a\nb", "tiny/unet"], "device": NO_DEVICES, "mask": ["nowhere", "a\nb"],
    "config_path": ["none.yaml", "bad", "", "clip.mp4", "clip.mp4/x", "/dev/null", "a\nb", "\udcff"],
}
NO_YAMLS = [
    b"", b"- a\n- b\n", b"a: b: c", b"prompt:\n\t- x", b"\xff\xfe\x00prompt", bytes(range(256)), b"3",
    b"[" * 5000, b"seed: 0x_", b"a: !!python/name:os.system", b"a: !!int ''", b"a: !!timestamp x",
    b"a: *b", b"---\na: 1\n---\nb: 2\n", b"? [a]\n: b", b"a: &x [*x]", b"null: 1", b"\"\\ud800\": 1",
]
NO_FLAGS = [["--resume", "true", "stray"], ["-x"], ["--=3"], ["--", "stray"], ["--data_path"], ["--\udcff=3"]]
TOGETHER = [{"data_path": None}, {"n_frames": "8"}, {"n_frames": "1000000"}]
INVERTING = [*TOGETHER, {"steps": "3"}, {"steps": "7"}, {"save_steps": "6"}, {"stride": "2"}, {"H": "72"}]
INVERTING += [{"start_frame": "7"}, {"n_frames": "0", "start_frame": "99"}, {"W": "63"}]
EDITING = [*TOGETHER, {"n_timesteps": "4"}, {"n_inversion_steps": "6"}, {"prompt": None}, {"prompt": " \n"}]
DAMAGED = {
    "unet/config.json": {"down_block_types": ["DownBlock2D"], "in_channels": 9, "cross_attention_dim": 7},
    "vae/config.json": {"latent_channels": 16, "norm_num_groups": 5},
    "scheduler/scheduler_config.json": {"num_train_timesteps": 3, "prediction_type": "sample"},
    "text_encoder/config.json": {"hidden_size": 7, "num_hidden_layers": "many"},
    "unet/diffusion_pytorch_model.safetensors": {}, "tokenizer/tokenizer.json": {},
}
# fmt: on


@dataclass
class Mistake:
    """A command, options in place of the right ones (None: left out), and the text of its YAML file."""

    command: str
    options: dict[str, str | None] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)
    yaml: bytes | None = None
    damage: tuple[str, bytes | dict] | None = None  # a file of the checkpoint, and what it holds


def is_number(text: str) -> bool:
    with suppress(ValueError):
        return float(text) == float(text)
    return text in ("", "None", "null", "auto")


def wrong_values(f) -> st.SearchStrategy[str]:
    """Texts that are wrong for an option."""
    if f.name in WRONG_PATHS:
        return st.sampled_from([*WRONG_PATHS[f.name], *LONG])
    if f.type is bool:
        return st.text().filter(lambda text: text.lower() not in TRUTH_VALUES)
    if choices := f.metadata.get("choices"):
        return st.text().filter(lambda text: text not in (*choices, *f.metadata["aliases"]))
    low, high = f.metadata.get("low"), f.metadata.get("high")
    if low is not None:
        outside = st.integers(max_value=low - 1) | st.integers(min_value=high + 1)
        words = st.sampled_from(NO_NUMBERS) | st.text().filter(lambda text: not is_number(text))
        return outside.map(str) | words
    return st.tuples(st.text(), st.sampled_from("\0\udcff"), st.text()).map("".join)


@st.composite
def mistakes(draw) -> Mistake:
    command = draw(st.sampled_from(list(COMMANDS)))
    known, is_edit = {f.name: f for f in fields(COMMANDS[command])}, command != "preprocess.py"
    del known["dtype"]  # which `run` gives, and flags win over YAML
    name = draw(st.sampled_from([*known, "config_path"] if is_edit else list(known)))
    kinds = ["value", "value", "together", "flag", "model"]
    kinds += ["yaml value", "yaml key", "yaml file", "shared", "many"] if is_edit else []
    match draw(st.sampled_from(kinds)):
        case "value" if name == "config_path":
            return Mistake(command, {name: draw(st.sampled_from([*WRONG_PATHS[name], *LONG]))})
        case "value":
            return Mistake(command, {name: draw(wrong_values(known[name]))})
        case "together":
            return Mistake(command, draw(st.sampled_from(EDITING if is_edit else INVERTING)))
        case "flag":
            unknown = st.from_regex(r"--[a-z_]+", fullmatch=True)
            unknown = unknown.filter(
                lambda flag: flag[2:] not in ("help", "config_path", "dtype", *known)
            )
            return Mistake(
                command, more=draw(unknown.map(lambda f: [f]) | st.sampled_from(NO_FLAGS))
            )
        case "model":
            path = draw(st.sampled_from(list(DAMAGED)))
            return Mistake(command, damage=(path, draw(damages(path))))
        case "yaml value":  # of a wrong type
            inner = st.dictionaries(st.text(), st.integers() | st.text(), min_size=1)
            value = draw(inner | st.lists(inner, min_size=1) | st.just([[[[1]]]]))
            return Mistake(command, {name: None}, yaml=f"{name}: {json.dumps(value)}".encode())
        case "yaml key":
            key = draw(st.text().filter(lambda text: text not in (*known, "dtype")))
            return Mistake(command, yaml=json.dumps({key: 1}).encode())
        case "yaml file":
            return Mistake(
                command, yaml=draw(st.sampled_from(NO_YAMLS) | st.binary().filter(is_wrong))
            )
        case "shared":
            name = draw(st.sampled_from([name for name in SHARED if name in known]))
            return Mistake(command, {name: None}, yaml=json.dumps({name: ["1", "2"]}).encode())
        case "many":
            seeds = draw(st.integers(MOST + 1, 3 * MOST))
            return Mistake(command, more=["--seed", *map(str, range(seeds))])


def damages(path: str) -> st.SearchStrategy[bytes | dict]:
    """Wrong contents of a file of the checkpoint, or changes of its values."""
    ways = st.sampled_from([b"", b"[]", b"3", bytes(999)])
    changes = [{key: value} for key, value in DAMAGED[path].items()]
    return ways | st.sampled_from(changes) if changes else ways


def is_wrong(text: bytes) -> bool:
    try:
        return yaml.safe_load(text) != {}
    except Exception:
        return True


@pytest.fixture(scope="module")
def scene(tmp_path_factory, checkpoint, clip):
    """A folder with a clip, a checkpoint, an inversion and what is broken; another for YAML files."""
    folder, scratch = tmp_path_factory.mktemp("scene"), tmp_path_factory.mktemp("scratch")
    shutil.copy(clip, folder / "clip.mp4")
    (folder / "tiny").symlink_to(checkpoint)
    (folder / "loop").symlink_to("loop")
    data = clip.read_bytes()
    texts = {"text": b"no video", "zeroed": bytes(9999), "cut": data[: len(data) // 2]}
    (folder / "bad" / "pictures").mkdir(parents=True)
    (folder / "bad" / "folders" / "1.png").mkdir(parents=True)
    for name, text in texts.items():
        (folder / "bad" / f"{name}.mp4").write_bytes(text)
        (folder / "bad" / "pictures" / f"{name}.png").write_bytes(text)
    last_line(run("preprocess.py", *right_flags("preprocess.py", checkpoint), cwd=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield folder, scratch


def right_flags(command: str, checkpoint: Path) -> list[str]:
    """The flags that mistakes are made in, with their values."""
    technique = command.removeprefix("run_tokenflow_").removesuffix(".py")
    if technique in TECHNIQUES:
        return edit_flags(checkpoint, technique)
    flags = ["--data_path", "clip.mp4", "--model", checkpoint, "--n_frames", 7]
    flags += ["--H", 64, "--W", 64]
    return [*flags, "--steps", 5, "--save_steps", 5, "--no_reconstruction", "true"]


def damaged_copy(checkpoint: Path, folder: Path, path: str, content: bytes | dict | None) -> Path:
    """A copy of the checkpoint, in links, with one file changed, or without it.

    Edits need a folder of the same name.
    """
    copy = Path(tempfile.mkdtemp(dir=folder)) / checkpoint.name
    shutil.copytree(checkpoint, copy, copy_function=os.link)
    file = copy / path
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_bytes()) | content).encode()
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    return copy


def contents(folder: Path) -> dict[str, int]:
    """All files and folders, and the files' sizes."""
    paths = [Path(place) / name for place, *names in os.walk(folder) for name in sum(names, [])]
    return {str(path): 0 if path.is_dir() else path.lstat().st_size for path in paths}


@settings(max_examples=COUNT or 40, derandomize=not COUNT, deadline=None, database=None)
@given(mistake=mistakes())
def test_mistakes_are_refused(scene, checkpoint, mistake):
    folder, scratch = scene
    flags = right_flags(mistake.command, checkpoint)
    options = dict(zip((flag[2:] for flag in flags[::2]), map(str, flags[1::2]), strict=True))
    options |= mistake.options
    if mistake.damage:
        options["model"] = str(damaged_copy(checkpoint, scratch, *mistake.damage))
    if mistake.yaml is not None:
        (scratch / "wrong.yaml").write_bytes(mistake.yaml)
        options["config_path"] = str(scratch / "wrong.yaml")
    argv = [f"--{name}={value}" for name, value in options.items() if value is not None]
    before = contents(folder)
    refusal(run(mistake.command, *argv, *mistake.more, cwd=folder))
    assert contents(folder) == before
