"""Errors that a user can cause: each prints one line and has an exit status."""

__all__ = [
    "IdentityRefusedError",
    "InputError",
    "InterruptedRunError",
    "LedgerError",
    "MachineError",
    "OneLineError",
    "SettingsError",
    "WeightsError",
]


class OneLineError(BaseException):
    """Base class of what ends a script with one line on stderr: errors, and interruptions."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        # Values, paths and messages of other libraries may contain line breaks and control
        # characters that a terminal would obey.
        super().__init__("".join(map(_printable, " ".join(message.splitlines()))))

    @property
    def shown(self) -> str:
        """What a script prints; the message is what is recorded."""
        return str(self)


class LedgerError(OneLineError, Exception):
    """Base class of the errors that a user can cause."""


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]


class SettingsError(LedgerError):
    """config.ini or a flag is wrong."""


class InputError(LedgerError):
    """The FASTA file breaks a rule of [input]."""


class WeightsError(LedgerError):
    """The weights are not ESM-2, incomplete, hostile or contradicted by the settings."""


class IdentityRefusedError(LedgerError):
    """A run, its checkpoints, the given weights or the given input do not belong together."""

    exit_status = 3


class MachineError(LedgerError):
    """The disk, the database, the memory or the device failed."""

    exit_status = 4


class InterruptedRunError(OneLineError):
    """A signal ended the work; all finished work is committed.

    As KeyboardInterrupt, it is not an Exception, so that no code that takes whatever went wrong for
    a fault of a file, a network or a library takes a signal for one: not ours, and not theirs.

    run_id: the run that can be continued, if there is one.
    """

    def __init__(self, message: str, signal_number: int, run_id: int | None = None) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number
        self.run_id = run_id

    @property
    def shown(self) -> str:
        """The message, and what continues the run."""
        return str(self) if self.run_id is None else f"{self} (make resume RUN={self.run_id})"
