"""A procedural world of moving shapes, and the miniature Stable Diffusion trained on it."""
