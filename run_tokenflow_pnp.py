"""Edit a video with Plug-and-Play and TokenFlow.

    python run_tokenflow_pnp.py --data_path wolf.mp4 --prompt "a robotic wolf in the snow"

The edit starts from the inversion's noise. Its first steps take over the source's self-attention
(pnp_attn_t) and features (pnp_f_t), which preserve the layout. Run preprocess.py first.
Several values of an option, such as --pnp_attn_t 0.3 0.5 0.8, are a sweep: all combinations are edited.
The last line on stdout is the path of the edited video, or of a sweep the folder of its report.
"""

from tokenflow.cli import command
from tokenflow.config import PnPConfig
from tokenflow.config_sweep import parse_sweep


@command
def main() -> str:
    """Parse, check, edit and write each edit, and return where the result is."""
    configs = parse_sweep(PnPConfig, __doc__, "config_pnp.yaml")

    # Slow imports, after the options are known to be valid.
    from tokenflow.editing.sweep import open_edits
    from tokenflow.editing.techniques import PlugAndPlay

    with open_edits(configs, "pnp") as edits:
        for run in edits:
            if not run.is_finished:
                technique = PlugAndPlay(run.config, run.schedule, run.source)
                run.write(run.edit(technique))
    return str(edits.result)


if __name__ == "__main__":
    main()
