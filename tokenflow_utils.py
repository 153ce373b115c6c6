"""TokenFlow: joint editing of keyframes and propagation of their tokens to all other frames.

The algorithm of Geyer et al., TokenFlow (ICLR 2024, arXiv 2307.10373):

    for each timestep, the noisiest first:
        keyframes = one random frame of each interval              KeyframeSchedule.draw
        pass the keyframes through the UNet, and in every self-attention:
            source: each frame attends to itself                   attention
            uncond, cond: each frame attends to all keyframes      extended_attention
            remember the source's inputs and the edit's outputs    KeyframeCache
        pass all other frames through the UNet, and in every self-attention:
            source: find each token in two keyframes               flanking_blend, correspondences
            uncond, cond: blend the outputs of those tokens        propagate
        noise = uncond + guidance * (cond - uncond)                editing.denoise, guided_noise
        latents = one DDIM step along the noise                    diffusion.ddim.ddim_step

In the first steps Plug-and-Play gives uncond and cond the source's queries, keys and features. Pure tensor
functions come first in this file; then `install_tokenflow` puts them into a diffusers UNet.

Streams: the source, and the edit under the negative prompt (uncond) and under the prompt (cond).
Shapes: (n, s, d) = frames, tokens, channels of one stream.
Indices: a *frame* of the video, a *position* among a timestep's keyframes, a *row* of the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from tokenflow.diffusion.layouts import layout_of
from tokenflow.propagation.cache import BlendedRows, KeyframeCache
from tokenflow.propagation.correspondences import Led, correspondences

STREAMS = SOURCE, UNCOND, COND = 0, 1, 2


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
    """Self-attention of the joint edit (section 4.1): every frame attends to the tokens of all frames.

    query: (n, s, d). key, value: (m, s, d), of these n frames and of frames that were edited before.
    All frames form one long sequence, so no key or value is repeated.
    """
    sequences = (x.flatten(0, 1)[None] for x in (query, key, value))  # 1 ns d
    return attention(*sequences, heads).view_as(query)


@dataclass(frozen=True)
class KeyframeSchedule:
    """What decides which frames are keyframes at each timestep."""

    n_frames: int
    interval: int  # frames per keyframe
    timesteps: tuple[int, ...]  # the noisiest first
    seed: int

    def draw(self) -> dict[int, torch.Tensor]:
        """The keyframes (k,) of each timestep: one random frame of each interval, in ascending order."""
        generator = torch.Generator().manual_seed(self.seed)  # used for nothing else
        starts = torch.arange(0, self.n_frames, self.interval)
        last = self.n_frames - 1  # a draw may lie beyond a short last interval
        draw = partial(torch.randint, self.interval, starts.shape, generator=generator)
        return {t: (starts + draw()).clamp(max=last) for t in self.timesteps}


@dataclass(frozen=True)
class Blend:
    """The two keyframes that each frame blends: their positions (n, 2) and their weights (n, 2).

    The weights of a frame sum to 1. If the second is 0, the frame takes the first keyframe alone.
    """

    positions: torch.Tensor
    weights: torch.Tensor

    @property
    def whole(self) -> torch.Tensor:
        """The position of the keyframe that a frame takes alone, or -1 if it blends two: (n,)."""
        return torch.where(self.weights[:, 0] == 1, self.positions[:, 0], -1)


def flanking_blend(frames: torch.Tensor, keyframes: torch.Tensor) -> Blend:
    """The paper's blend (section 4.2): the nearest keyframe on each side, weighted by closeness.

    A keyframe takes itself alone. A frame outside the outermost keyframes takes the nearer of them alone.
    `frames` (n,) and `keyframes` (k,), ascending, are indices in the video.
    """
    last = len(keyframes) - 1
    right = torch.searchsorted(keyframes, frames).clamp(max=last)  # the first at or after the frame
    left = (torch.searchsorted(keyframes, frames, right=True) - 1).clamp(min=0)  # the last up to it
    d_left, d_right = (frames - keyframes[left]).abs(), (frames - keyframes[right]).abs()
    w_left = torch.where(left == right, 1.0, d_right / (d_left + d_right).clamp(min=1))
    return Blend(torch.stack([left, right], dim=1), torch.stack([w_left, 1 - w_left], dim=1))


def previous_blend(frames: torch.Tensor, interval: int) -> Blend:
    """The blend of the authors' code: the keyframes of the frame's own interval and of the previous one.

    The weights are a sigmoid of the distances to the intervals' midpoints. Frames of the first interval
    take its keyframe alone.
    """
    own = frames // interval
    previous = (own - 1).clamp(min=0)
    d_own = (frames - own * interval - interval // 2).abs()
    d_previous = (frames - (own - 1) * interval - interval // 2).abs()
    w_own = torch.where(own == 0, 1.0, torch.sigmoid(d_previous / (d_own + d_previous)))
    return Blend(torch.stack([own, previous], dim=1), torch.stack([w_own, 1 - w_own], dim=1))


def propagate(
    key_outputs: torch.Tensor, nearest: torch.Tensor, blended: BlendedRows
) -> torch.Tensor:
    """Propagate the keyframes' self-attention outputs (k, s, d) to n frames (equation 4): (n, s, d).

    nearest: (n, 2, s), from `correspondences` with the same rows and weights.
    """
    n_tokens = key_outputs.shape[1]
    # Gathered from all keyframes' tokens in one sequence.
    tokens = nearest + n_tokens * blended.rows[..., None]  # n 2 s
    first, second = (
        key_outputs.flatten(0, 1)
        .index_select(0, tokens[:, side].flatten())
        .unflatten(0, (-1, n_tokens))
        for side in (0, 1)
    )  # n s d
    return first.lerp_(second, blended.weights[:, 1, None, None])


@dataclass(frozen=True)
class SourceFeatures:
    """What propagation to n frames needs from the source stream at one timestep.

    nearest: the `correspondences` (n, 2, s) of each self-attention layer, by its name.
    features: (n, c, h, w), injected into the residual block by Plug-and-Play; None without injection.
    """

    nearest: dict[str, torch.Tensor]
    features: torch.Tensor | None


@dataclass(frozen=True)
class JointPass:
    """The positions of keyframes that are edited in one UNet pass; they attend to each other.

    attended: earlier keyframes to which these attend too. attended_later: whether later ones attend to these.
    """

    edited: Sequence[int]
    attended: Sequence[int] = ()
    attended_later: bool = False


class TokenFlow:
    """What the layers of one UNet do in its next pass, and what they remember between passes.

    A pass takes all streams or some of them. If streams pass one by one, the source comes first.
    propagated: the streams whose outputs are propagated. The authors' code propagates in the source too;
    otherwise the source's frames attend to themselves, as in its inversion.
    finds_correspondences: whether the keyframes' source tokens are remembered, to be searched.
    """

    def __init__(
        self, propagated: Sequence[int], finds_correspondences: bool, cache: KeyframeCache
    ) -> None:
        self.propagated, self.finds_correspondences = propagated, finds_correspondences
        self.cache = cache
        self.streams: tuple[int, ...] = STREAMS  # of the next pass, ascending
        self.joint: JointPass | None = None  # None during propagation
        self.inject_attention, self.inject_features, self.extended = False, False, True
        self.blended: BlendedRows | None = None  # by the frames of a propagation
        self.source: SourceFeatures | None = None  # if an inversion kept them
        self.led: dict[int, Led] = {}  # by number of tokens, if they follow the optical flow
        self.features: torch.Tensor | None = None  # n c h w, if the source passed alone
        self.injection: dict[str, list[torch.Tensor]] = {}  # of layers, too: query and key, n s d

    def begin_joint_edit(
        self,
        joint: JointPass,
        inject_attention: bool = False,
        inject_features: bool = False,
        extended: bool = True,
    ) -> None:
        """Edit keyframes jointly in the next passes, and keep them in the cache.

        Without `extended` attention each keyframe is edited by itself, as a baseline for comparisons.
        """
        self.cache.add(joint.edited)
        self.joint, self.source, self.extended = joint, None, extended
        self.inject_attention, self.inject_features = inject_attention, inject_features

    def begin_propagation(
        self,
        blended: BlendedRows,
        inject_features: bool,
        source: SourceFeatures | None = None,
        led: dict[int, Led] | None = None,
    ) -> None:
        """In the next passes propagate the outputs of cached keyframes to the frames that blend them.

        With the features of the `source`, the passes need no source stream. led: where the optical flow
        leads the tokens, by their number in a frame, if that comes before what is alike.
        """
        self.blended, self.joint, self.injection = blended, None, {}
        self.source, self.led = source, led or {}
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
    """Attention processor of one self-attention layer."""

    def __init__(self, name: str) -> None:
        self.name = name


class TokenFlowAttention(LayerProcessor):
    """Edits keyframes jointly or propagates, as the `TokenFlow` says."""

    def __init__(self, tokenflow: TokenFlow, name: str, injected: bool = False) -> None:
        super().__init__(name)
        self.tokenflow, self.injected = tokenflow, injected
        self.nearest: torch.Tensor | None = None  # n 2 s, kept if the source passes alone

    @torch.compiler.disable  # it depends on what passed before
    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """The layer's output for its input, the output of `norm1`; both (streams x n, s, d)."""
        if self.tokenflow.joint is not None:
            return self._joint_edit(attn, hidden_states)
        return self._propagation(attn, hidden_states)

    def _joint_edit(self, attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
        tokenflow, cache, streams = self.tokenflow, self.tokenflow.cache, self.tokenflow.streams
        edited = tokenflow.joint.edited
        query, key, value = (
            self._by_stream(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )  # each n s d, by stream
        if SOURCE in streams and tokenflow.finds_correspondences:
            cache.write((self.name, "tokens"), edited, self._by_stream(hidden_states)[SOURCE])
        if self.injected and tokenflow.inject_attention:
            kept = tokenflow.injection
            source = [query[SOURCE], key[SOURCE]] if SOURCE in streams else kept[self.name]
            kept[self.name] = source if len(streams) < len(STREAMS) else []
            for stream in streams:
                query[stream], key[stream] = source
        outputs = []
        for stream in streams:
            if stream == SOURCE or not tokenflow.extended:
                outputs.append(attention(query[stream], key[stream], value[stream], attn.heads))
                continue
            kinds = {"keys": key[stream], "values": value[stream]}
            attended = (self._with_attended(kind, stream, new) for kind, new in kinds.items())
            outputs.append(extended_attention(query[stream], *attended, attn.heads))
        output = output_projection(attn, torch.cat(outputs))
        for stream, of_stream in self._by_stream(output).items():
            if stream in tokenflow.propagated:
                cache.write((self.name, "outputs", stream), edited, of_stream)
        return output

    def _with_attended(self, kind: str, stream: int, new: torch.Tensor) -> torch.Tensor:
        """The keys or values of the attended keyframes, followed by the `new` ones (n, s, d)."""
        name, cache, joint = (self.name, kind, stream), self.tokenflow.cache, self.tokenflow.joint
        attended = cache.read(name, joint.attended)
        if joint.attended_later:
            cache.write(name, joint.edited, new)
        return torch.stack([*attended, *new]) if attended else new

    def _propagation(self, attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
        tokenflow, tokens = self.tokenflow, self._by_stream(hidden_states)
        led = tokenflow.led[hidden_states.shape[1]] if tokenflow.led else None
        if tokenflow.source is not None:
            kept = tokenflow.source.nearest[self.name]
            self.nearest = led.completed(kept) if led else kept
        elif SOURCE in tokens:
            found = tokens[SOURCE], tokenflow.cache.tensor((self.name, "tokens"))
            self.nearest = (
                led.searched(*found) if led else correspondences(*found, tokenflow.blended)
            )
        outputs = []
        for stream in tokenflow.streams:
            if stream in tokenflow.propagated:
                remembered = tokenflow.cache.tensor((self.name, "outputs", stream))
                outputs.append(propagate(remembered, self.nearest, tokenflow.blended))
            else:
                outputs.append(frame_self_attention(attn, tokens[stream]))
        return torch.cat(outputs)

    def _by_stream(self, tensor: torch.Tensor) -> dict[int, torch.Tensor]:
        """Split a tensor of the pass (streams x n, ...) into one (n, ...) for each stream."""
        streams = self.tokenflow.streams
        return dict(zip(streams, tensor.chunk(len(streams)), strict=True))


def frame_self_attention(attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """The layer's output (n, s, d) without TokenFlow: each frame attends to itself."""
    output = attention(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens), attn.heads)
    return output_projection(attn, output)


def output_projection(attn: Attention, output: torch.Tensor) -> torch.Tensor:
    """The layer's output (..., d) for the output of its attention heads."""
    projection, dropout = attn.to_out
    return dropout(projection(output))


@contextmanager
def install_tokenflow(
    unet: UNet2DConditionModel,
    propagated: Sequence[int] = (UNCOND, COND),
    finds_correspondences: bool = True,
) -> Iterator[TokenFlow]:
    """Install TokenFlow in every self-attention of `unet`, and take it out again at the end.

    Yields the `TokenFlow` that controls the next pass; its class explains the arguments. A pass takes
    its streams concatenated: (streams x n, 4, h, w). Raises the errors of `self_attentions_replaced`.
    """
    tokenflow = TokenFlow(propagated, finds_correspondences, KeyframeCache())
    injected = layout_of(unet.config).injected_attention

    def processor(name: str) -> TokenFlowAttention:
        return TokenFlowAttention(tokenflow, name, bool(injected.match(name)))

    with self_attentions_replaced(unet, processor, tokenflow._feature_hook):
        yield tokenflow


@contextmanager
def self_attentions_replaced(
    unet: UNet2DConditionModel,
    make_processor: Callable[[str], LayerProcessor],
    feature_hook: Callable,
) -> Iterator[None]:
    """Replace the processor of every self-attention and hook into the injected residual block.

    Raises ValueError if the UNet is of no known layout, and RuntimeError if TokenFlow is already installed
    or, in the next pass, if something else has replaced a processor. In every case the UNet is restored.
    """
    before = dict(unet.attn_processors)
    if any(isinstance(processor, LayerProcessor) for processor in before.values()):
        raise RuntimeError("TokenFlow is already installed in this UNet")
    block, resnet = layout_of(unet.config).injected_resnet
    names = [name for name in before if name.endswith(".attn1.processor")]
    ours = {name: make_processor(name) for name in names}
    layers = [unet.get_submodule(name.removesuffix(".processor")) for name in names]

    def check(module, args) -> None:
        if any(layer.processor is not ours[n] for n, layer in zip(names, layers, strict=True)):
            raise RuntimeError(
                "TokenFlow's attention was replaced while it was installed in this UNet; switch xformers, "
                "attention slicing and other attention processors before that"
            )

    convolution = unet.up_blocks[block].resnets[resnet].conv2
    hooks = [
        convolution.register_forward_hook(torch.compiler.disable(feature_hook)),
        unet.register_forward_pre_hook(torch.compiler.disable(check)),
    ]
    try:
        unet.set_attn_processor(before | ours)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        unet.set_attn_processor(dict(before))  # a copy, because the setter empties its argument
