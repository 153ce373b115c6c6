"""TokenFlow: joint editing of keyframes and propagation of their tokens to all other frames.

The algorithm of Geyer et al., TokenFlow (ICLR 2024, arXiv 2307.10373), as pure tensor functions,
and the one context manager that installs it in a diffusers UNet.

Shapes: (3, n, s, d) = streams (source, uncond, cond), frames, tokens, channels.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

SOURCE, UNCOND, COND = range(3)
N_STREAMS = 3

# Similarities held at once while nearest tokens are searched: 64 MiB in fp32.
SIMILARITY_BLOCK = 1 << 24

# Plug-and-Play injects into the decoder's self-attentions but the first (the paper's layers 4-11),
# and into the output of one residual block of the decoder (Tumanyan et al., arXiv 2211.12572).
INJECTED_ATTENTION = re.compile(r"up_blocks\.(1\.attentions\.[12]|[23]\.attentions\.\d+)\.")
INJECTED_RESNET = (1, 1)  # up_blocks[1].resnets[1]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """Multi-head attention of queries (b, q, d) over keys and values (b, k, d): (b, q, d)."""
    query, key, value = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)
    )  # b heads tokens d/heads
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def extended_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """Self-attention of the joint edit (section 4.1): (3, n, s, d) to (3, n, s, d).

    Each source frame attends within itself; uncond and cond attend over the tokens of all frames.
    Frames that share keys and values are one long sequence, so nothing is repeated.
    """
    source = attention(query[SOURCE], key[SOURCE], value[SOURCE], heads)  # n s d
    joint = attention(*(x[UNCOND:].flatten(1, 2) for x in (query, key, value)), heads)
    return torch.cat([source[None], joint.view_as(query[UNCOND:])])  # 3 n s d


def frame_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """Plain self-attention, each frame within itself: (3, n, s, d) to (3, n, s, d)."""
    output = attention(*(x.flatten(0, 1) for x in (query, key, value)), heads)
    return output.view_as(query)


def draw_keyframes(n_frames: int, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """One random frame of each chunk of `batch_size` frames: indices (n_chunks,), ascending."""
    n_chunks = -(-n_frames // batch_size)
    offsets = torch.randint(batch_size, (n_chunks,), generator=generator)
    # A short last chunk has fewer frames than the draw may name.
    return (offsets + batch_size * torch.arange(n_chunks)).clamp(max=n_frames - 1)


def flanking_weights(frames: torch.Tensor, keyframes: torch.Tensor) -> torch.Tensor:
    """How much of each keyframe a frame blends, as in the paper (section 4.2): (n, k), rows sum to 1.

    The nearest keyframe on each side counts in proportion to its closeness; a keyframe takes itself
    whole; frames outside the outermost keyframes take the outermost.
    `frames` (n,) and `keyframes` (k,), ascending, are indices in the video.
    """
    last = len(keyframes) - 1
    right = torch.searchsorted(keyframes, frames)  # first keyframe at or after the frame
    left = torch.searchsorted(keyframes, frames, right=True) - 1  # last one at or before it
    left, right = left.clamp(min=0), right.clamp(max=last)
    d_left, d_right = (frames - keyframes[left]).abs(), (frames - keyframes[right]).abs()
    w_left = torch.where(left == right, 0.5, d_right / (d_left + d_right).clamp(min=1))
    return _blend_weights(left, right, w_left, len(keyframes))


def previous_weights(
    frames: torch.Tensor, keyframes: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """How much of each keyframe a frame blends, as in the authors' code: (n, k), rows sum to 1.

    The keyframes of the frame's own and of the previous chunk, weighted by a sigmoid of the
    distances to the chunks' midpoints; the first chunk takes its own alone.
    """
    own = frames // batch_size
    previous = (own - 1).clamp(min=0)
    d_own = (frames - own * batch_size - batch_size // 2).abs()
    d_previous = (frames - (own - 1) * batch_size - batch_size // 2).abs()
    w_own = torch.sigmoid(d_previous / (d_own + d_previous))
    return _blend_weights(own, previous, w_own, len(keyframes))


def _blend_weights(
    first: torch.Tensor, second: torch.Tensor, w_first: torch.Tensor, n_keyframes: int
) -> torch.Tensor:
    weights = torch.zeros(len(first), n_keyframes)
    weights.scatter_add_(1, first[:, None], w_first[:, None])
    return weights.scatter_add_(1, second[:, None], 1 - w_first[:, None])


def nearest_tokens(tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
    """For each of `tokens` (n, s, d) the index of the most similar of `key_tokens` (k, d): (n, s).

    Cosine similarity, for which the `key_tokens` must have unit length; the length of a token itself
    changes no order. Only a block of the similarities exists at any time.
    """
    rows = max(1, SIMILARITY_BLOCK // len(key_tokens))
    blocks = tokens.float().flatten(0, 1).split(rows)
    nearest = [(block @ key_tokens.T).argmax(-1) for block in blocks]
    return torch.cat(nearest).view(tokens.shape[:2])


def propagate(
    tokens: torch.Tensor,
    key_tokens: torch.Tensor,
    key_outputs: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Propagate the keyframes' self-attention outputs to other frames (equations 3 and 4).

    tokens: (n, s, d), the source tokens of the frames.
    key_tokens: (k, s, d), the source tokens of the keyframes, of unit length.
    key_outputs: (3, k, s, d), the keyframes' self-attention outputs.
    weights: (n, k), how much of each keyframe a frame blends.
    Returns (3, n, s, d).
    """
    output = key_outputs.new_zeros(N_STREAMS, *tokens.shape)
    for keyframe in weights.any(0).nonzero().flatten().tolist():
        frames = weights[:, keyframe].nonzero().flatten()  # m
        nearest = nearest_tokens(tokens[frames], key_tokens[keyframe])  # m s
        share = weights[frames, keyframe].to(output)[:, None, None]  # m 1 1
        output[:, frames] += share * key_outputs[:, keyframe][:, nearest]  # 3 m s d
    return output


class TokenFlow:
    """What the layers of one UNet do in its next pass, and what they remember between passes."""

    def __init__(self) -> None:
        self.weights: torch.Tensor | None = None  # (n, k) in propagation, None in a joint edit
        self.extended = True
        self.inject_attention = False
        self.inject_features = False

    def begin_joint_edit(
        self, inject_attention: bool, inject_features: bool, extended: bool = True
    ) -> None:
        """The next pass edits all keyframes jointly and remembers their tokens.

        Without `extended` attention each frame is edited by itself: what TokenFlow is compared with.
        """
        self.weights, self.extended = None, extended
        self.inject_attention, self.inject_features = inject_attention, inject_features

    def begin_propagation(self, weights: torch.Tensor, inject_features: bool) -> None:
        """The next pass takes its self-attention outputs from the keyframes, by `weights` (n, k)."""
        self.weights = weights
        self.inject_features = inject_features

    def _feature_hook(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        """Give uncond and cond the source's features (Plug-and-Play): (3n, c, h, w) to the same."""
        if not self.inject_features:
            return None
        return output.chunk(N_STREAMS)[SOURCE].repeat(N_STREAMS, 1, 1, 1)


class TokenFlowAttention:
    """Attention processor of one self-attention layer: joint edit or propagation, as told."""

    def __init__(self, flow: TokenFlow, injected: bool) -> None:
        self.flow = flow
        self.injected = injected
        self.key_tokens: torch.Tensor | None = None  # k s d
        self.key_outputs: torch.Tensor | None = None  # 3 k s d

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """Input of the layer (3n, s, d), which is `norm1`'s output, to its output (3n, s, d)."""
        tokens = hidden_states.unflatten(0, (N_STREAMS, -1))  # 3 n s d
        if self.flow.weights is None:
            output = self._joint_edit(attn, tokens)
        else:
            output = propagate(tokens[SOURCE], self.key_tokens, self.key_outputs, self.flow.weights)
        return output.flatten(0, 1)

    def _joint_edit(self, attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)  # 3 n s d
        if self.injected and self.flow.inject_attention:
            query = query[SOURCE].expand_as(query)
            key = key[SOURCE].expand_as(key)
        attend = extended_attention if self.flow.extended else frame_attention
        projection, dropout = attn.to_out
        self.key_outputs = dropout(projection(attend(query, key, value, attn.heads)))
        self.key_tokens = F.normalize(tokens[SOURCE].float(), dim=-1)
        return self.key_outputs


@contextmanager
def install_tokenflow(unet: UNet2DConditionModel) -> Iterator[TokenFlow]:
    """Install TokenFlow in every self-attention of `unet`, and take it out again at the end.

    Yields the handle that says what the next pass does. Passes take the three streams concatenated:
    (3n, 4, h, w). Raises ValueError when the UNet is not of Stable Diffusion's layout and
    RuntimeError when TokenFlow is installed already; the UNet is left as it was in every case.
    """
    before = dict(unet.attn_processors)
    if any(isinstance(processor, TokenFlowAttention) for processor in before.values()):
        raise RuntimeError("TokenFlow is already installed in this UNet")
    flow = TokenFlow()
    processors = {
        name: TokenFlowAttention(flow, injected=bool(INJECTED_ATTENTION.match(name)))
        if name.endswith(".attn1.processor")
        else processor
        for name, processor in before.items()
    }
    if not any(isinstance(p, TokenFlowAttention) and p.injected for p in processors.values()):
        raise ValueError("no self-attention of Stable Diffusion's decoder in this UNet")
    block, resnet = INJECTED_RESNET
    try:
        convolution = unet.up_blocks[block].resnets[resnet].conv2
    except (AttributeError, IndexError) as error:
        raise ValueError("no residual block of Stable Diffusion's decoder in this UNet") from error
    hook = convolution.register_forward_hook(flow._feature_hook)
    try:
        unet.set_attn_processor(dict(processors))  # a copy, because the setter empties its argument
        yield flow
    finally:
        hook.remove()
        unet.set_attn_processor(dict(before))
