"""Edit a video with SDEdit and TokenFlow.

The source is noised part of the way (start) and denoised with the new prompt; the less noise, the
closer the edit stays to the source. Run preprocess.py first.
The last line on stdout is the path of the edited video.
"""

from pathlib import Path

from config import SDEditConfig, command, parse_with_yaml


@command
def main() -> None:
    """Parse, edit, and print where the result is."""
    default = Path(__file__).parent / "configs" / "config_sdedit.yaml"
    config = parse_with_yaml(SDEditConfig, __doc__, default)

    # Slow imports, left until the configuration is known to be right.
    import torch

    from edit_video import Edit, run_edit
    from editor import Technique
    from inversion import CLEAN

    def technique(job: Edit) -> Technique:
        schedule = job.schedule.last(int(config.n_timesteps * config.start))
        clean = job.latents(CLEAN)
        if config.use_ddim_noise:
            noise = job.inversion_noise()
        else:  # one noise for all frames, so that it does not flicker
            generator = torch.Generator().manual_seed(config.seed)
            noise = torch.randn(clean[:1].shape, generator=generator).expand_as(clean)
        t = torch.tensor(schedule.timesteps[0])
        return Technique(job.sd.scheduler.add_noise(clean, noise, t), schedule)

    print(run_edit(config, "sdedit", technique))


if __name__ == "__main__":
    main()
