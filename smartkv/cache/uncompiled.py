"""Eager execution of a model whose modules or forward somebody compiled.

A compiled function keeps the attention function that it was compiled with, and shapes that change with every token
would compile it anew. So a forward pass on an evicting cache runs uncompiled. Calls without such a cache run as they
were compiled.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Passes:
    """Number of forward passes that are to run uncompiled, and the stance of the compiler before the first of them."""

    def __init__(self) -> None:
        self.lock, self.count, self.stance = threading.Lock(), 0, None

    def enter(self) -> None:
        with self.lock:
            if not self.count:
                self.stance = torch.compiler.set_stance("force_eager")
            self.count += 1

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if not self.count and self.stance is not None:
                self.stance.__exit__(None, None, None)  # the stance before, which another thread may have left


_passes = _Passes()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Context manager in which compiled functions run eagerly.

    PyTorch has one stance for all threads. So compiled calls of another thread run eagerly too in the meantime: slower,
    with the same result.
    """
    _passes.enter()
    try:
        yield
    finally:
        _passes.leave()
