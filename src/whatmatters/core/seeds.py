"""Randomness without global state: everything that draws takes `seed: int | torch.Generator`."""

import hashlib

import torch

Seed = int | torch.Generator


def generator(seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for `seed`: a new one for an integer, the given one unchanged otherwise.

    Example:
        >>> int(torch.randint(10, (), generator=generator(0)))
        4
    """
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator(device=device).manual_seed(seed)


def derived(seed: int, *names: object) -> int:
    """A seed for a named part of a run: independent of the order in which parts ask.

    Example:
        >>> derived(0, "a") != derived(0, "b")
        True
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
