"""LyCORIS: LoCon, LoHa and LoKr change weights as peft's own layers do; what is none of them is refused."""

import pytest
import torch
from loras import compute_results, write_tensors
from peft.tuners.loha.layer import make_weight
from peft.tuners.loha.layer import make_weight_cp as make_weight_with_cores
from peft.tuners.lokr.layer import make_kron
from peft.tuners.lokr.layer import make_weight_cp as make_weight_with_core
from test_lora import copied

from tokenflow.diffusion.lora import check_loras, use_loras

RANK, SCALE = 3, 0.7
BLOCK = "down_blocks.0.attentions.0"
LAYERS = {
    "unet": [f"{BLOCK}.transformer_blocks.0.attn1.to_q", f"{BLOCK}.proj_in"]
    + ["down_blocks.0.resnets.1.conv2"],
    "text_encoder": ["encoder.layers.0.self_attn.out_proj", "encoder.layers.0.mlp.fc1"],
}
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}


def lora(weight, alpha, draw):
    """A layer's tensors and its change of weights; of all kinds below, as LyCORIS and peft define it."""
    up, down = draw(len(weight), RANK, *[1] * (weight.ndim - 2)), draw(RANK, *weight.shape[1:])
    change = alpha / RANK * up.flatten(1) @ down.flatten(1)
    return {"lora_up.weight": up, "lora_down.weight": down}, change


def locon_with_cores(weight, alpha, draw):
    if weight.ndim == 2:
        return lora(weight, alpha, draw)
    up, core = draw(len(weight), RANK, 1, 1), draw(RANK, RANK, *weight.shape[2:])
    down = draw(RANK, weight.shape[1], 1, 1)
    change = torch.einsum("ijkl, jr, pi -> prkl", core, down.flatten(1), up.flatten(1))
    tensors = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": down}
    return tensors, alpha / RANK * change


def loha(weight, alpha, draw):
    shapes = (len(weight), RANK), (RANK, weight[0].numel())
    factors = [draw(*shape) for shape in shapes * 2]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    change = make_weight(*factors, scale=torch.tensor(alpha / RANK))
    return dict(zip(names, factors, strict=True)), change


def loha_with_cores(weight, alpha, draw):
    if weight.ndim == 2:
        return loha(weight, alpha, draw)
    out, inside, *kernel = weight.shape
    factors = [draw(*shape) for shape in ((RANK, RANK, *kernel), (RANK, out), (RANK, inside)) * 2]
    names = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")
    change = make_weight_with_cores(*factors, scale=torch.tensor(alpha / RANK))
    return dict(zip(names, factors, strict=True)), change


def lokr(weight, alpha, draw):
    first, a, b = draw(2, 4), draw(len(weight) // 2, RANK), draw(RANK, weight[0].numel() // 4)
    change = make_kron(first, a @ b, alpha / RANK)
    return {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b}, change


def lokr_of_whole_factors(weight, alpha, draw):
    first, second = draw(2, 4), draw(len(weight) // 2, weight.shape[1] // 4, *weight.shape[2:])
    return {"lokr_w1": first, "lokr_w2": second}, make_kron(first, second)  # without alpha


def lokr_with_cores(weight, alpha, draw):
    if weight.ndim == 2:
        return lokr(weight, alpha, draw)
    out, inside, *kernel = weight.shape
    left, right, core = draw(2, RANK), draw(RANK, 4), draw(RANK, RANK, *kernel)
    a, b = draw(RANK, out // 2), draw(RANK, inside // 4)
    change = make_kron(left @ right, make_weight_with_core(core, a, b), alpha / RANK)
    names = ("lokr_w1_a", "lokr_w1_b", "lokr_t2", "lokr_w2_a", "lokr_w2_b")
    return dict(zip(names, (left, right, core, a, b), strict=True)), change


KINDS = locon_with_cores, loha, loha_with_cores, lokr, lokr_of_whole_factors, lokr_with_cores


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_equals_merged_weights(sd, tmp_path, kind):
    generator, tensors, merged = torch.Generator().manual_seed(0), {}, copied(sd)

    def draw(*shape):
        return 0.5 * torch.randn(shape, generator=generator)

    layers = [(part, name) for part, names in LAYERS.items() for name in names]
    for alpha, (part, name) in enumerate(layers, start=1):
        weight = getattr(merged, part).get_submodule(name).weight
        layer, change = kind(weight, alpha, draw)
        weight += SCALE * change.view_as(weight)
        layer["alpha"] = torch.tensor(float(alpha))
        key = PREFIXES[part] + name.replace(".", "_")
        tensors |= {f"{key}.{name}": tensor for name, tensor in layer.items()}
    path = str(write_tensors(tmp_path / "lycoris.safetensors", tensors))
    check_loras([path], sd.unet.config)
    adapted = use_loras(copied(sd), [path], [SCALE])
    expected, plain = compute_results(merged), compute_results(sd)
    torch.testing.assert_close(compute_results(adapted), expected, atol=1e-3, rtol=1e-3)
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(plain, expected, strict=True))
    with adapted.original():
        torch.testing.assert_close(compute_results(adapted), plain, atol=1e-5, rtol=1e-5)
