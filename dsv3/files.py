"""Writing files and folders so that a crash, a full disk or an interrupt never leaves half of one behind.

Both writers work beside their target, under a hidden name, and give the finished thing its name at the end.
What the system refuses (no space, no permission, no such folder) becomes a `UserError`; what was there before
is untouched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dsv3.errors import UserError


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the `with` body ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with refusals(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to fill, that becomes `target` when the `with` body ends well, and vanishes when it does not.

    With `overwrite`, a folder that is at `target` is replaced at the very end; without, `target` must not exist or
    be empty.
    """
    target = Path(target).absolute()
    with refusals(target):
        if target.is_dir() and not overwrite and any(target.iterdir()):
            raise UserError(f"{target} exists and is not empty: choose another folder or ask to overwrite it")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        try:
            yield partial
            for path in sorted(partial.rglob("*"), reverse=True):
                _sync(path)
            _sync(partial)
            _put_in_place(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents if they are not there."""
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is being written into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write {path}: {reason}; free space or choose another place (what was there before is untouched)"
        ) from error


def _put_in_place(partial: Path, target: Path) -> None:
    """Give the finished folder its name; what had the name before goes last."""
    old = partial.with_suffix(".old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
