"""The run's shared secret: a file of mode 0600 that only its owner can read. On the command line or
in the environment other users of the machine could read it."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from cordee.errors import ConfigError

SECRET_BYTES = (32, 4096)
"""Fewest and most bytes of a secret, white space at both ends removed."""


def read_secret(path: Path) -> bytes:
    """The secret in a file; ConfigError when the file is not one that we alone can read."""
    try:
        # Not following a link and asking the open file, not its name: nobody can swap it between.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as cause:
        if path.is_symlink():
            raise _secret_error(
                path, "is a symbolic link", f"give {path.resolve()} itself"
            ) from cause
        problem = f"cannot be read: {cause.strerror}"
        raise _secret_error(path, problem, f"copy the file of the first host to {path}") from cause
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _secret_error(path, "is not a regular file", "give the path of a regular file")
        if status.st_uid != os.geteuid():
            raise _secret_error(
                path, f"belongs to user {status.st_uid}", f"chown {os.geteuid()} {path}"
            )
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o177:
            problem = f"may be read or changed by others (mode {mode:04o})"
            raise _secret_error(path, problem, f"chmod 600 {path}")
        secret = os.read(descriptor, SECRET_BYTES[1] + 64).strip()
    finally:
        os.close(descriptor)
    if not SECRET_BYTES[0] <= len(secret) <= SECRET_BYTES[1]:
        problem = f"holds {len(secret)} bytes, not {SECRET_BYTES[0]} to {SECRET_BYTES[1]}"
        raise _secret_error(path, problem, f"rm {path}, and the next start writes a new one")
    return secret


def make_secret(path: Path) -> bytes:
    """Writes a new secret of 256 random bits as hex, or reads the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return read_secret(path)
    except OSError as cause:
        problem = f"cannot be written: {cause.strerror}"
        raise _secret_error(path, problem, "name a file in a directory of yours") from cause
    secret = secrets.token_hex(32).encode()
    with open(descriptor, "wb") as file:
        file.write(secret + b"\n")
        file.flush()
        os.fsync(descriptor)
    return secret


def _secret_error(path: Path, problem: str, fix: str) -> ConfigError:
    return ConfigError(f"the secret file {problem}", values={"secret": str(path)}, fix=fix)
