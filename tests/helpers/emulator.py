"""Triton's interpreter without its two largest costs, neither of which is the kernel's arithmetic."""

import contextlib
import inspect
from dataclasses import replace


class _Kept:
    """Stands for the scope that would put ``triton.language`` back after a launch."""

    def restore(self) -> None:
        pass


def speed_up() -> None:
    """For a process with ``TRITON_INTERPRET=1``: less than half the calls. A Triton that works otherwise stays as is.

    All of ``triton.language`` is replaced at every launch and at every call of a ``@triton.jit`` function inside of
    one. Here once: a process that only interprets has nothing to put back. And every sum and product of integers is
    done again in 64 bits, which :func:`checked` switches on where addresses are the point.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    plain = getattr(interpreter, "_patch_lang", None)
    if plain is not None and hasattr(interpreter, "_LangPatchScope"):
        modules, done = {}, set()

        def once(fn):
            if fn not in modules:
                seen = (x for x in fn.__globals__.values() if inspect.ismodule(x))
                modules[fn] = frozenset(x.__name__ for x in seen if x in (tl, tl.core))
            if modules[fn] not in done:
                plain(fn)
                done.add(modules[fn])
            return _Kept()

        interpreter._patch_lang = once
    _check(False)


@contextlib.contextmanager
def checked():
    """Integers that pass their width raise, as in the interpreter by default."""
    _check(True)
    try:
        yield
    finally:
        _check(False)


def _check(on: bool) -> None:
    from triton.runtime import interpreter

    builder = getattr(interpreter, "interpreter_builder", None)
    if hasattr(getattr(builder, "options", None), "sanitize_overflow"):
        builder.options = replace(builder.options, sanitize_overflow=on)
