"""Errors that a user can cause, each one line, each with its exit status."""

__all__ = [
    "IdentityRefusedError",
    "InputError",
    "InterruptedRunError",
    "LedgerError",
    "MachineError",
    "SettingsError",
    "WeightsError",
]


class LedgerError(Exception):
    """Base of the errors that end a script with one line on stderr."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        # Values, paths and foreign messages may hold line breaks, and control characters that a
        # terminal obeys; an error has neither.
        super().__init__("".join(map(_printable, " ".join(message.splitlines()))))


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]


class SettingsError(LedgerError):
    """config.ini or a flag is wrong."""


class InputError(LedgerError):
    """The FASTA file is refused."""


class WeightsError(LedgerError):
    """The weights are refused: not ESM-2, incomplete, hostile or contradicted."""


class IdentityRefusedError(LedgerError):
    """A checkpoint, a run and the weights or input in hand do not belong together."""

    exit_status = 3


class MachineError(LedgerError):
    """Disk, database, memory or device failed."""

    exit_status = 4


class InterruptedRunError(LedgerError):
    """A signal ended the work; what was finished is committed."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number
