"""How this process was started, which is known before anything slow is imported."""

import os

from tokenflow.errors import UserError


def read_rank() -> int:
    """The number of this process in its run, as torchrun and accelerate set it; 0 if it runs alone.

    Raises UserError for variables that some other run left behind, which would make this one wait for others.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in (*needed, "LOCAL_WORLD_SIZE") if name in os.environ}
    if not given:
        return 0
    wrong = [name for name in (*needed, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    wrong += [name for name, number in given.items() if number and not number.isdecimal()]
    if not wrong and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        wrong = ["RANK", "WORLD_SIZE"]
    if wrong:
        raise UserError(
            f"the environment's {', '.join(wrong)}: not as torchrun and accelerate set them; start several "
            f"processes with one of these, or a single one without {', '.join(given)}"
        )
    return int(os.environ["RANK"])
