"""Joint attention against diffusers' own."""

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tokenflow_utils import COND, UNCOND, JointEdit, TokenFlow, TokenFlowAttention


def attend(attn, tokens, all_tokens):
    """What diffusers computes where one frame (s, d) attends to some tokens (k, d)."""
    return AttnProcessor2_0()(attn, tokens[None], encoder_hidden_states=all_tokens[None])[0]


@torch.no_grad()
def test_joint_attention(sd):
    """Each keyframe attends to all keyframes of its own pass and of the pass before."""
    attn = sd.unet.up_blocks[2].attentions[0].transformer_blocks[0].attn1
    width = attn.to_q.in_features
    source, uncond, cond = torch.randn(3, 4, 6, width, generator=torch.Generator().manual_seed(0))
    tokenflow = TokenFlow((UNCOND, COND), True)
    layer = TokenFlowAttention(tokenflow, "any")
    first, second = JointEdit([5, 2], attended_later=True), JointEdit([3, 4], [5, 2])
    outputs = []
    for joint, rows in ((first, slice(0, 2)), (second, slice(2, 4))):
        tokenflow.task = joint
        passed = layer(attn, torch.cat([source[rows], uncond[rows], cond[rows]]))
        outputs.append(passed.unflatten(0, (3, -1)))
    of_source, *of_edits = torch.cat(outputs, dim=1)
    for frame in range(4):
        torch.testing.assert_close(of_source[frame], attend(attn, source[frame], source[frame]))
        for edited, output in zip((uncond, cond), of_edits, strict=True):
            seen = edited[: 2 if frame < 2 else 4].flatten(0, 1)
            torch.testing.assert_close(output[frame], attend(attn, edited[frame], seen))
