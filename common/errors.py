"""Errors that a user can fix, as opposed to bugs."""


class UserError(ValueError):
    """A mistake in flags, files or data: its message says what is wrong, where, and what to do. The scripts end with that
    message and `exit_code` (docs/operations.md); any other exception, a library's ValueError included, is a bug and keeps
    its traceback."""

    exit_code = 2
    of_one_shard = False  # whether the run can continue with its other shards


def message_of(error: Exception) -> str:
    """Its message. A DataLoader worker passes its error on as a text that ends with the traceback's last line."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text


class DataError(UserError):
    """Data that cannot be used as it is; the message says where, what is wrong and what to do."""

    of_one_shard = True


class Unreachable(DataError):
    """A server did not answer, or not as it should: the same may work later."""

    exit_code = 1


class BelowThreshold(UserError):
    """A score is below the threshold that it had to reach."""

    exit_code = 3
