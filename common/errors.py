"""What a user can mend, apart from faults of the program."""


class UserError(ValueError):
    """A mistake in flags, files or data: its message says what is wrong, where, and what to do. The scripts end with that
    message and exit code 2; any other exception, a library's ValueError included, is a fault and keeps its traceback."""

    of_one_shard = False  # whether other shards of the same run can be worked on all the same
