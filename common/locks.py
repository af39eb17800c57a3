"""Locks that are released when their process ends, however that happens."""

import errno

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
    the file is closed; false where there are no locks. Busy if another process has it."""
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
    return file, True
