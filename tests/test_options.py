"""Options: flags, YAML files and their mistakes, each of which is named in one line."""

import errno
import io
import logging
import re
from dataclasses import fields, replace

import cv2
import pytest
import torch
import yaml
from test_cli import ROOT, TECHNIQUES, refusal, run_process
from tqdm import tqdm

from tokenflow.cli import command, parse
from tokenflow.config import EditConfig, PnPConfig, PreprocessConfig
from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.editing.identity import without_how
from tokenflow.errors import UserError
from tokenflow.options import build, dump

NEEDED = {"data_path": "a.mp4", "prompt": "a dog"}


def parse_edit(*flags, cls=PnPConfig):
    needed = [word for name, value in NEEDED.items() for word in (f"--{name}", value)]
    return parse(cls, "", "config_pnp.yaml", [*needed, *flags])


def test_yaml_holds_what_flags_do(tmp_path):
    """No value is guessed to be another than its text; null is the default, or none where that can be."""
    text = "prompt: yes\nnegative_prompt: 1_0\nsd_version: 2.0\nmodel: 2020-01-02\noverwrite: yes\n"
    text += "fuse: null\nkeyframe_interval: null\ndata_path: a.mp4\n"
    (tmp_path / "edit.yaml").write_text(text)
    config = parse(PnPConfig, "", "config_pnp.yaml", ["--config_path", str(tmp_path / "edit.yaml")])
    assert (config.prompt, config.negative_prompt, config.overwrite) == ("yes", "1_0", True)
    assert (config.sd_version, config.model) == ("2.0", "2020-01-02")
    assert (config.fuse, config.keyframe_interval) == (None, 8)
    # What an edit writes is read as it was.
    words = {"prompt": "yes", "model": "2.0", "negative_prompt": "null", "lora": ("~", "1_0")}
    odd = PnPConfig(data_path="é", **words)
    (tmp_path / "config.yaml").write_text(dump(odd), encoding="utf-8")
    argv = ["--config_path", str(tmp_path / "config.yaml")]
    assert parse(PnPConfig, "", "config_pnp.yaml", argv) == odd


def test_keyframes_do_not_depend_on_the_batch_size():
    assert [parse_edit("--batch_size", n).keyframe_interval for n in ("4", "auto")] == [8, 8]
    assert without_how(parse_edit("--batch_size", "4")) == without_how(parse_edit())


RUN_OF_TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
RUN_OF_TWO |= {"MASTER_ADDR": "::1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": ""}, "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR"),
        ({"RANK": "1"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not as torchrun"),
        ({"WORLD_SIZE": "2"}, "environment's RANK, LOCAL_RANK"),
        (RUN_OF_TWO | {"RANK": "two"}, "environment's RANK: "),
        (RUN_OF_TWO | {"RANK": "2"}, "environment's RANK, WORLD_SIZE: "),
        (RUN_OF_TWO | {"LOCAL_WORLD_SIZE": "x"}, "environment's LOCAL_WORLD_SIZE: "),
    ],
)
def test_what_another_run_left_in_the_environment(monkeypatch, capsys, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        command(lambda: "result")()
    out, errors = capsys.readouterr()
    assert out == "" and words in errors and len(errors.splitlines()) == 1


def test_only_the_first_process_prints_its_result(monkeypatch, capsys):
    for rank in "01":
        for name, value in (RUN_OF_TWO | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        command(lambda rank=rank: f"result of {rank}")()
    assert capsys.readouterr().out == "result of 0\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_result_is_one_line_that_every_terminal_can_show(monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    command(lambda: "é\n\x1b[31m\udcff/edited.mp4")()
    stdout.flush()
    shown = {"ascii": "\\xe9", "utf-8": "é"}[encoding] + "\\n\\x1b[31m\\udcff/edited.mp4\n"
    assert stdout.buffer.getvalue().decode(encoding) == shown


def test_names_do_not_control_the_terminal(capsys):
    def main():
        logging.getLogger("tokenflow").info("%s is edited", "\x1b]0;title\a")
        raise UserError("no \x1b[2J")

    with pytest.raises(SystemExit, match="2"):
        command(main)()
    assert capsys.readouterr().err == "\\x1b]0;title\\x07 is edited\nerror: no \\x1b[2J\n"


RESOURCES = "this machine has run out of memory, threads, open files"
EXHAUSTED = [
    (MemoryError(), RESOURCES),
    (RuntimeError("can't start new thread"), f"{RESOURCES}.*can.t start new thread"),
    (cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes"), RESOURCES),
    (ValueError("unable to mmap 5 bytes from file: Cannot allocate memory (12)"), RESOURCES),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "the device is out of memory"),
    (RuntimeError("CUDA out of memory."), "the device is out of memory: use --batch_size auto"),
    (OSError(errno.EMFILE, "Too many open files", "out"), "Too many open files: .out"),
    *((OSError(number, "x"), RESOURCES) for number in (errno.ENOMEM, errno.EAGAIN)),
    *((OSError(number, "x"), RESOURCES) for number in (errno.ENFILE, errno.EFBIG)),
]


def end_with(error, cause=None):
    """End a command with an error."""

    def main():
        raise error from cause

    command(main)()


@pytest.mark.parametrize("error, words", EXHAUSTED, ids=repr)
def test_what_runs_out_ends_a_command(capsys, error, words):
    """Also where it is the cause of what a library raises."""
    wrapped = ValueError("cannot be loaded")
    for raised, cause, said in ((error, None, words), (wrapped, error, RESOURCES)):
        with pytest.raises(SystemExit, match="1"):
            end_with(raised, cause)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and re.search(said, line)


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("mask: wrong"), 2, "error: mask: wrong"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out: .* denied; check"),
        (OSError(errno.ENOSPC, "No space left", "out"), 1, "No space left; .* command resumes"),
        (FileNotFoundError(errno.ENOENT, "No such file", "out"), 2, "out: No such file; check"),
    ],
)
def test_what_ends_a_command(capsys, error, status, words):
    with pytest.raises(SystemExit, match=str(status)):
        end_with(error)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)


def test_an_error_stands_on_a_line_of_its_own(capsys):
    """Although the error keeps alive whatever shows a progress bar."""

    def main():
        for _ in tqdm(range(3), "Reading"):
            raise UserError("no such frame")

    with pytest.raises(SystemExit, match="2"):
        command(main)()
    assert "error: no such frame" in re.split("[\\r\\n]", capsys.readouterr().err)


def test_errors_of_the_code_itself_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        command(lambda: str(1 / 0))()


@pytest.mark.parametrize("cls", [PreprocessConfig, *TECHNIQUES.values()])
def test_numbers_are_bounded(cls):
    """Numbers that are too large are refused at once, not by what is computed from them."""
    numbers = [f for f in fields(cls) if f.type in (int, float, int | None)]
    assert len(numbers) > 5
    for f in numbers:
        needed = {key: value for key, value in NEEDED.items() if key in cls.__dataclass_fields__}
        with pytest.raises(UserError, match=f"{f.name}: .* must be between"):
            build(cls, {**needed, f.name: "9" * 30})


FASTER = {"n_inversion_steps": 25, "n_timesteps": 25, "alternate": True}


@pytest.mark.parametrize(
    "name, cls, changes",
    [
        *((f"config_{technique}.yaml", cls, {}) for technique, cls in TECHNIQUES.items()),
        ("fast.yaml", PnPConfig, FASTER),
        ("config_evaluate.yaml", EvaluateConfig, {}),
    ],
)
def test_shipped_configs_are_the_defaults(name, cls, changes):
    """The YAML files that users start from hold the usual options and the defaults of the code."""
    written = yaml.safe_load((ROOT / "configs" / name).read_text())
    assert 10 <= len(written) <= 16
    needed = NEEDED if issubclass(cls, EditConfig) else {"edits": "a"}
    assert not any(written[key] for key in needed)
    assert build(cls, written | needed) == replace(build(cls, needed), **changes)


@pytest.mark.parametrize("name", [*(f"config_{name}.yaml" for name in TECHNIQUES), "fast.yaml"])
def test_a_prompt_is_never_made_up(name):
    cls = TECHNIQUES.get(name.removeprefix("config_").removesuffix(".yaml"), PnPConfig)
    for key, value in NEEDED.items():
        missing = (NEEDED.keys() - {key}).pop()
        with pytest.raises(UserError, match=f"{missing}: missing"):
            parse(cls, "", name, [f"--{key}", value])


def test_commands_as_processes(tmp_path):
    result = run_process("run_tokenflow_pnp.py", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert all(f"--{f.name} " in result.stdout for f in fields(PnPConfig))
    # Several values only where they mean something.
    assert "--lora X [X ...]" in result.stdout and "--pnp_f_t X [X ...]" in result.stdout
    assert "[--n_frames X]" in result.stdout and "[--model X]" in result.stdout
    refusal(run_process("run_tokenflow_pnp.py", "--promt", "x", cwd=tmp_path), "did you mean")
