"""Errors that tell what was given, what was wrong with it and what to do.

GraftError                 failed, exit code 1
  InputError               bad input, exit code 2
    SiteError              a place in a model
    DataError              pictures, captions, tables
    FormatError            a file that is not what it claims
    BaseMismatchError      an adapter of another base
    RunError               a run folder
    DiskFullError          no space
"""

from __future__ import annotations


class GraftError(Exception):
    """Something failed."""

    exit_code = 1


class InputError(GraftError):
    """The input is at fault: ``given: reason. remedy``."""

    exit_code = 2

    def __init__(self, given: str, reason: str, remedy: str):
        self.given, self.reason, self.remedy = given, reason, remedy
        super().__init__(f"{given}: {reason}. {remedy}")


class SiteError(InputError):
    """A place in a model does not exist or takes no part."""


class DataError(InputError):
    """Data cannot be used."""


class FormatError(InputError):
    """A file is not what it claims to be."""


class BaseMismatchError(InputError):
    """An adapter was made for another base."""


class RunError(InputError):
    """A run folder cannot be used."""


class DiskFullError(InputError):
    """No space is left."""
