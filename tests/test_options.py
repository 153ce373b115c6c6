"""Options: flags, YAML files and their mistakes, each of which is named in one line."""

from dataclasses import fields, replace

import pytest
import yaml
from test_cli import ROOT, TECHNIQUES, refusal, run_process

from tokenflow.cli import parse
from tokenflow.config import EditConfig, PnPConfig, PreprocessConfig, SDEditConfig
from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.errors import UserError
from tokenflow.options import build

NEEDED = {"data_path": "a.mp4", "prompt": "a dog"}


def parse_edit(*flags, cls=PnPConfig):
    needed = [word for name, value in NEEDED.items() for word in (f"--{name}", value)]
    return parse(cls, "", "config_pnp.yaml", [*needed, *flags])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--promt", "x"], "unknown flag '--promt'; did you mean 'prompt'"),
        (["--resume", "true", "stray"], "'stray' belongs to no flag; .* in quotes"),
        (["--guidance_scale", "strong"], "guidance_scale: 'strong' is not a number"),
        (["--n_frames", "many"], "n_frames: 'many' is not a whole number"),
        (["--resume", "maybe"], "resume: 'maybe' is not true or false"),
        (["--pnp_f_t", "1.5"], "pnp_f_t: 1.5 .* between 0 and 1"),
        (["--pnp_f_t", "nan"], "pnp_f_t: nan .* between 0 and 1"),
        (["--batch_size", "0"], "batch_size: 0 .* between 1 and"),
        (["--propagation", "both"], "propagation: 'both' is none of flanking, previous"),
        (["--sd_version", "3"], "sd_version: '3' is none of 1.5, 2.0, 2.0-768, 2.1"),
        (["--device", "tpu"], "device: 'tpu' is none of auto, cpu"),
        (["--device", "auto:1"], "device: 'auto:1'"),
        (["--device", "cuda:" + 30 * "9"], "device: 'cuda:99"),
        (["--output_path", "\udcff"], "output_path: .* no UTF-8"),
        (["--prompt", " "], "prompt: it is empty"),
        (["--config_path", "missing.yaml"], "config_path: .*missing.yaml"),
    ],
)
def test_mistakes_in_flags(flags, words):
    with pytest.raises(UserError, match=words):
        parse_edit(*flags)


@pytest.mark.parametrize(
    "text, words",
    [
        ("gidance_scale: 3", "unknown key 'gidance_scale'; did you mean 'guidance_scale'"),
        ("mask: 2020-13-45", "is not YAML: month"),
        ("- mask", "must hold `key: value` lines"),
    ],
)
def test_mistakes_in_yaml(tmp_path, text, words):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        parse_edit("--config_path", str(tmp_path / "wrong.yaml"))


def test_options_that_do_not_fit_together():
    with pytest.raises(UserError, match="start: 0.01 of 50 steps .* at least 0.02"):
        SDEditConfig(**NEEDED, start=0.01)
    with pytest.raises(UserError, match="steps: 3 .* use --steps 50"):
        PreprocessConfig(data_path="a.mp4", steps=3)


@pytest.mark.parametrize("cls", [PreprocessConfig, *TECHNIQUES.values()])
def test_numbers_are_bounded(cls):
    """Numbers that are too large are refused at once, not by what is computed from them."""
    numbers = [f for f in fields(cls) if f.type in (int, float, int | None)]
    assert len(numbers) > 5
    for f in numbers:
        needed = {key: value for key, value in NEEDED.items() if key in cls.__dataclass_fields__}
        with pytest.raises(UserError, match=f"{f.name}: .* must be between"):
            build(cls, {**needed, f.name: "9" * 30})


FASTER = {"n_inversion_steps": 25, "n_timesteps": 25}


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
    assert 10 <= len(written) <= 15
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
