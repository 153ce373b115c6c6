"""Edit a video with Plug-and-Play and TokenFlow.

    python run_tokenflow_pnp.py --data_path wolf.mp4 --prompt "a robotic wolf in the snow"

The edit starts from the inversion's noise. Its first steps take over the source's self-attention
(pnp_attn_t) and features (pnp_f_t), which preserve the layout. Run preprocess.py first.
The last line on stdout is the path of the edited video.
"""

from tokenflow.cli import command, parse
from tokenflow.config import PnPConfig


@command
def main() -> None:
    """Parse, open, edit, write, and print where the result is."""
    config = parse(PnPConfig, __doc__, "config_pnp.yaml")

    # Slow imports, after the configuration is known to be valid.
    from tokenflow.editing.run import open_edit
    from tokenflow.editing.techniques import plug_and_play

    with open_edit(config, "pnp") as run:
        if not run.is_finished:
            technique = plug_and_play(config, run.schedule, run.first_latents)
            run.write(run.edit(technique))
    print(run.video)


if __name__ == "__main__":
    main()
