"""TokenFlow in plain loops: what its authors published, and what the paper says; slow and obviously right.

It shares no code with the product: attention is computed head by head, on keys and values that are repeated
for every frame, and every similarity matrix whole. Tests compare the product's results with its results, and
benchmarks compare their speed.
"""

import math

import torch


class Reference:
    """The authors' two scripts on one clip: DDIM inversion, reconstruction and edits."""

    @torch.no_grad()
    def __init__(self, sd, frames, prompt, n_steps, batch_size=8):
        """Encode and invert uint8 RGB frames (N, H, W, 3) under their prompt.

        sd: a `StableDiffusion`, of which only the networks are used. batch_size: frames in a pass, and of a
        keyframe.
        """
        self.sd, self.scheduler, self.batch_size = sd, sd.scheduler, batch_size
        self.prompt, self.n_steps = prompt, n_steps
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).to(sd.device, sd.vae.dtype) / 255
        encoded = [sd.vae.encode(2 * image - 1).latent_dist.mean for image in images.split(1)]
        self.clean = torch.cat(encoded).float().cpu() * sd.vae.config.scaling_factor
        self.saved, latents = {}, self.clean  # by timestep
        alphas, before = self.scheduler.alphas_cumprod, self.scheduler.final_alpha_cumprod
        self.scheduler.set_timesteps(n_steps)
        for t in reversed(self.scheduler.timesteps.tolist()):
            noise = self.predict_source_noise(latents, t)
            x0 = (latents - (1 - before) ** 0.5 * noise) / before**0.5
            latents = alphas[t] ** 0.5 * x0 + (1 - alphas[t]) ** 0.5 * noise
            self.saved[t], before = latents, alphas[t]

    @torch.no_grad()
    def reconstruct(self):
        """The frames, uint8 RGB (N, H, W, 3), that sampling from the inversion's noise gives back."""
        self.scheduler.set_timesteps(self.n_steps)
        latents = self.saved[self.scheduler.timesteps[0].item()]
        for t in self.scheduler.timesteps.tolist():
            noise = self.predict_source_noise(latents, t)
            latents = self.scheduler.step(noise, t, latents).prev_sample
        return self.decode(latents)

    @torch.no_grad()
    def edit(
        self,
        prompt,
        negative_prompt="",
        n_steps=50,
        skipped_steps=0,
        attention_steps=0,
        feature_steps=0,
        propagation="previous",
        guidance_scale=7.5,
        seed=1,
    ):
        """The edited frames, uint8 RGB (N, H, W, 3).

        SDEdit skips the first steps. Plug-and-Play injects the source's attention and features into some.
        """
        self.scheduler.set_timesteps(n_steps)
        timesteps = self.scheduler.timesteps[skipped_steps:]
        noisiest = self.scheduler.timesteps[0].item()
        alpha = self.scheduler.alphas_cumprod[noisiest]
        noise = (self.saved[noisiest] - alpha**0.5 * self.clean) / (1 - alpha) ** 0.5
        latents = self.scheduler.add_noise(self.clean, noise, timesteps[:1])
        text = torch.cat([self.embed(p) for p in (self.prompt, negative_prompt, prompt)])
        predictor = Predictor(self.sd.unet, self.batch_size, propagation)
        generator, n_frames = torch.Generator().manual_seed(seed), len(latents)
        for step, t in enumerate(timesteps.tolist()):
            starts = torch.arange(0, n_frames, self.batch_size)
            draws = torch.randint(self.batch_size, starts.shape, generator=generator)
            keyframes = (starts + draws).clamp(max=n_frames - 1).tolist()
            injects = step < attention_steps, step < feature_steps
            _, uncond, cond = predictor.predict(
                self.saved[t], latents, t, text, keyframes, *injects
            )
            guided = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return self.decode(latents)

    def embed(self, prompt):
        """The embedding (1, l, d) of a prompt."""
        tokenizer = self.sd.tokenizer
        length = {"padding": "max_length", "max_length": tokenizer.model_max_length}
        tokens = tokenizer(prompt, return_tensors="pt", truncation=True, **length).input_ids
        return self.sd.text_encoder(tokens.to(self.sd.device)).last_hidden_state

    def predict_source_noise(self, latents, t):
        """Noise (N, 4, h, w) of latents under the source's prompt."""
        text, batches = self.embed(self.prompt), latents.split(self.batch_size)
        return torch.cat([evaluate(self.sd.unet, b, t, text.repeat(len(b), 1, 1)) for b in batches])

    def decode(self, latents):
        """Frames, uint8 RGB (N, H, W, 3)."""
        scaled = (latents / self.sd.vae.config.scaling_factor).to(self.sd.device, self.sd.vae.dtype)
        images = torch.cat(
            [self.sd.vae.decode(one).sample.float().cpu() for one in scaled.split(1)]
        )
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def evaluate(unet, latents, t, text):
    """The UNet's noise (n, 4, h, w) of latents, which stay where they are, under texts (n, l, d)."""
    samples = latents.to(unet.device, unet.dtype)
    return unet(samples, t, encoder_hidden_states=text).sample.to(latents)


def injected_layers(unet):
    """The names of the layers whose attention Plug-and-Play injects: the decoder's but the first."""
    names = [name for name, _ in unet.named_modules() if name.endswith("attn1")]
    return [name for name in names if name.startswith("up_blocks")][1:]


class Predictor:
    """Predicts the noise of all frames of a video at one timestep."""

    def __init__(self, unet, batch_size, propagation, window=100, motion=None, own_weight=1):
        self.unet, self.batch_size, self.propagation = unet, batch_size, propagation
        self.window, self.motion, self.own_weight = window, motion, own_weight
        self.nearest = {}  # by layer, frame and keyframe position: tokens (s,), and the keyframe's weight
        self.attention_layers = injected_layers(unet)
        self.memory = {}  # by layer and keyframe position: source tokens, outputs, keys, values
        self.keyframes, self.chunk, self.group, self.attended = None, None, None, None
        self.joint, self.inject_attention, self.inject_features = True, False, False

    def predict(self, source, latents, t, text, keyframes, inject_attention, inject_features):
        """Noise (m, N, 4, h, w) of m streams, the source's first; latents (N, 4, h, w), text (m, l, d)."""
        self.keyframes, self.n_streams = keyframes, len(text)
        self.inject_attention, self.inject_features = inject_attention, inject_features
        forwards = {}
        for name, module in self.unet.named_modules():
            if name.endswith("attn1"):
                forwards[module] = module.forward
                module.forward = self._layer(name, module)
                self.memory[name] = {}
        conv = self.unet.up_blocks[1].resnets[1].conv2
        forwards[conv] = conv.forward
        conv.forward = self._conv(conv.forward)
        try:
            self.joint = True
            for group, attended in self._groups(len(keyframes)):
                self.group, self.attended = group, attended
                frames = [keyframes[position] for position in self.group]
                self._pass(source, latents, t, text, frames)
            self.joint = False
            outputs = []
            for start in range(0, len(latents), self.batch_size):
                self.chunk = list(range(start, min(start + self.batch_size, len(latents))))
                outputs.append(self._pass(source, latents, t, text, self.chunk))
            return torch.cat(outputs, dim=1)
        finally:
            for module, forward in forwards.items():
                module.forward = forward

    def _groups(self, n):
        """Positions of keyframes edited together, and of earlier ones to which they attend too."""
        if n <= self.window:
            return [(list(range(n)), [])]
        anchors = [round(i * (n - 1) / 3) for i in range(4)]
        n_windows = math.ceil((n - 1) / (self.window - len(anchors) - 1))
        bounds = [round(i * (n - 1) / n_windows) for i in range(n_windows + 1)]
        groups = [(anchors, [])]
        groups += [([bound], anchors) for bound in bounds if bound not in anchors]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            attended = anchors + [bound for bound in (first, last) if bound not in anchors]
            inner = [position for position in range(first, last) if position not in attended]
            if inner:
                groups.append((inner, attended))
        return groups

    def _pass(self, source, latents, t, text, frames):
        streams = [source[frames]] + [latents[frames]] * (self.n_streams - 1)
        texts = [one[None].repeat(len(frames), 1, 1) for one in text]
        noise = evaluate(self.unet, torch.cat(streams), t, torch.cat(texts))
        return torch.stack(noise.chunk(self.n_streams))

    def _conv(self, forward):
        def injected(x):
            out = forward(x)
            if self.inject_features:
                source = out.chunk(self.n_streams)[0]
                out = torch.cat([source] * self.n_streams)
            return out

        return injected

    def _layer(self, name, attn):
        def forward(x, **kwargs):
            streams = x.chunk(self.n_streams)
            if self.joint:
                inject = self.inject_attention and name in self.attention_layers
                out = self._extended(attn, streams, inject, self.memory[name])
            else:
                out = self._propagated(name, streams[0], self.memory[name])
                if self.propagation == "flanking":  # the source attends to itself, as at inversion
                    x = streams[0]
                    out[0] = attend(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))
            return torch.cat(out)

        return forward

    def _extended(self, attn, streams, inject, memory):
        queries = [attn.to_q(x) for x in streams]
        keys = [attn.to_k(x) for x in streams]
        values = [attn.to_v(x) for x in streams]
        if inject:
            queries, keys = [queries[0]] * len(streams), [keys[0]] * len(streams)
        for i, position in enumerate(self.group):
            memory[position] = {
                "tokens": streams[0][i],
                "keys": [key[i] for key in keys],
                "values": [value[i] for value in values],
            }
        outputs = [attend(attn, queries[0], keys[0], values[0])]
        for stream in range(1, len(streams)):
            of_frames = []
            for i, own in enumerate(self.group):  # whose own tokens stand there several times
                seen = [memory[p] for p in self.attended + self.group]
                seen += [memory[own]] * (self.own_weight - 1)
                key = torch.cat([one["keys"][stream] for one in seen])[None]
                value = torch.cat([one["values"][stream] for one in seen])[None]
                of_frames.append(attend(attn, queries[stream][i : i + 1], key, value))
            outputs.append(torch.cat(of_frames))
        for i, position in enumerate(self.group):
            memory[position]["outputs"] = [output[i] for output in outputs]
        return outputs

    def _propagated(self, name, source, memory):
        outputs = [[] for _ in range(self.n_streams)]
        for index, frame in enumerate(self.chunk):
            blend = (
                self._flanking(frame) if self.propagation == "flanking" else self._previous(frame)
            )
            tokens = source[index] / source[index].norm(dim=-1, keepdim=True)
            total = [0] * self.n_streams
            found = self.nearest.setdefault(name, {})[frame] = {}
            for position, weight in blend.items():
                keys = memory[position]["tokens"]
                keys = keys / keys.norm(dim=-1, keepdim=True)
                nearest = (tokens @ keys.T).argmax(-1)
                if self.motion:
                    flow = self.motion(frame, self.keyframes[position])
                    nearest = followed_by_hand(flow.tolist(), nearest)
                found[position] = nearest, weight
                for stream in range(self.n_streams):
                    output = memory[position]["outputs"][stream]
                    total[stream] = total[stream] + weight * output[nearest]
            for stream in range(self.n_streams):
                outputs[stream].append(total[stream])
        return [torch.stack(frames) for frames in outputs]

    def _flanking(self, frame):
        before = [k for k, keyframe in enumerate(self.keyframes) if keyframe <= frame]
        after = [k for k, keyframe in enumerate(self.keyframes) if keyframe >= frame]
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


def finest_layer(unet):
    """The name of the self-attention whose correspondences the guiding difference follows."""
    return [name for name, _ in unet.named_modules() if name.endswith("attn1") and "up_" in name][
        -1
    ]


def find_relevance_by_hand(differences):
    """How strong the differences (n, h, w) between two prompts are around each place, 0 to 1: (n, h, w)."""
    n, height, width = differences.shape
    around = torch.zeros(n, height, width)
    for y in range(height):
        for x in range(width):
            rows, columns = slice(max(0, y - 2), y + 3), slice(max(0, x - 2), x + 3)
            around[:, y, x] = differences[:, rows, columns].float().mean((1, 2))
    values = around.flatten().tolist()

    def spread(threshold):
        groups = [v for v in values if v <= threshold], [v for v in values if v > threshold]
        return sum(sum((v - sum(g) / len(g)) ** 2 for v in g) for g in groups)

    threshold = min(sorted(set(values))[:-1], key=spread)
    weak = [v for v in values if v <= threshold]
    strong = [v for v in values if v > threshold]
    weak, strong = sum(weak) / len(weak), sum(strong) / len(strong)
    whole, floor = (weak + strong) / 2, min(weak, strong - weak)
    return ((around - floor) / (whole - floor)).clamp(0, 1)


def propagate_by_hand(maps, nearest, n_frames):
    """Maps (k, c, h, w) of keyframes, propagated to all frames: (N, c, h, w); `nearest` as in `Predictor`."""
    propagated = []
    for frame in range(n_frames):
        total = 0
        for position, (tokens, weight) in nearest[frame].items():
            side = math.isqrt(maps[0, 0].numel() // len(tokens))  # latent pixels across a token
            width = maps.shape[-1] // side
            moved = torch.zeros_like(maps[0])
            for place, token in enumerate(tokens.tolist()):
                y, x = place // width * side, place % width * side
                v, u = token // width * side, token % width * side
                moved[:, y : y + side, x : x + side] = maps[position, :, v : v + side, u : u + side]
            total = total + weight * moved
        propagated.append(total)
    return torch.stack(propagated)


def attend(attn, query, key, value):
    """The layer's output (n, q, d) for queries (n, q, d), keys and values (n, k, d), head by head."""
    heads = []
    for q, k, v in zip(*(x.chunk(attn.heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        heads.append(scores.softmax(-1) @ v)
    return attn.to_out[0](torch.cat(heads, -1))


def followed_by_hand(flow: list, nearest: torch.Tensor) -> torch.Tensor:
    """The tokens (s,) where a flow leads that is lists [h][w][2], in cells; where it is NaN, the nearest."""
    found, side = nearest.clone(), math.isqrt(len(flow) * len(flow[0]) // len(nearest))
    height, width = len(flow) // side, len(flow[0]) // side
    for row in range(height):
        for column in range(width):
            dx, dy = flow[row * side + side // 2][column * side + side // 2]
            if math.isnan(dx):
                continue
            x, y = math.floor(column + 0.5 + dx / side), math.floor(row + 0.5 + dy / side)
            x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
            found[row * width + column] = y * width + x
    return found


def read_by_hand(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """An image (c, H, W) read where a flow (H, W, 2) leads, pixel by pixel.

    By cubic convolution: Keys (1981), equation 4 with a = -0.75, as PyTorch and OpenCV do.
    """

    def weight_at(distance: float) -> float:
        a, x = -0.75, abs(distance)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    height, width = image.shape[1:]
    read = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            at_x, at_y = x + flow[y, x, 0].item(), y + flow[y, x, 1].item()
            for row in range(math.floor(at_y) - 1, math.floor(at_y) + 3):
                for column in range(math.floor(at_x) - 1, math.floor(at_x) + 3):
                    inside = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
                    share = weight_at(at_y - row) * weight_at(at_x - column)
                    read[:, y, x] += share * image[:, inside[0], inside[1]]
    return read


def average_by_hand(
    frame: torch.Tensor, others: torch.Tensor, flows: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The mean of a frame (c, H, W), of weight 1, and others (k, c, H, W), read along flows (k, H, W, 2).

    weights: (k, H, W), of the others.
    """
    total, weight = frame.clone(), torch.ones(frame.shape[1:])
    for other, flow, w in zip(others, flows, weights, strict=True):
        total += w * read_by_hand(other, flow)
        weight += w
    return total / weight


def carry_by_hand(values: torch.Tensor, motion: torch.Tensor, distances: list[int]) -> torch.Tensor:
    """What k frames, `distances` away, say of a frame between them: (c, h, w), frame by frame.

    values: (k, c, h, w). motion: (k, H, W, 3), flows in pixels and how far each can be relied on.
    """
    cell = motion.shape[1] // values.shape[2]
    total, weight, best = (torch.zeros(values.shape[2:]) for _ in range(3))
    for value, pixels, distance in zip(values, motion, distances, strict=True):
        cells = pixels.unfold(0, cell, cell).unfold(1, cell, cell).mean((-1, -2))
        flow, reliable = cells[..., :2] / cell, cells[..., 2]
        total = total + reliable / distance * read_by_hand(value, flow)
        weight += reliable / distance
        best = torch.maximum(best, reliable)
    return best * total / weight
