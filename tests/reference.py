"""TokenFlow as plain loops, written from the design's text: slow, and obviously right.

It shares no code with `tokenflow_utils`: the attention of every layer is computed head by head on
repeated keys, every similarity matrix is whole, and the layers are replaced one by one.
"""

import math

import torch


class Reference:
    """Predicts the noise of all frames of a video for one timestep, as the design says."""

    def __init__(self, unet, batch_size, propagation, attention_layers, own_attention=False):
        self.unet, self.batch_size, self.propagation = unet, batch_size, propagation
        self.own_attention = own_attention  # of the source stream, while the others are propagated
        self.attention_layers = attention_layers
        self.memory = {}
        self.keyframes, self.chunk = None, None
        self.joint, self.inject_attention, self.inject_features = True, False, False

    def predict(self, source, latents, t, text, keyframes, inject_attention, inject_features):
        """Noise (3, N, 4, h, w) of the three streams; latents (N, 4, h, w), text (3, l, d)."""
        self.keyframes = keyframes
        self.inject_attention, self.inject_features = inject_attention, inject_features
        forwards = {}
        for name, module in self.unet.named_modules():
            if name.endswith("attn1"):
                forwards[module] = module.forward
                module.forward = self._layer(name, module)
        conv = self.unet.up_blocks[1].resnets[1].conv2
        forwards[conv] = conv.forward
        conv.forward = self._conv(conv.forward)
        try:
            self.joint = True
            self._pass(source, latents, t, text, keyframes)
            self.joint = False
            outputs = []
            for start in range(0, len(latents), self.batch_size):
                self.chunk = list(range(start, min(start + self.batch_size, len(latents))))
                outputs.append(self._pass(source, latents, t, text, self.chunk))
            return torch.cat(outputs, dim=1)
        finally:
            for module, forward in forwards.items():
                module.forward = forward

    def _pass(self, source, latents, t, text, frames):
        streams = [source[frames], latents[frames], latents[frames]]
        texts = [text[i : i + 1].repeat(len(frames), 1, 1) for i in range(3)]
        noise = self.unet(torch.cat(streams), t, encoder_hidden_states=torch.cat(texts)).sample
        return torch.stack(noise.chunk(3))

    def _conv(self, forward):
        def injected(x):
            out = forward(x)
            if self.inject_features:
                source, _, _ = out.chunk(3)
                out = torch.cat([source, source, source])
            return out

        return injected

    def _layer(self, name, attn):
        def forward(x, **kwargs):
            streams = x.chunk(3)
            if self.joint:
                inject = self.inject_attention and name in self.attention_layers
                out = self._extended(attn, streams, inject)
                self.memory[name] = streams[0], out
            else:
                out = self._propagated(streams[0], *self.memory[name])
                if self.own_attention:
                    out[0] = self._extended(attn, streams, False)[0]
            return torch.cat(out)

        return forward

    def _extended(self, attn, streams, inject):
        queries = [attn.to_q(x) for x in streams]
        keys = [attn.to_k(x) for x in streams]
        values = [attn.to_v(x) for x in streams]
        if inject:
            queries, keys = [queries[0]] * 3, [keys[0]] * 3
        n_frames, _, width = streams[0].shape
        size = width // attn.heads
        outputs = []
        for stream in range(3):
            frames = []
            for frame in range(n_frames):
                seen = [frame] if stream == 0 else range(n_frames)
                key = torch.cat([keys[stream][i] for i in seen])
                value = torch.cat([values[stream][i] for i in seen])
                heads = []
                for head in range(attn.heads):
                    part = slice(head * size, (head + 1) * size)
                    score = queries[stream][frame][:, part] @ key[:, part].T / math.sqrt(size)
                    heads.append(score.softmax(-1) @ value[:, part])
                frames.append(attn.to_out[0](torch.cat(heads, -1)))
            outputs.append(torch.stack(frames))
        return outputs

    def _propagated(self, source, key_source, key_outputs):
        outputs = [[], [], []]
        for position, frame in enumerate(self.chunk):
            blend = (
                self._flanking(frame) if self.propagation == "flanking" else self._previous(frame)
            )
            tokens = source[position] / source[position].norm(dim=-1, keepdim=True)
            total = [0, 0, 0]
            for keyframe, weight in blend.items():
                keys = key_source[keyframe]
                keys = keys / keys.norm(dim=-1, keepdim=True)
                nearest = (tokens @ keys.T).argmax(-1)
                for stream in range(3):
                    total[stream] = total[stream] + weight * key_outputs[stream][keyframe][nearest]
            for stream in range(3):
                outputs[stream].append(total[stream])
        return [torch.stack(frames) for frames in outputs]

    def _flanking(self, frame):
        before = [k for k, position in enumerate(self.keyframes) if position <= frame]
        after = [k for k, position in enumerate(self.keyframes) if position >= frame]
        if frame in self.keyframes:
            return {self.keyframes.index(frame): 1.0}
        if not before or not after:
            return {before[-1] if before else after[0]: 1.0}
        left, right = before[-1], after[0]
        d_left, d_right = frame - self.keyframes[left], self.keyframes[right] - frame
        closeness = d_right / (d_left + d_right)
        return {left: closeness, right: 1 - closeness}

    def _previous(self, frame):
        chunk = self.chunk[0] // self.batch_size
        if chunk == 0:
            return {0: 1.0}
        d1 = abs(frame - (chunk * self.batch_size + self.batch_size // 2))
        d2 = abs(frame - ((chunk - 1) * self.batch_size + self.batch_size // 2))
        weight = 1 / (1 + math.exp(-d2 / (d1 + d2)))
        return {chunk: weight, chunk - 1: 1 - weight}
