"""The command line. Exit codes: 0 done, 2 the person's input is wrong, 1 a fault of ours; 130 and 143 for work stopped by a signal."""

from __future__ import annotations

import errno
import os
import sys
import traceback

from paperworks.errors import InputError

DISK = {
    errno.ENOSPC: "the disk is full; free some space and repeat the command (a training goes on with --resume)",
    errno.EDQUOT: "the disk quota is used up; free some space and repeat the command (a training goes on with --resume)",
    errno.EFBIG: "the file is larger than the disk allows; choose another place",
    errno.EROFS: "the place is read-only; choose another --out",
    errno.EACCES: "permission denied; choose another place or change its rights",
    errno.EPERM: "operation not permitted; choose another place or change its rights",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another --out",
    errno.EISDIR: "this is a folder where a file is needed",
    errno.EEXIST: "this exists and is not a folder; choose another --out",
    errno.ENAMETOOLONG: "the name is too long for this disk",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from paperworks.cli.commands import app

    try:
        app(args=arguments, prog_name="paperworks")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except InputError as error:
        return _say(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno in DISK:
            return _say(f"{error.filename or 'output'}: {DISK[error.errno]}")
        return _fault()
    except Exception as error:
        if code := getattr(error, "exit_code", None):
            print(f"stopped by {error}; everything is saved, repeat the command with --resume to go on", file=sys.stderr)
            return code
        return _fault()
    return 0


def _say(message: str) -> int:
    print(f"paperworks: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _fault() -> int:
    traceback.print_exc()
    print("paperworks: this is a fault of ours, not of your input; please report the lines above", file=sys.stderr)
    return 1


def run() -> None:
    """Entry point of the ``paperworks`` script."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Worker threads of the numeric libraries have nothing left to say; leaving at once saves a second of tearing down.
    os._exit(code)
