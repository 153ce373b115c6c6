"""Edit a video with SDEdit and TokenFlow.

    python run_tokenflow_sdedit.py --data_path wolf.mp4 --prompt "a robotic wolf in the snow" --start 0.8

The source is noised part of the way (start) and denoised with the new prompt. With less noise the
edit stays closer to the source. Run preprocess.py first.
Several values of an option, such as --start 0.7 0.8 0.9, are a sweep: all combinations are edited.
The last line on stdout is the path of the edited video, or of a sweep the folder of its report.
"""

from tokenflow.cli import command
from tokenflow.config import SDEditConfig
from tokenflow.config_sweep import parse_sweep


@command
def main() -> str:
    """Parse, check, edit and write each edit, and return where the result is."""
    configs = parse_sweep(SDEditConfig, __doc__, "config_sdedit.yaml")

    # Slow imports, after the options are known to be valid.
    from tokenflow.editing.sweep import open_edits
    from tokenflow.editing.techniques import SDEdit

    with open_edits(configs, "sdedit") as edits:
        for run in edits:
            if not run.is_finished:
                technique = SDEdit(run.config, run.schedule, run.source, run.sd.scheduler)
                run.write(run.edit(technique))
    return str(edits.result)


if __name__ == "__main__":
    main()
