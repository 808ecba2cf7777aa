"""Plain loops that codes are compared with."""

import torch


def naive(values: list[float], bits: int) -> list[float]:
    """Asymmetric min-max quantisation of one group, number by number."""
    zero = float(torch.tensor(min(values)).half())
    scale = float(torch.tensor((max(values) - zero) / (2**bits - 1)).half())
    found = []
    for value in values:
        code = round((value - zero) / scale) if scale > 0 else 0
        found.append(min(max(code, 0), 2**bits - 1) * scale + zero)
    return found
