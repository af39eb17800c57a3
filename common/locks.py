"""Locks that are released when their process ends, however that happens."""

import errno
import os

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# What file systems without locks answer: Lustre without flock, NFS without lockd.
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class Busy(Exception):
    """Another process holds the lock."""


def hold(path):
    """(file, locked): the file, made if needed and opened to append text, and whether this process holds its lock, until
    the file is closed; false where there are no locks. Busy if another process has it.

    Children that this process forks let go of it: DataLoader workers outlive a killed process by seconds, in which nobody
    could start it again."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    if fcntl is None:
        return file, False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return file, False
        file.close()
        if isinstance(error, BlockingIOError | PermissionError):
            raise Busy from None
        raise
    os.register_at_fork(after_in_child=lambda: _let_go(file))
    return file, True


def _let_go(file) -> None:
    if not file.closed:  # nor closed here: that would write what the parent has yet to write
        with open(os.devnull, "a", encoding="utf-8") as nothing:
            os.dup2(nothing.fileno(), file.fileno(), inheritable=False)
