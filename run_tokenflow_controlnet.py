"""Edit a video with ControlNets and TokenFlow.

    python run_tokenflow_controlnet.py --data_path wolf.mp4 --prompt "a robotic wolf in the snow"

What the ControlNets are given of the source's frames, such as their edges or depth (control), preserves the
layout; control.mp4 shows it. An inversion under the same ControlNets is used if there is one. Run
preprocess.py first.
Several values of an option, such as --guidance_scale 3 5 7, are a sweep: all combinations are edited.
The last line on stdout is the path of the edited video, or of a sweep the folder of its report.
"""

from tokenflow.cli import command
from tokenflow.config import ControlNetConfig
from tokenflow.config_sweep import parse_sweep


@command
def main() -> str:
    """Parse, check, edit and write each edit, and return where the result is."""
    configs = parse_sweep(ControlNetConfig, __doc__, "config_controlnet.yaml")

    # Slow imports, after the options are known to be valid.
    from tokenflow.editing.sweep import open_edits
    from tokenflow.editing.techniques import ControlNet

    with open_edits(configs, "controlnet") as edits:
        for run in edits:
            if not run.is_finished:
                run.find_control_images()
                technique = ControlNet(run.config, run.schedule, run.source, run.control_images)
                run.write(run.edit(technique))
    return str(edits.result)


if __name__ == "__main__":
    main()
