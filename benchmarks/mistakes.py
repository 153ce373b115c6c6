"""Give the four commands random mistakes, and report every one that is not refused in one line.

    python -m benchmarks.mistakes --count 1000 --seed 0

A refusal is exit status 2, nothing on stdout, one line on stderr that begins with "error: " (after progress
bars), and no file or folder that was not there before. The same seed makes the same mistakes.
"""

import argparse
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import Field, fields
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no made-up model is asked for; set before the hub's client

import numpy as np
import torch

import tokenflow.editing.edit  # noqa: F401 (both are slow to import; commands are forks of this process)
import tokenflow.inversion.invert  # noqa: F401
from benchmarks.report import markdown
from shapes.checkpoint import SHAPES, build_random
from tokenflow.config import ControlNetConfig, PnPConfig, PreprocessConfig, SDEditConfig
from tokenflow.config_sweep import MOST, SHARED
from tokenflow.options import is_list
from util import write_video

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds until a command is killed
PREPROCESS, SDEDIT, CONTROLNET = "preprocess", "run_tokenflow_sdedit", "run_tokenflow_controlnet"
COMMANDS = {PREPROCESS: PreprocessConfig, "run_tokenflow_pnp": PnPConfig}
COMMANDS |= {SDEDIT: SDEditConfig, CONTROLNET: ControlNetConfig}
# What is right, until a mistake is made in it.
INVERT = {"data_path": "clip.mp4", "model": "tiny", "n_frames": "7", "H": "64", "W": "64"}
INVERT |= {"steps": "5", "save_steps": "5"}
EDIT = {"data_path": "clip.mp4", "model": "tiny", "n_frames": "7", "prompt": "a blue square"}
EDIT |= {"n_timesteps": "5", "n_inversion_steps": "5", "batch_size": "3", "output_path": "new"}

# What may come before the line of the error: how far the command got.
PROGRESS = re.compile(r".*(\d+%\||(frame|step)/s)|loading .* on .* in |\s*$")
NAME = "n" * 251  # a file system takes it, but not with what a command adds to it
WIDE = ("unet", "text_encoder", "controlnet")
LONG = ("n" * 300, "n/" * 3000 + "n")

# fmt: off
NO_NUMBERS = (
    "many", " ", "nan", "inf", "-inf", "1e400", "-1e400", "0x1g", "1,5", "1 2", "5\n5", "٣؛٤", "--",
    "-1", "1" + "0" * 30, "9" * 5000, "٩" * 30, "-" + "9" * 30,
)
NO_CHOICES = ("", "9.9", "yes please", "None", "TRU", "crop,pad", "é")
NO_DEVICES = (
    "cuda:", "cpu:", "auto:1", "cuda:-1", "cuda:٣", "cuda:999", "cuda:256", "cpu:7", "tpu", "mps:9", "",
)
NO_TEXTS = ("\0", "a\0b", "\udcff", "a\ud800")  # NUL, and halves of surrogate pairs
NO_SOURCES = ("none.mp4", "", ".", "/", "/dev/null", "clip.mp4/x", "~", "bad", "tiny", "a\nb", "http://x/y")
NO_MODELS = ("none", "a/b/c", "clip.mp4", ".", "bad", "/", "https://x/y", "a\nb", "../", "-", " ")
NO_CONTROLNETS = ("none", "a/b/c", "clip.mp4", ".", "bad", "tiny", "tiny/unet", "tiny/vae", "a\nb")
NO_LORAS = ("none", "a/b/c", "clip.mp4", ".", "bad", "tiny/unet", "a\nb")
NO_FOLDERS = ("clip.mp4", "clip.mp4/x", "/proc/none", "/dev/null", "loop/x", "a/" + "n" * 256, *LONG)
NO_YAMLS = (
    b"", b"\n# nothing\n", b"- a\n- b\n", b"words", b"a: b: c", b"prompt:\n\t- x", b"{", b"a: 'b",
    b"\xff\xfe\x00prompt", b"prompt: \xe9\n", bytes(range(256)), b"\x00" * 9, b"3", b"null", b"[" * 5000,
    b"seed: 2020-13-45", b"seed: 0x_", b"seed: ._", b"a: !!python/name:os.system", b"a: !!int ''",
    b"a: !!timestamp x", b"a: *b", b"---\na: 1\n---\nb: 2\n", b"? [a]\n: b", b"a: !!float ''", b"%",
    b"a: &x [*x]", b"a: !!bool maybe", b"null: 1", b"? {a: 1}\n: 2", b"\"\\ud800\": 1",
)
NO_YAML_PATHS = ("none.yaml", "bad", "", "clip.mp4", "clip.mp4/x", "/dev/null", "a\nb", "\udcff", *LONG)
NO_VALUES = (
    "[1, 2]", "{a: 1}", "[]", "{}", "2020-01-02", "2020-01-02 03:04:05", "!!set {a}", "!!binary aGk=",
    "&a [*a]", "[[[[1]]]]", "{[1]: 2}", "[[1], 1, {}]",
)
NO_JSON = {
    "unet": {
        "down_block_types": ["DownBlock2D"], "block_out_channels": None, "in_channels": 9,
        "layers_per_block": "two", "cross_attention_dim": 7, "attention_head_dim": 0,
    },
    "vae": {"block_out_channels": None, "latent_channels": 16, "norm_num_groups": 5, "down_block_types": "x"},
    "scheduler": {
        "num_train_timesteps": 3, "prediction_type": "sample", "beta_schedule": "none",
        "beta_start": "low", "trained_betas": [1], "steps_offset": "one",
    },
    "text_encoder": {"hidden_size": 7, "num_hidden_layers": "many", "num_attention_heads": 0},
    "tokenizer": {},
    "controlnet": {"block_out_channels": None, "cross_attention_dim": 7, "down_block_types": ["x"]},
}
TOGETHER = {  # what is right alone, but not with the rest; None: the option is left out
    "all": [{"data_path": None}, {"n_frames": "8"}, {"n_frames": "1000000"}],
    "preprocess": [
        {"steps": "3"}, {"steps": "7"}, {"save_steps": "6"}, {"stride": "2"}, {"start_frame": "7"},
        {"n_frames": "0", "start_frame": "99"}, {"H": "72"}, {"W": "63"},
    ],
    "edit": [
        {"n_timesteps": "4"}, {"n_timesteps": "999"}, {"n_inversion_steps": "6"}, {"prompt": None},
        {"prompt": ""}, {"prompt": " \n"},
    ],
}
TOGETHER[SDEDIT] = TOGETHER["edit"] + [{"start": "0.1"}, {"start": "0"}]
TOGETHER[CONTROLNET] = TOGETHER["edit"] + [
    {"sd_version": "2.0", "controlnet": "None"}, {"control": "path"}, {"control_path": "clip.mp4"},
]
# fmt: on


def values(command: str) -> dict[str, list[dict[str, str | None]]]:
    """Wrong values of options, by kind; None: the option is left out."""
    options = {f.name: f for f in fields(COMMANDS[command])}
    numbers = [f for f in options.values() if f.type in (int, float, int | None)]
    texts = [name for name, f in options.items() if f.type in (str, str | None)]
    choices = [name for name, f in options.items() if f.metadata["choices"] or f.type is bool]
    results = "save_dir" if command == PREPROCESS else "output_path"
    found = {
        "number": [
            {f.name: value}
            for f in numbers
            for value in (f"{f.metadata['low'] - 1}", f"{f.metadata['high'] + 1}", *NO_NUMBERS)
        ],
        "choice": [{name: value} for name in choices for value in NO_CHOICES]
        + 5 * [{"device": value} for value in NO_DEVICES],
        "text": [{name: value} for name in texts for value in NO_TEXTS],
        "source": [{"data_path": path} for path in (*below("sources/*/*"), *NO_SOURCES, *LONG)],
        "model": [{"model": path} for path in (*below("models/*/tiny"), *NO_MODELS, *LONG)],
        "folder": [{results: value} for value in NO_FOLDERS],
        "together": TOGETHER["all"] + TOGETHER.get(command, TOGETHER["edit"]),
    }
    if "controlnet" in options:
        paths = (*below("controlnets/*"), *NO_CONTROLNETS, *LONG)
        found["controlnet"] = [{"controlnet": path} for path in paths]
    if "lora" in options:
        found["lora"] = [{"lora": path} for path in (*NO_LORAS, *LONG)]
    if command != PREPROCESS:
        found["sweep"] = wrong_sweeps(options)
        paths = (*NO_FOLDERS, "none", "", "tiny", "[*")
        found["folder"] += [{"latents_path": path} for path in paths]
        found["folder"].append({"data_path": f"{NAME}.mp4"})
    return found


def wrong_sweeps(options: dict[str, Field]) -> list[dict[str, list[str]]]:
    """Several values of options, as flags take them: too many, some wrong, or of what cannot be swept."""
    shared = [{name: ["1", "2"]} for name in SHARED]
    many = [{"seed": [str(seed) for seed in range(MOST + 1)]}]
    many += [
        {"seed": ["1", "2", "3", "4"], "guidance_scale": [str(n) for n in range(MOST // 4 + 1)]}
    ]
    wrong = [
        {name: [str(options[name].default), value]}
        for name in ("guidance_scale", "n_timesteps", "seed", "fuse", "keyframe_window")
        for value in ("many", "-1", "9" * 30, "nan", "")
    ]
    texts = [{"mask": ["none", path]} for path in ("nowhere", "bad", "a\nb", "n" * 300)]
    texts += [
        {"prompt": words} for words in (["a", "blue", "square"], ["a dog", ""], ["a dog", " "])
    ]
    together = [{"n_timesteps": ["5", "4"]}, {"n_timesteps": ["5", "6"], "seed": ["1", "2"]}]
    return shared + 5 * many + wrong + texts + together


def below(pattern: str) -> list[str]:
    """What is broken in the scene, by a pattern of its path."""
    return sorted(map(str, Path("bad").glob(pattern)))


def wrong_flags(command: str, rng: random.Random) -> list[str]:
    """A flag that does not exist or lacks its value, or a stray word."""
    name = rng.choice(fields(COMMANDS[command])).name
    at = rng.randrange(len(name))
    misspelt = rng.choice([f"{name[:at]}{name[at + 1 :]}_", f"{name}s", f"{name}{name}"])
    others = [["--resume", "true", "stray"], ["--overwrite", "", ""], ["-x"], ["--=3"]]
    others += [["--", "stray"], [f"-{name}", "3"]]
    others += [["--data_path"], ["--data_path", "--resume"], ["--seed=1", "--seed=-1"]]
    others += [["--\n", "3"], ["--\udcff=3"]]
    return rng.choice([[f"--{misspelt}", "3"], [f"--{misspelt}=3"], rng.choice(others)])


def wrong_line(command: str, rng: random.Random) -> tuple[str, str]:
    """A YAML key that does not exist, or one with a value of another type."""
    f = rng.choice(fields(COMMANDS[command]))
    if rng.random() < 0.4:
        keys = (f"{f.name}s", f"{f.name[1:]}_", "yes", "3", "~", "''", '"a\\nb"', "é")
        return rng.choice(keys), rng.choice(("3", "x", "[]"))
    nothing = ("null", "~", "") if isinstance(f.type, type) else ()  # some options may be null
    # An option that takes a list may have an empty one, and what can be swept may have several values.
    right = {"[]"} if is_list(f) else set() if f.name in SHARED else {"[1, 2]"}
    wrong = tuple(value for value in NO_VALUES if value not in right)
    return f.name, rng.choice(wrong + nothing)


def draw(rng: random.Random, yaml: Path) -> tuple[str, list[str], str]:
    """A command, its arguments with a mistake (with two in a quarter of the cases), the first one's kind."""
    command = rng.choice(list(COMMANDS))
    options = INVERT | {"save_dir": "new"} if command == PREPROCESS else dict(EDIT)
    options |= {"controlnet": "controlnet"} if command == CONTROLNET else {}
    lines, text, more, wrong = {}, b"", [], values(command)
    kinds = [*wrong, "flag", *([] if command == PREPROCESS else ["yaml line", "yaml file"])]
    made = rng.sample(kinds, 1 + (rng.random() < 0.25))
    for kind in made:
        if kind == "flag":
            more = wrong_flags(command, rng)
        elif kind == "yaml line":
            key, value = wrong_line(command, rng)
            lines[key] = value
            options.pop(key, None)  # which would win
        elif kind == "yaml file":
            drawn = rng.choice(NO_YAMLS + NO_YAML_PATHS)
            text = drawn if isinstance(drawn, bytes) else text
            options["config_path"] = str(yaml) if isinstance(drawn, bytes) else drawn
        else:
            for key, value in rng.choice(wrong[kind]).items():
                options.pop(key, None)
                lines.pop(key, None)
                if value is None:
                    continue
                if isinstance(value, list):
                    options[key] = value
                    continue
                unspeakable = "\0" in value or "\ud800" in value  # on a command line
                if command != PREPROCESS and (unspeakable or rng.random() < 0.4):
                    is_number = re.fullmatch("-?[0-9.]+", value)
                    lines[key] = value if is_number else json.dumps(value)
                else:
                    options[key] = value.replace("\0", "\udcff").replace("\ud800", "\udcff")
    if lines:
        options.setdefault("config_path", str(yaml))
    yaml.write_bytes(text or "".join(f"{k}: {v}\n" for k, v in lines.items()).encode())
    flags = rng.sample(list(options.items()), len(options))
    argv = []
    for key, value in flags:
        if isinstance(value, list):
            argv += [f"--{key}", *value]
            continue
        joined = value.startswith("-") or rng.random() < 0.5
        argv += [f"--{key}={value}"] if joined else [f"--{key}", value]
    return command, argv + more, made[0]


def make_scene() -> None:
    """Fill the working folder with a clip, a checkpoint, an inversion, and broken ones of each."""
    row = np.arange(64)
    frames = [np.stack(np.broadcast_arrays(3 * row, row[:, None], 9 * i), -1) for i in range(7)]
    write_video(Path("clip.mp4"), np.uint8(frames), 12)
    build_random(Path("tiny"))
    shutil.move("tiny/controlnet", "controlnet")
    status, _, errors = run(PREPROCESS, [f"--{key}={value}" for key, value in INVERT.items()])
    assert status == 0, errors
    shutil.copytree("latents/sd_tiny/clip", f"latents/sd_tiny/{NAME}")
    shutil.copy("clip.mp4", f"{NAME}.mp4")
    Path("loop").symlink_to("loop")

    clip = Path("clip.mp4").read_bytes()
    sources = {"text": b"no video", "empty": b"", "zeroed": bytes(9999), "header": clip[:64]}
    sources |= {"cut": clip[: len(clip) // 2], "garbage": random.Random(0).randbytes(5000)}
    for name, data in sources.items():  # of the clip's name, so that edits find its latents
        write(Path(f"bad/sources/{name}/clip.mp4"), data)
        write(Path(f"bad/sources/images_{name}/clip/1.png"), data)
    write(Path("bad/sources/name/clip/\udcff.png"), b"")
    Path("bad/sources/nothing/clip").mkdir(parents=True)
    Path("bad/sources/folders/clip/1.png").mkdir(parents=True)

    build_random(Path("other"), SHAPES)
    damage_parts()
    shutil.rmtree("other")


def damage_parts() -> None:
    """Make copies of the checkpoint and the ControlNet, each with one file or part broken."""
    for part, changes in NO_JSON.items():
        whole = "controlnet" if part == "controlnet" else f"tiny/{part}"
        shutil.rmtree(damaged_copy(part, "gone"))
        if part in WIDE:  # whole, but of other widths than the rest
            target = damaged_copy(part, "other")
            shutil.rmtree(target)
            shutil.copytree(f"other/{part}", target)
        # The tokenizer works without its configuration.
        for path in [p for p in sorted(Path(whole).iterdir()) if p.name != "tokenizer_config.json"]:
            data = path.read_bytes()
            ways = {"missing": None, "empty": b"", "zeroed": bytes(len(data))}
            ways["cut"] = data[: len(data) // 2]
            if path.suffix == ".json":
                ways |= {"list": b"[]", "number": b"3", "words": b"words"}
                if part != "scheduler":  # whose defaults are a schedule
                    ways["nothing"] = b"{}"
                for key, value in changes.items():
                    ways[key] = json.dumps(json.loads(data) | {key: value}).encode()
            for way, changed in ways.items():
                damaged = damaged_copy(part, f"{path.stem}_{way}") / path.name
                damaged.unlink()  # it is a link
                if changed is not None:
                    damaged.write_bytes(changed)


def write(path: Path, data: bytes) -> None:
    """Write a file into a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def damaged_copy(part: str, way: str) -> Path:
    """A copy, of links, of the checkpoint or of the ControlNet; returns the part's folder in it."""
    if part == "controlnet":
        return shutil.copytree(part, Path(f"bad/controlnets/{way}"), copy_function=os.link)
    # Edits look for the latents of the folder's name.
    target = Path(f"bad/models/{part}_{way}/tiny")
    return shutil.copytree("tiny", target, copy_function=os.link) / part


def run(command: str, argv: list[str]) -> tuple[int, str, str]:
    """Run a command in a fork: its exit status (of a signal: negative) and the text of both streams."""
    main = importlib.import_module(command).main
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        if not (pid := os.fork()):
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(PATIENCE)
            sys.argv, status = [f"{command}.py", *argv], 1
            try:
                main()
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [
            os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace") for file in (out, err)
        ]
    return status, *texts


def contents() -> dict[str, int]:
    """All files and folders of the working folder, and the files' sizes."""
    found = {}
    for folder, folders, files in os.walk("."):
        found |= {f"{folder}/{name}": 0 for name in folders}
        found |= {f"{folder}/{name}": os.lstat(f"{folder}/{name}").st_size for name in files}
    return found


def faults(status: int, stdout: str, stderr: str, changed: list[str]) -> list[str]:
    """All that keeps a command's end from being a refusal."""
    lines = [line for line in re.split("[\r\n]", stderr) if not PROGRESS.match(line)]
    found = [f"exit status {status}"] if status != 2 else []
    if "Traceback" in stderr:
        found.append(f"traceback: {lines[-1][:300]}")
    elif len(lines) != 1 or not lines[0].startswith("error: "):
        found.append(f"{len(lines)} lines: {str(lines)[:300]}")
    found += ["it wrote to stdout"] if stdout else []
    return found + ([f"left behind or changed: {', '.join(changed[:3])}"] if changed else [])


def main() -> None:
    """Make the mistakes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the report")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = arguments.json and arguments.json.resolve()
    scene = Path(tempfile.mkdtemp(prefix="mistakes-"))
    (scene / "yaml").mkdir()
    (scene / "work").mkdir()
    os.chdir(scene / "work")
    make_scene()

    rng, cases, failures, before = random.Random(arguments.seed), Counter(), [], contents()
    began = time.monotonic()
    for index in range(arguments.count):
        command, argv, kind = draw(rng, Path(f"../yaml/{index}.yaml"))
        cases[kind] += 1
        end, after = run(command, argv), contents()
        if found := faults(*end, sorted(dict(before.items() ^ after.items()))):
            line = shlex.join(["python", str(ROOT / f"{command}.py"), *argv])
            failures.append({"kind": kind, "command": line, "faults": found, "stderr": end[2]})
            for path in sorted(after.keys() - before.keys(), reverse=True):
                os.remove(path) if os.path.isfile(path) else os.rmdir(path)

    seconds, failed = time.monotonic() - began, Counter(failure["kind"] for failure in failures)
    cells = [[kind, cases[kind], cases[kind] - failed[kind]] for kind in sorted(cases)]
    total = f"seed {arguments.seed}, {seconds:.0f} s", cases.total(), cases.total() - len(failures)
    rows = ([str(cell) for cell in row] for row in [*cells, total])
    print(markdown(["mistakes", "cases", "refused"], rows), end="")
    sys.stdout.reconfigure(errors="surrogateescape")  # so that a line can be repeated, byte by byte
    for failure in failures:
        print(f"\ncd {Path.cwd()} && {failure['command']}", *failure["faults"], sep="\n    ")
    if report:
        written = {"seed": arguments.seed, "seconds": seconds, "cases": cases, "failures": failures}
        report.write_text(json.dumps(written, indent=1))
    if failures:
        sys.exit(1)
    shutil.rmtree(scene)


if __name__ == "__main__":
    main()
