"""TokenFlow: joint editing of keyframes and propagation of their tokens to all other frames.

The algorithm of Geyer et al., TokenFlow (ICLR 2024, arXiv 2307.10373), as pure tensor functions,
and the one context manager that installs it in a diffusers UNet.

Shapes: (3, n, s, d) = streams (source, uncond, cond), frames, tokens, channels.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

try:
    import nearest_cuda
except ImportError:  # triton comes with CUDA builds of torch only
    nearest_cuda = None

STREAMS = SOURCE, UNCOND, COND = 0, 1, 2

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
    """Self-attention of the joint edit (section 4.1): every frame attends over the tokens of all.

    query: (streams, n, s, d). key, value: (streams, m, s, d), of those frames and of others that were
    edited before. Frames that share keys and values are one long sequence, so nothing is repeated.
    """
    return attention(*(x.flatten(1, 2) for x in (query, key, value)), heads).view_as(query)


def frame_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """Plain self-attention, each frame within itself: (streams, n, s, d) to the same."""
    output = attention(*(x.flatten(0, 1) for x in (query, key, value)), heads)
    return output.view_as(query)


@dataclass(frozen=True)
class Blend:
    """Which two keyframes each frame blends: their positions among the keyframes, and weights, (n, 2).

    The weights of a frame sum to 1; where the second is 0, the first keyframe counts alone.
    """

    keyframes: torch.Tensor
    weights: torch.Tensor

    def of(self, frames: torch.Tensor) -> "Blend":
        """The blend of some of the frames."""
        return Blend(self.keyframes[frames], self.weights[frames])

    @property
    def whole(self) -> torch.Tensor:
        """For each frame the one keyframe that it takes whole, else -1: (n,)."""
        return torch.where(self.weights[:, 0] == 1, self.keyframes[:, 0], -1)


@dataclass(frozen=True)
class Keyframes:
    """All that decides which frames are keyframes at which timestep."""

    n_frames: int
    interval: int  # frames, of which one is a keyframe
    timesteps: tuple[int, ...]  # the noisiest first
    seed: int

    def plan(self) -> dict[int, torch.Tensor]:
        """The keyframes of each timestep: one random frame of each interval, ascending (k,)."""
        generator = torch.Generator().manual_seed(self.seed)  # draws nothing else
        starts = torch.arange(0, self.n_frames, self.interval)
        last = self.n_frames - 1  # a short last interval has fewer frames than the draw may name
        return {
            t: (starts + torch.randint(self.interval, starts.shape, generator=generator)).clamp(
                max=last
            )
            for t in self.timesteps
        }


def flanking_blend(frames: torch.Tensor, keyframes: torch.Tensor) -> Blend:
    """The paper's blend (section 4.2): the nearest keyframe on each side, in proportion to closeness.

    A keyframe takes itself whole; frames outside the outermost keyframes take the outermost.
    `frames` (n,) and `keyframes` (k,), ascending, are indices in the video.
    """
    last = len(keyframes) - 1
    right = torch.searchsorted(keyframes, frames).clamp(max=last)  # the first at or after the frame
    left = (torch.searchsorted(keyframes, frames, right=True) - 1).clamp(min=0)  # the last up to it
    d_left, d_right = (frames - keyframes[left]).abs(), (frames - keyframes[right]).abs()
    w_left = torch.where(left == right, 1.0, d_right / (d_left + d_right).clamp(min=1))
    return Blend(torch.stack([left, right], dim=1), torch.stack([w_left, 1 - w_left], dim=1))


def previous_blend(frames: torch.Tensor, interval: int) -> Blend:
    """The authors' code's blend: the keyframes of the frame's own interval and of the one before.

    They are weighted by a sigmoid of the distances to the intervals' midpoints; the first interval
    takes its own alone.
    """
    own = frames // interval
    previous = (own - 1).clamp(min=0)
    d_own = (frames - own * interval - interval // 2).abs()
    d_previous = (frames - (own - 1) * interval - interval // 2).abs()
    w_own = torch.where(own == 0, 1.0, torch.sigmoid(d_previous / (d_own + d_previous)))
    return Blend(torch.stack([own, previous], dim=1), torch.stack([w_own, 1 - w_own], dim=1))


def nearest_tokens(tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
    """For each of `tokens` (n, s, d) the index of the most similar of `key_tokens` (k, d): (n, s).

    Cosine similarity, for which the `key_tokens` must have unit length; the length of a token itself
    changes no order.
    """
    if tokens.is_cuda and nearest_cuda and nearest_cuda.runs_on(tokens.device):
        return nearest_cuda.nearest_fused(tokens, key_tokens)
    return nearest_in_blocks(tokens, key_tokens)


def nearest_in_blocks(tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
    """As `nearest_tokens`, on any device: only a block of the similarities exists at any time."""
    rows = max(1, SIMILARITY_BLOCK // len(key_tokens))
    blocks = tokens.flatten(0, 1).split(rows)
    nearest = [(block.float() @ key_tokens.T).argmax(-1) for block in blocks]
    return torch.cat(nearest).view(tokens.shape[:2])


def correspondences(tokens: torch.Tensor, key_tokens: torch.Tensor, blend: Blend) -> torch.Tensor:
    """The nearest tokens (equation 3) in the two keyframes that each frame blends: (n, 2, s).

    tokens: (n, s, d), the source tokens of the frames. key_tokens: (k, s, d), those of the
    keyframes, of unit length. Indices are 0 where a keyframe has no weight.
    """
    n_frames, n_tokens, _ = tokens.shape
    nearest = torch.zeros(n_frames, 2, n_tokens, dtype=torch.long, device=tokens.device)
    for keyframe in blend.keyframes.unique().tolist():
        used = (blend.keyframes == keyframe) & (blend.weights > 0)  # n 2
        frames, sides = used.nonzero(as_tuple=True)
        nearest[frames, sides] = nearest_tokens(tokens[frames], key_tokens[keyframe])
    return nearest


def propagate(key_outputs: torch.Tensor, nearest: torch.Tensor, blend: Blend) -> torch.Tensor:
    """Propagate the keyframes' self-attention outputs to other frames (equation 4).

    key_outputs: (streams, k, s, d). nearest: (n, 2, s), from `correspondences`.
    Returns (streams, n, s, d).
    """
    n_tokens = key_outputs.shape[2]
    # Gathered from all keyframes' tokens in one row.
    rows = nearest + n_tokens * blend.keyframes.to(nearest.device)[..., None]  # n 2 s
    outputs = key_outputs.flatten(1, 2)  # streams ks d
    first, second = (
        outputs.index_select(1, rows[:, side].flatten()).unflatten(1, (-1, n_tokens))
        for side in (0, 1)
    )  # streams n s d
    return first.lerp_(second, blend.weights[:, 1].to(outputs)[:, None, None])


@dataclass(frozen=True)
class SourceFeatures:
    """What propagation needs of the source stream at one timestep, for n frames.

    nearest: for each self-attention layer, by name, its `correspondences` (n, 2, s).
    features: (n, c, h, w), what Plug-and-Play injects in the residual block.
    """

    nearest: dict[str, torch.Tensor]
    features: torch.Tensor


@dataclass(frozen=True)
class JointEdit:
    """How keyframes are edited jointly, and which of those edited before the layers still remember.

    Layers hold keyframes in the order in which they were edited. Those at `kept` places in it stay, and
    the first `context` of those are attended to by the new ones too, if they were edited `as_context`.
    If the source's outputs are propagated like those of the other streams, as the authors' code does,
    layers remember them too; else the source always has its own attention. What they remember of its
    tokens finds correspondences, unless propagation is given the source's features. Without `extended`
    attention each frame is edited by itself: what TokenFlow is compared with.
    """

    inject_attention: bool = False
    inject_features: bool = False
    context: int = 0
    kept: tuple[int, ...] = ()
    as_context: bool = False
    propagates_source: bool = False
    finds_correspondences: bool = True
    extended: bool = True


class TokenFlow:
    """What the layers of one UNet do in its next pass, and what they remember between passes.

    The streams of a pass may be all or some; those without the source come after those with it.
    """

    def __init__(self) -> None:
        self.streams: tuple[int, ...] = STREAMS  # of the next pass, ascending
        self.joint: JointEdit | None = None  # None: propagation
        self.blend: Blend | None = None  # of propagation
        self.source: SourceFeatures | None = None  # where an inversion kept them
        self.inject_features = False
        self.features: torch.Tensor | None = None  # n c h w, of a source that passed alone

    def begin_joint_edit(self, joint: JointEdit) -> None:
        """The next passes edit keyframes jointly and remember their tokens."""
        self.joint, self.source = joint, None
        self.inject_features = joint.inject_features

    def begin_propagation(
        self, blend: Blend, inject_features: bool, source: SourceFeatures | None = None
    ) -> None:
        """The next passes take their self-attention outputs from the remembered keyframes, by `blend`.

        With the `source`'s features the source need not be among the streams.
        """
        self.joint, self.blend, self.source = None, blend, source
        self.inject_features = inject_features

    def _feature_hook(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        """Give uncond and cond the source's features (Plug-and-Play)."""
        if not self.inject_features:
            return None
        if self.source is not None:
            features = self.source.features.to(output)
        elif SOURCE in self.streams:
            features = output.chunk(len(self.streams))[SOURCE]
            self.features = features if len(self.streams) == 1 else None
        else:
            features = self.features
        return features.repeat(len(self.streams), 1, 1, 1)


class LayerProcessor:
    """Attention processor of one self-attention layer, which remembers the keyframes' tokens."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key_tokens: torch.Tensor | None = None  # k s d, of unit length


class TokenFlowAttention(LayerProcessor):
    """Joint edit or propagation, as told."""

    def __init__(self, flow: TokenFlow, name: str) -> None:
        super().__init__(name)
        self.flow = flow
        self.injected = bool(INJECTED_ATTENTION.match(name))
        self.key_outputs: torch.Tensor | None = None  # 3 k s d, or without the source 2 k s d
        self.context: dict[int, torch.Tensor] = {}  # by stream the keys and values: 2 k s d
        # Query and key (n, s, d) of a source that passed alone.
        self.injection: list[torch.Tensor] = []
        self.nearest: torch.Tensor | None = None  # n 2 s, of the last frames whose source passed

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """Input of the layer, which is `norm1`'s output, to its output: (streams x n, s, d)."""
        streams = self.flow.streams
        tokens = hidden_states.unflatten(0, (len(streams), -1))  # streams n s d
        if self.flow.joint is not None:
            return self._joint_edit(attn, tokens, self.flow.joint, list(streams)).flatten(0, 1)
        return self._propagation(attn, tokens, self.flow.blend, streams).flatten(0, 1)

    def _joint_edit(
        self, attn: Attention, tokens: torch.Tensor, joint: JointEdit, streams: list[int]
    ) -> torch.Tensor:
        query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        n_source = int(SOURCE in streams)
        edited = streams[n_source:]
        if n_source:
            self._remember(tokens[SOURCE], joint)
        if self.injected and joint.inject_attention:
            source = [query[SOURCE], key[SOURCE]] if n_source else self.injection
            self.injection = [] if edited and n_source else source
            query, key = (x.expand_as(value) for x in source)
        if joint.extended:
            output = torch.empty_like(query)
            if n_source:
                output[SOURCE] = attention(query[SOURCE], key[SOURCE], value[SOURCE], attn.heads)
            if edited:
                seen = self._in_context(key[n_source:], value[n_source:], joint, edited)
                output[n_source:] = extended_attention(query[n_source:], *seen, attn.heads)
        else:
            output = frame_attention(query, key, value, attn.heads)
        output = output_projection(attn, output)
        remembered = [stream for stream in streams if joint.propagates_source or stream != SOURCE]
        if remembered:
            self._outputs_of(remembered)[:, len(joint.kept) :] = output[-len(remembered) :]
        return output

    def _outputs_of(self, streams: Sequence[int]) -> torch.Tensor:
        """The keyframes' outputs (streams, k, s, d) in some neighbouring streams."""
        without = len(STREAMS) - len(self.key_outputs)
        return self.key_outputs[streams[0] - without : streams[-1] + 1 - without]

    def _remember(self, source: torch.Tensor, joint: JointEdit) -> None:
        """Forget all keyframes but those kept, and take in the source's tokens (n, s, d) of new ones."""
        n_streams = len(STREAMS) if joint.propagates_source else len(STREAMS) - 1
        outputs = source.new_empty(n_streams, *source.shape)
        if joint.kept:
            outputs = torch.cat([self.key_outputs[:, joint.kept], outputs], dim=1)
        self.key_outputs = outputs
        if joint.finds_correspondences:
            tokens = F.normalize(source.float(), dim=-1)
            if joint.kept:
                tokens = torch.cat([self.key_tokens[list(joint.kept)], tokens])
            self.key_tokens = tokens

    def _in_context(
        self, key: torch.Tensor, value: torch.Tensor, joint: JointEdit, edited: list[int]
    ) -> Iterable[torch.Tensor]:
        """Keys and values (edited, n, s, d) after those of the context, which they may join."""
        if not (joint.context or joint.as_context):
            return key, value
        new, seen = torch.stack([key, value]), []  # 2 edited n s d
        for index, stream in enumerate(edited):
            before = [self.context[stream][:, joint.kept]] if joint.kept else []
            seen.append(torch.cat([*(x[:, : joint.context] for x in before), new[:, index]], dim=1))
            if joint.as_context:
                self.context[stream] = torch.cat([*before, new[:, index]], dim=1)
        return torch.stack(seen, dim=1)

    def _propagation(
        self, attn: Attention, tokens: torch.Tensor, blend: Blend, streams: tuple[int, ...]
    ) -> torch.Tensor:
        self.injection = []
        if self.flow.source is not None:
            nearest = self.flow.source.nearest[self.name]
        else:
            if SOURCE in streams:
                self.nearest = correspondences(tokens[SOURCE], self.key_tokens, blend)
            nearest = self.nearest
        if SOURCE not in streams or len(self.key_outputs) == len(STREAMS):
            return propagate(self._outputs_of(streams), nearest, blend)
        own = frame_self_attention(attn, tokens[SOURCE])[None]
        edited = streams[1:]
        return (
            torch.cat([own, propagate(self._outputs_of(edited), nearest, blend)]) if edited else own
        )


def frame_self_attention(attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """What a layer does without TokenFlow: input (n, s, d) to output, each frame by itself."""
    output = attention(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens), attn.heads)
    return output_projection(attn, output)


def output_projection(attn: Attention, output: torch.Tensor) -> torch.Tensor:
    """What a layer does to its attention's output (..., d)."""
    projection, dropout = attn.to_out
    return dropout(projection(output))


@contextmanager
def install_tokenflow(unet: UNet2DConditionModel) -> Iterator[TokenFlow]:
    """Install TokenFlow in every self-attention of `unet`, and take it out again at the end.

    Yields the handle that says what the next pass does. Passes take the streams concatenated, all three
    (3n, 4, h, w) or those that the handle's `streams` name. Raises as `self_attentions_replaced` does.
    """
    flow = TokenFlow()
    with self_attentions_replaced(
        unet, lambda name: TokenFlowAttention(flow, name), flow._feature_hook
    ):
        yield flow


@contextmanager
def self_attentions_replaced(
    unet: UNet2DConditionModel,
    make_processor: Callable[[str], LayerProcessor],
    feature_hook: Callable,
) -> Iterator[None]:
    """Replace the processor of every self-attention and hook into the injected residual block.

    Raises ValueError when the UNet is not of Stable Diffusion's layout and RuntimeError when this was
    done already; the UNet is left as it was in every case.
    """
    before = dict(unet.attn_processors)
    if any(isinstance(processor, LayerProcessor) for processor in before.values()):
        raise RuntimeError("TokenFlow is already installed in this UNet")
    if not any(INJECTED_ATTENTION.match(name) for name in before):
        raise ValueError("no self-attention of Stable Diffusion's decoder in this UNet")
    processors = {
        name: make_processor(name) if name.endswith(".attn1.processor") else processor
        for name, processor in before.items()
    }
    block, resnet = INJECTED_RESNET
    try:
        convolution = unet.up_blocks[block].resnets[resnet].conv2
    except (AttributeError, IndexError) as error:
        raise ValueError("no residual block of Stable Diffusion's decoder in this UNet") from error
    hook = convolution.register_forward_hook(feature_hook)
    try:
        unet.set_attn_processor(dict(processors))  # a copy, because the setter empties its argument
        yield
    finally:
        hook.remove()
        unet.set_attn_processor(dict(before))
