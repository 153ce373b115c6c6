"""Invert a video: encode its frames, run DDIM inversion, save the latents, reconstruct the video.

The last line on stdout is the path of the reconstruction, inverted.mp4, or, without one, of the folder.
Look at it: an edit can be no better than it is.
"""

import logging
from dataclasses import asdict
from pathlib import Path

from cli import UserError, command, parse
from config import PreprocessConfig

log = logging.getLogger("tokenflow")

VIDEO = "inverted.mp4"


@command
def main() -> None:
    """Check everything that can be checked, then read, encode, invert, reconstruct and report."""
    config = parse(PreprocessConfig, __doc__)

    # Slow imports, left until the configuration is known to be right.
    import inversion_stages as stages
    from diffusion import check_checkpoint, choose_device, load
    from inversion import INVERTED, Inversion, Manifest, checkpoint_identity, noisy
    from util import fingerprint, frame_rate, staged, write_video_from_folders

    fps = frame_rate(Path(config.data_path)) / config.stride
    source = fingerprint(Path(config.data_path))
    check_checkpoint(config.model_id, config.H, config.W)
    schedule, editing = stages.schedules(config)
    device, dtype = choose_device(config.device, config.dtype)
    n_frames = stages.count_frames(config)
    final = Inversion.of(config, n_frames)
    if final.exists and final.manifest.source != source:
        raise UserError(
            f"{final.folder} holds the inversion of another video of the same name; "
            "use another --save_dir, or delete that folder"
        )

    names = {t: noisy(t) for t in editing.timesteps}
    inverted = names.setdefault(schedule.timesteps[0], INVERTED)
    with staged(final.folder) as partial:
        inversion = Inversion(partial)
        stages.read_source(config, inversion.source, n_frames)
        log.info("loading %s on %s in %s", config.model_id, device, dtype)
        sd = load(config.model_id, config.controlnet_id, device, dtype, config.cpu_offload)
        stages.encode(sd, inversion, n_frames, config.batch_size)
        keyframes = stages.kept_keyframes(sd, inversion, config, editing)
        stages.invert_video(sd, inversion, config, schedule, names, keyframes)
        if not config.no_reconstruction:
            stages.reconstruct(sd, inversion, config, editing)
            frames = [inversion.reconstruction]
            write_video_from_folders(partial / VIDEO, frames, n_frames, fps)
        inversion.write_manifest(
            Manifest(
                config=asdict(config) | {"conditioned": config.controlnet_id is not None},
                source=source,
                checkpoint=checkpoint_identity(config.model_id),
                fps=str(fps),
                n_frames=n_frames,
                timesteps=editing.timesteps,
                inverted=inverted,
                inverted_timestep=schedule.timesteps[0],
                keyframes=keyframes,
            )
        )
        log.info(stages.report(sd, inversion, config, n_frames))
    print(final.folder if config.no_reconstruction else final.folder / VIDEO)


if __name__ == "__main__":
    main()
