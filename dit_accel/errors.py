"""Exceptions of the library. Every message says what happened, the value seen, what is allowed, what to type next."""

from __future__ import annotations


class DitAccelError(Exception):
    """Base of every error raised on purpose by this library (CLI exit code 1)."""


class UsageError(DitAccelError, ValueError):
    """A value the caller passed is wrong (CLI exit code 2)."""


class UnsupportedError(DitAccelError, NotImplementedError):
    """The combination is valid but this method, model or backend does not serve it."""
