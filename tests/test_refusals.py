"""What users get wrong, case by case: one line says what is wrong, before anything is loaded or written.

`test_mistakes.py` makes random ones, and looks less closely at what is said.
"""

import json
import os
import re
import shlex
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm import single_file
from loras import kohya, write_tensors
from safetensors.torch import load_file
from test_cli import edit_flags, last_line, refusal, run
from test_damage import WAYS
from test_mistakes import contents, damaged_copy, right_flags

import util
from tokenflow.config_sweep import SHARED
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.single_file import FIRST_LAYER
from tokenflow.video.write import write_video

MANY = "9" * 309
# 421 bytes that stand for 9 ** 9 values.
EXPLODING = "a: &a [" + ", ".join(["mask"] * 9) + "]\n"
for old, new in zip("abcdefgh", "bcdefghi", strict=True):
    EXPLODING += f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"

# By command: flags, or YAML after "yaml: ", and what is said of them.
# fmt: off
INVERTING = [
    ("--data_path missing.mp4", "missing.mp4: no such file"),
    ("--data_path 'a\nb'", r"a\\nb: no such file"),
    (f"--data_path {'n' * 300}", "nnn: File name too long.* give another"),
    ("--data_path other/clip.mp4 --save_dir latents", "another video.*--save_dir"),
    ("--data_path odd/text.mp4", "text.mp4.* no video that can be decoded"),
    ("--data_path odd/empty", "holds no images"),
    ("--data_path odd/list.m3u8", "of a playlist, give the videos"),
    ("--data_path odd/list.mp4", "of a playlist, give the videos"),
    ("--data_path odd/pipe.mp4", "neither a file nor a folder"),
    ("--data_path odd/pipes", "neither a file nor a folder"),
    ("--data_path odd/huge", "0.png: cannot be decoded as an image"),
    ("--data_path odd/thin --n_frames 1", "a frame of 10000 x 1 pixels would become"),
    ("--n_frames 9", "n_frames: .*only 7.*--n_frames 7"),
    ("--start_frame 70", "start_frame"),
    ("--H 70", "H: 70 is not a multiple of 64"),
    ("--steps 3 --save_steps 50", "steps: 3 .* use --steps 50"),
    ("--steps 70 --save_steps 50", "70 .* 50 editing steps; these do: 50, 99, 100, .* 250, .* 500"),
    ("--control tile", "control: tile needs ControlNets"),
    ("--device cuda:256", "device: cuda:256.*this machine"),
    ("--save_dir clip.mp4", "clip.mp4.*Not a directory"),
    (f"--save_dir latents/{'n' * 256}", "nnn.*: File name too long"),
    ("--model nobody/nothing", "nobody/nothing.*huggingface.*--model"),
    ("--model odd/empty", "odd/empty.*no such checkpoint"),
    ("--model -", "model: -.*neither a folder"),
    ("--model odd/missing.ckpt", "missing.ckpt.* no such file"),
    ("--model odd/itself.ckpt", "itself.ckpt is no checkpoint of Stable Diffusion"),
    ("--model odd/flat.ckpt", "flat.ckpt is no checkpoint of Stable Diffusion"),
    ("--model odd/words.ckpt", "words.ckpt is no checkpoint of Stable Diffusion"),
    ("--model odd/list.ckpt", "list.ckpt.* is broken"),
    ("--model odd/lora.ckpt", "is no checkpoint of Stable Diffusion.*LoRA"),
    ("--model odd/code.ckpt", "could run any program.*.safetensors"),
    ("--model odd/inpainting.ckpt", "inpainting with 9 channels.*2.1-768"),
    ("--model odd/alone.ckpt", "version 1.5.*beside the file.*alone"),
    ("--model odd/broken.safetensors", "broken.safetensors is broken"),
]
LOADING = [
    ("--controlnet tiny/unet", "controlnet: tiny/unet.*its weights lack"),
    ("--model odd/no_vae.ckpt", "no weights of a vae; put a folder .* beside the file"),
    ("--model odd/part.ckpt", "its unet is not of the configuration.*some weights are missing"),
    ("--vae odd/none.safetensors", "^error: vae: .*none.safetensors.* no such file"),
    ("--vae odd/lora.safetensors", "^error: vae: .*lora.safetensors.* holds no weights of a VAE"),
    ("--vae odd/part_of_vae.safetensors", "its vae is not of the .*some weights are missing"),
    ("--vae odd/empty", "^error: vae: .*empty.* holds no such checkpoint"),
    ("--vae odd/scaled", "scales its latents by 0.13025, but those of the checkpoint are scaled by 0.18215"),
    ("--vae someone/vae", "^error: vae: .*someone/vae.* cannot be downloaded; .* give --vae a folder"),
]
EDITING = [
    ("--promt x", "unknown flag '--promt'; did you mean 'prompt'"),
    ("--resume true stray", "'stray' belongs to no flag; .* in quotes"),
    ("--guidance_scale strong", "guidance_scale: 'strong' is not a number"),
    ("--n_frames many", "n_frames: 'many' is not a whole number"),
    ("--n_frames 1_0", "n_frames: '1_0' is not a whole number"),
    (f"--n_frames {'9' * 5000}", "n_frames: '9{100,200} is not a whole number"),
    (f"--n_frames {MANY}", "n_frames: 9* is out of range"),
    (f"--pnp_f_t {MANY}", "pnp_f_t: 9* is out of range"),
    ("--resume maybe", "resume: 'maybe' is not true or false"),
    ("--pnp_f_t 1.5", "pnp_f_t: 1.5 .* between 0 and 1"),
    ("--pnp_f_t nan", "pnp_f_t: nan .* between 0 and 1"),
    ("--batch_size 0", "batch_size: 0 .* between 1 and"),
    ("--propagation both", "propagation: 'both' is none of flanking, previous"),
    ("--sd_version 3", "sd_version: '3' is none of 1.5, 2.0, 2.0-768, 2.1"),
    ("--device tpu", "device: 'tpu' is none of auto, cpu"),
    ("--device auto:1", "device: 'auto:1'"),
    (f"--device cuda:{'9' * 30}", "device: 'cuda:99"),
    ("--output_path \udcff", "output_path: .* no UTF-8"),
    ("--prompt ' \n'", "prompt: it is empty"),
    ("--prompt a robotic wolf", "prompt: a robotic wolf: .* in quotes"),
    ("--config_path missing.yaml", "config_path: .*missing.yaml"),
    ("--config_path odd/pipe.mp4", "config_path: odd/pipe.mp4 is no file"),
    ("--config_path /dev/zero", "config_path: /dev/zero is no file"),
    ("--config_path odd", "config_path: odd is no file"),
    ("yaml: gidance_scale: 3", "unknown key 'gidance_scale'; did you mean 'guidance_scale'"),
    ("yaml: - mask", "must hold `key: value` lines"),
    ("yaml: mask: [auto", "cannot be read: while parsing"),
    ("yaml: mask: none\nseed: 2\nmask: auto", "cannot be read: mask is given twice"),
    ("yaml: seed: 1_0", "seed: '1_0' is not a whole number"),
    (f"yaml: seed: {'9' * 5000}", "seed: '9{100,200} is not a whole number"),
    ("yaml: output_path: {a: 1}", "output_path: .* is not a string"),
    (f"yaml: {EXPLODING}", r"cannot be read: \*a is an alias; write its value out"),
    # Of sweeps: the option, or the combination, is named.
    *((f"yaml: {name}: [['1'], ['2']]", f"error: {name}: .* share it") for name in SHARED if name != "dtype"),
    ("yaml: pnp_attn_t: []", "error: pnp_attn_t: its list is empty"),
    ("yaml: pnp_attn_t: [0.5, [1]]", "error: pnp_attn_t 1: pnp_attn_t: .* is not a number"),
    ("--pnp_attn_t 0.5 1.5", "error: pnp_attn_t 1.5: pnp_attn_t: 1.5 is out of range"),
    ("--prompt 'a dog' ' ' --seed 1 2", "error: seed 1, prompt  : prompt: it is empty"),
    ("--seed 1 2 3 4 5 6 7 8 9 --pnp_f_t 0 0 0 0 0 0 0 0", "error: seed, pnp_f_t: 72 combinations"),
    ("yaml: lora: [[a], [a, b]]\nlora_scale: [1, 2]", "error: lora a: lora_scale: 2 numbers"),
    ("--n_timesteps 5 3", "n_timesteps 3: n_timesteps: 3 steps visit"),
    ("--mask none none.mp4", "mask none.mp4: mask: none.mp4 is neither"),
    ("--mask none odd/short", "mask odd/short: mask: odd/short has 2 frames for 7"),
    ("yaml: lora: [[], [none.safetensors]]", "lora none.safetensors: lora: none.safetensors is neither"),
    ("--seed 1 2 --n_frames 1", "n_frames: 1.*at least 2"),
    ("--mask odd/black", "mask: odd/black is white nowhere in the 7 frames"),
    ("--mask odd/text.yaml", "text.yaml: is no video"),
    ("--mask odd/empty", "empty: holds no images"),
    ("--mask auto --prompt 'a red square '", "mask: auto.*are the same"),
    ("--data_path missing.mp4", "missing.mp4: no such file"),
    ("--data_path other/clip.mp4", "another video.*preprocess.py"),
    ("--n_inversion_steps 10", "no latents.*preprocess.py --data_path clip.mp4 --steps 10"),
    ("--n_timesteps 4", "n_timesteps.*preprocess.py.*--save_steps 4"),
    ("--n_frames 8", "n_frames: 8.*7 frames.*preprocess.py"),
    ("--model copy/tiny", "another model.*preprocess.py"),
    ("--clip_skip 1", "clip_skip: 1.*computed with 0.*preprocess.py.*--clip_skip 1"),
    ("--lora none.safetensors", "none.safetensors is neither"),
    ("--lora clip.mp4", "clip.mp4.*is no LoRA"),
    ("--lora odd/lora.safetensors --lora_scale 1 1", "lora_scale: 2 numbers for 1 of lora"),
    ("--lora odd/lora.safetensors --lora_scale much", "lora_scale.*a number"),
]
ADAPTING = [
    ("--lora odd/other.safetensors", "lora: .*other.safetensors .*belong to none of its layers"),
    ("--lora odd/wide.safetensors", "lora: .*wide.safetensors .*does not fit the model"),
    ("--lora odd/stray.safetensors", "lora: .*stray.safetensors .*does not fit the model"),
    ("--lora odd/weight.safetensors", "lora: .*weight.safetensors .*does not fit the model"),
    ("--lora odd/half.safetensors", "lora: .*half.safetensors "),
    ("--lora odd/dora_scale.safetensors", "lora: .*dora_scale.safetensors .*DoRA"),
    ("--lora odd/oft_blocks.safetensors", "lora: .*oft_blocks.safetensors .*oft_"),
    ("--lora odd/diff.safetensors", "lora: .*diff.safetensors .*diff"),
    ("--lora odd/hada_w1_a.safetensors", "lora: .*hada_w1_a.safetensors .*hada"),
    ("--embeddings odd/narrow.safetensors", "have 5 numbers, but a text encoder takes 32"),
    ("--embeddings odd/kernel.safetensors", "embeddings: .*kernel.safetensors .*holds no embeddings"),
    ("--embeddings odd/text.mp4", "embeddings: .*text.mp4 .*is no textual inversion"),
    ("--embeddings none.pt", "embeddings: .*none.pt .*is no textual inversion"),
]
CONTROLLING = [
    ("--control pose", "control: 'pose' is none of canny, depth"),
    ("yaml: control: [[]]", "control: it is empty"),
    ("--control canny tile --controlnet one", "controlnet: 1 for 2 of control"),
    ("--control canny tile --control_scale 1 1 1", "control_scale: 3 numbers for 2"),
    ("--control_scale 0.5 3", "control_scale: 3 is out of range"),
    ("--control path --controlnet one", "control_path: missing"),
    ("--control_path .", "control_path: . is not used, because control is canny"),
    ("--control path --control_path .", "controlnet: none is known for path"),
    ("--sd_version 2.0", "none is known for canny under sd_version 2.0; .* sd_version 1.5"),
    ("--sd_version 2.1 --control tile", "none is known for tile under sd_version 2.1"),
]
EVALUATING = [
    ("", "edits: missing"),
    ("--source clip.mp4", "edited: missing"),
    ("--edits out/pnp_clip --source clip.mp4", "edits.*either"),
    ("--edits out/none", "out/none.*not the folder of an edit"),
    ("--edits latents", "latents is not the folder of an edit"),
    ("--edits out/pnp_clip --latents_path out", "out/pnp_clip.*--latents_path"),
    ("--edits out/pnp_clip --n_frames 8", "n_frames.*only 7"),
    ("--edits a b --frame_by_frame c", "frame_by_frame.*one edit"),
    ("--source clip.mp4 --edited none.mp4", "none.mp4.*no such file"),
    ("--source clip.mp4 --edited odd/small", "small: its frames of 8 x 9 pixels"),
    ("--source odd/pipe.mp4 --edited clip.mp4", "pipe.mp4: is neither a file nor a folder"),
    ("--source clip.mp4 --edited odd/pipe.mp4", "pipe.mp4: is neither a file nor a folder"),
    ("--source odd/pipes --edited clip.mp4", "pipes/0.png"),
    ("--edits out/pnp_clip --frame_by_frame /dev/zero", "/dev/zero: is neither a file"),
    ("--edits a --device tpu", "device: 'tpu'"),
    ("yaml: edits: [a, b]\nflow: farneback", "flow: 'farneback' is none of dis, raft"),
]
EARLY = {
    "preprocess.py": INVERTING, "run_tokenflow_pnp.py": EDITING, "run_tokenflow_controlnet.py": CONTROLLING,
    "run_tokenflow_sdedit.py": [("--start 0.01 --n_timesteps 50", "start: 0.01 of 50 .* at least 0.02")],
    "evaluate.py": EVALUATING,
}
LATE = {"preprocess.py": LOADING, "run_tokenflow_pnp.py": ADAPTING}
# Of copies of the checkpoint: a file, how it is damaged, or what it holds then, and what is said.
UNET, VAE, TEXT = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
SCHEDULE, WEIGHTS = "scheduler/scheduler_config.json", "diffusion_pytorch_model.safetensors"
BROKEN = [
    (UNET, "cut", f"{UNET}.* is broken"), (UNET, "emptied", f"{UNET}.* is broken"),
    (SCHEDULE, "zeroed", f"{SCHEDULE}.* is broken"),
    (f"unet/{WEIGHTS}", "cut", f"unet/{WEIGHTS}.* is broken"),
    (f"unet/{WEIGHTS}", "emptied", f"unet/{WEIGHTS}.* is broken"),
    (f"vae/{WEIGHTS}", "zeroed", f"vae/{WEIGHTS}.* is broken"),
    ("text_encoder/model.safetensors", "cut", "text_encoder/model.safetensors.* is broken"),
    (TEXT, "cut", f"{TEXT}.* is broken"),
    ("tokenizer/tokenizer.json", None, "tokenizer knows no words"),
    (VAE, b"3", "the configuration of its vae is broken"),
    (VAE, {"latents_mean": [0.0] * 4}, "latents_mean"),
    (VAE, {"scaling_factor": None}, "scaling_factor is None"),
    (VAE, {"latent_channels": 16}, "16 channels, not 4"),
    (VAE, {"layers_per_block": 10**9}, "its vae is broken: layers_per_block"),
    (TEXT, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    (TEXT, {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    (UNET, {"down_block_types": ["DownBlock2D"]}, "none of Stable Diffusion 1 or 2.*down_block_types"),
    (SCHEDULE, b'{"_class_name": "EDMEulerScheduler"}', "EDMEulerScheduler has no betas"),
    (SCHEDULE, b'{"_class_name": "FlowMatch"}', "FlowMatch has no betas"),
    (SCHEDULE, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "pure noise.*epsilon"),
]
# fmt: on


@pytest.fixture(scope="module")
def scene(tmp_path_factory, checkpoint, clip, clip_frames, factors):
    """A folder with a clip, its inversion, an edit, and in `odd` what can be given by mistake."""
    folder = tmp_path_factory.mktemp("scene")
    shutil.copy(clip, folder / "clip.mp4")
    invert = [*right_flags("preprocess.py", checkpoint), "--inversion_prompt", "a red square"]
    last_line(run("preprocess.py", *invert, cwd=folder))
    last_line(run("run_tokenflow_pnp.py", *edit_flags(checkpoint, "pnp"), cwd=folder))
    (folder / "tiny").symlink_to(checkpoint)
    (folder / "other").mkdir()
    write_video(folder / "other" / "clip.mp4", clip_frames[::-1], 12)
    weights = f"unet/{WEIGHTS}"
    other = damaged_copy(checkpoint, folder, weights, (checkpoint / weights).read_bytes() + b" ")
    other.parent.rename(folder / "copy")
    write_odd_videos(folder / "odd", clip_frames)
    write_odd_weights(folder / "odd", checkpoint, kohya(factors))
    return folder


def write_odd_videos(folder: Path, frames: np.ndarray) -> None:
    """Playlists would pull in other files, and a pipe would be waited for."""
    for name in ("empty", "pipes"):
        (folder / name).mkdir(parents=True)
    for name in ("pipe.mp4", "pipes/0.png", "pipes/1.png"):
        os.mkfifo(folder / name)
    for name in ("text.mp4", "text.yaml", "broken.safetensors"):
        (folder / name).write_text("no video, and no weights")
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n../clip.mp4\n#EXT-X-ENDLIST\n")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile ../clip.mp4\n")
    pictures = {"small": frames[:2, :8, :9], "short": frames[:2], "thin": frames[:1, :1, :1]}
    # As of a mask whose white is 1, or a colour.
    pictures |= {"huge": frames[:1], "black": np.full_like(frames, 100)}
    pictures["thin"] = pictures["thin"].repeat(10000, 1)
    for name, shown in pictures.items():
        (folder / name).mkdir()
        util.save_frames(folder / name, 0, shown)
    (png,) = (folder / "huge").iterdir()
    data = bytearray(png.read_bytes())
    data[16:24] = struct.pack(">2I", 1 << 20, 1 << 20)  # width and height
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    png.unlink()
    (folder / "huge" / "0.png").write_bytes(data)


class Anything:
    """What no reader of weights may build."""


def write_odd_weights(folder: Path, checkpoint: Path, lora: dict[str, torch.Tensor]) -> None:
    """Files of LoRAs, embeddings and a VAE that do not fit, and single files with a configuration beside."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    vae = load_file(checkpoint / "vae" / WEIGHTS)
    tensors = {
        "lora": lora,
        "other": {name.replace("down_blocks_0", "down_blocks_7"): lora[name] for name in lora},
        "wide": lora | {k: torch.cat([t] * 2, 1) for k, t in lora.items() if "lora_down" in k},
        "stray": lora | {"unet.proj.lora_A.weight": torch.ones(2, 2)},
        "weight": {"weight": torch.ones(3)},
        "half": dict([next(iter(lora.items()))]),
        "narrow": {"emb_params": torch.zeros(2, 5)},
        "kernel": {"lora": torch.zeros(2, 3, 3, 3)},
        "part_of_vae": {k: t for k, t in vae.items() if k != "decoder.conv_in.weight"},
    }
    for kind in ("dora_scale", "oft_blocks", "diff", "hada_w1_a"):
        tensors[kind] = {f"{layer}.{kind}": torch.ones(8, 2), f"{layer}.alpha": torch.tensor(1.0)}
    for name, content in tensors.items():
        write_tensors(folder / f"{name}.safetensors", content)
    scaled = shutil.copytree(checkpoint / "vae", folder / "scaled") / "config.json"
    scaled.write_text(json.dumps(json.loads(scaled.read_text()) | {"scaling_factor": 0.13025}))

    weights, itself = single_file(checkpoint), {"step": 1}
    itself["state_dict"] = itself
    files = {
        "itself": itself,
        "flat": weights | {FIRST_LAYER: torch.zeros(32)},
        "words": weights | {FIRST_LAYER: "none"},
        "list": [],
        "lora": {"lora_unet_down": torch.zeros(1)},
        "code": {"state_dict": weights, "callback": Anything()},
        "inpainting": weights | {FIRST_LAYER: torch.zeros(32, 9, 3, 3)},
        "alone": weights,
        "no_vae": {k: v for k, v in weights.items() if "first_stage" not in k},
        "part": {k: v for k, v in weights.items() if "blocks.1.0" not in k},
    }
    bare = shutil.ignore_patterns("*.safetensors", "controlnet")
    shutil.copytree(checkpoint, folder / "bare", ignore=bare)
    for name, content in files.items():
        torch.save(content, folder / f"{name}.ckpt")
        if name != "alone":
            (folder / name).symlink_to("bare")


def flags_of(script: str, checkpoint: Path) -> list:
    """The flags of a command in which mistakes are made."""
    if script == "preprocess.py":
        return [*right_flags(script, checkpoint), "--save_dir", "new"]
    return [] if script == "evaluate.py" else edit_flags(checkpoint, "pnp")


def give(flags: list, given: str, folder: Path) -> list:
    """The flags with a mistake: other flags behind them, or a YAML file's text in place of some."""
    if not given.startswith("yaml: "):
        return [*flags, *shlex.split(given)]
    text = given.removeprefix("yaml: ")
    (folder / "wrong.yaml").write_text(text)
    pairs = zip(flags[::2], flags[1::2], strict=True)
    kept = [word for pair in pairs if f"{pair[0][2:]}:" not in text for word in pair]
    return [*kept, "--config_path", folder / "wrong.yaml"]


@pytest.mark.parametrize("case", [(script, *case) for script in EARLY for case in EARLY[script]])
def test_what_is_refused_before_anything_is_loaded(scene, checkpoint, tmp_path, monkeypatch, case):
    monkeypatch.setattr(Checkpoint, "load", None)  # not to be called
    check_refusal(scene, checkpoint, tmp_path, *case)


@pytest.mark.parametrize("case", [(script, *case) for script in LATE for case in LATE[script]])
def test_what_is_refused_while_it_is_loaded(scene, checkpoint, tmp_path, case):
    check_refusal(scene, checkpoint, tmp_path, *case)


def check_refusal(scene, checkpoint, tmp_path, script, given, words):
    """Assert that a command refuses what is given in a line that matches `words`, and writes nothing."""
    before = contents(scene)
    flags = give(flags_of(script, checkpoint), given, tmp_path)
    line = refusal(run(script, *flags, cwd=scene))
    assert re.search(words, line)
    assert contents(scene) == before


@pytest.mark.parametrize("file, damage, words", BROKEN)
def test_broken_checkpoints(checkpoint, clip, tmp_path, file, damage, words):
    """A file of the checkpoint is damaged in some way, or it holds something else."""
    shutil.copy(clip, tmp_path / "clip.mp4")
    content = damage
    if isinstance(damage, str):
        content = WAYS[damage]((checkpoint / file).read_bytes())
    broken = damaged_copy(checkpoint, tmp_path, file, content)
    flags = [*flags_of("preprocess.py", checkpoint), "--model", broken]
    assert re.search(words, refusal(run("preprocess.py", *flags, cwd=tmp_path)))
    assert not (tmp_path / "new").exists()
