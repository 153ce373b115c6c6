"""Edit a video with ControlNets and TokenFlow.

    python run_tokenflow_controlnet.py --data_path wolf.mp4 --prompt "a robotic wolf in the snow"

What the ControlNets are given of the source's frames, such as their edges or depth (control), preserves the
layout; control.mp4 shows it. An inversion under the same ControlNets is used if there is one. Run
preprocess.py first.
The last line on stdout is the path of the edited video.
"""

from tokenflow.cli import command, parse
from tokenflow.config import ControlNetConfig


@command
def main() -> None:
    """Parse, open, edit, write, and print where the result is."""
    config = parse(ControlNetConfig, __doc__, "config_controlnet.yaml")

    # Slow imports, after the configuration is known to be valid.
    from tokenflow.editing.run import open_edit
    from tokenflow.editing.techniques import controlnet

    with open_edit(config, "controlnet") as run:
        if not run.is_finished:
            run.find_conditions()
            scales = run.inversion.control_scales, config.control_scales
            technique = controlnet(run.schedule, run.first_latents, run.control_images, *scales)
            run.write(run.edit(technique))
    print(run.video)


if __name__ == "__main__":
    main()
