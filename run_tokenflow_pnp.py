"""Edit a video with Plug-and-Play and TokenFlow.

The edit starts from the inversion's noise, and in the first steps takes over the source's
self-attention (pnp_attn_t) and features (pnp_f_t), which hold the layout. Run preprocess.py first.
The last line on stdout is the path of the edited video.
"""

from pathlib import Path

from cli import command, parse_with_yaml
from config import PnPConfig


@command
def main() -> None:
    """Parse, edit, and print where the result is."""
    default = Path(__file__).parent / "configs" / "config_pnp.yaml"
    config = parse_with_yaml(PnPConfig, __doc__, default)

    # Slow imports, left until the configuration is known to be right.
    from edit_video import Edit, run_edit
    from techniques import Technique, plug_and_play

    def technique(job: Edit) -> Technique:
        return plug_and_play(config, job.schedule, job.first_latents, job.n_frames)

    print(run_edit(config, "pnp", technique))


if __name__ == "__main__":
    main()
