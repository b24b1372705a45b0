"""The device that a command is told to compute on."""

import torch


def check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have, before a model is loaded.

    Raises:
        ValueError: one line, naming it.
    """
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # "meta" holds no values
        why = str(error).partition("\n")[0].partition(". Please")[0][:200]
        raise ValueError(f"device={device} cannot be used here: {why}; leave it out for what there is.") from error
