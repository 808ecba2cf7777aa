"""Models whose modules or forward somebody compiled: eager execution of them, and when they may be changed.

A compiled function keeps the attention function that it was compiled with, and shapes that change with every token
would compile it anew. So a forward pass on an evicting cache runs uncompiled. Calls without such a cache run as they
were compiled.

The compiler reads a model while it compiles a call of it, and again when it has. A model that is patched or restored in
between, by another thread or by the garbage collector, makes it fail.
"""

import sys
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


@contextmanager
def not_compiling(wait: bool) -> Iterator[bool]:
    """Context manager in which no other thread compiles.

    PyTorch has no public name for the lock of its compiler. Without that lock this does nothing.

    Args:
        wait: for a compilation of another thread to end.

    Yields:
        Whether nothing is being compiled. If not, another thread compiles and was not waited for, or this one does.
    """
    frames = sys.modules.get("torch._dynamo.convert_frame")  # imported once something is compiled
    lock = getattr(frames, "compile_lock", None)
    if lock is None:
        yield True
        return
    if not lock.acquire(blocking=wait):
        yield False
        return
    try:
        yield torch._guards.CompileContext.try_get() is None  # the lock does not keep out its own thread
    finally:
        lock.release()
