"""The library of `kernels/`: compiled on the machine that runs it, kept for next time, and loaded only if it is ours.

What a loaded library holds is run, so it may come from two places alone: `dsv3` in the user's cache folder, if it and
that folder belong to the user and nobody else can write there, or a folder that this process has just made for itself.
The first is where a library is kept, under a name made of all it depends on: the sources, the compiler with its options
and the CPU's instructions (a home folder may be shared by machines that differ). The second is where it is compiled,
and what is loaded if it cannot be kept: a process then compiles its own, and kernels are there all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

from dsv3.errors import UserError
from dsv3.files import atomic_writer

_SOURCES = Path(__file__).with_name("kernels")
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-march=native")
_UNUSED = 30 * 24 * 3600  # seconds after which a library that nobody has loaded may go


def load() -> ctypes.CDLL | None:
    """The library, compiled if this machine has not done so yet; None where there can be none.

    `DSV3_NATIVE=0` in the environment and systems other than Linux have none; any other reason is told as a warning.
    """
    if os.environ.get("DSV3_NATIVE") == "0" or platform.system() != "Linux":
        return None
    try:
        return _load(_compiler())
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"no kernels, PyTorch does their work and decoding on this CPU is slower: {_reason(error)} "
            "(CXX names another compiler, DSV3_NATIVE=0 does without)",
            stacklevel=2,
        )
        return None


def _compiler() -> list[str]:
    """CXX or c++, with a program's full path; arguments may follow, as in `CXX="ccache g++"`."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(f"there is no compiler {command[0]}")
    return [program, *command[1:]]


def _load(compiler: list[str]) -> ctypes.CDLL:
    made_of = [path.read_bytes() for path in sorted(_SOURCES.iterdir())] + [repr((compiler, _FLAGS, _cpu())).encode()]
    name = f"native-{hashlib.sha256(b''.join(made_of)).hexdigest()[:16]}.so"
    with contextlib.suppress(OSError, RuntimeError):
        kept = _cache() / name
        if _is_ours(kept.parent) and _is_ours(kept):
            return _load_kept(kept)
    # What is loaded stays loaded when its file goes: nothing is left behind, however the process ends.
    with tempfile.TemporaryDirectory(prefix="dsv3-") as folder:
        built = Path(folder) / name
        command = [*compiler, *_FLAGS, str(_SOURCES / "kernels.cpp"), "-o", str(built)]
        in_english = {**os.environ, "LC_ALL": "C"}
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, env=in_english, timeout=120)
        try:
            return _load_kept(_keep(built))
        except (OSError, RuntimeError, UserError) as error:
            warnings.warn(
                f"the kernels cannot be kept, so each process compiles them anew: {error} "
                "(XDG_CACHE_HOME names another place)",
                stacklevel=4,
            )
            return ctypes.CDLL(str(built))


def _cache() -> Path:
    """Where libraries are kept. RuntimeError: a user whom the system does not know, without HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3"


def _load_kept(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    with contextlib.suppress(OSError):
        os.utime(path)  # it is in use: see _remove_unused
    return found


def _keep(built: Path) -> Path:
    """Put it into the cache folder: of several processes that do so at once one wins, and none reads half a file."""
    folder = _cache()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise PermissionError(f"{folder} is another user's, or others may write there")
    path = folder / built.name
    with atomic_writer(path) as file:
        os.fchmod(file.fileno(), 0o700)
        file.write(built.read_bytes())
    _remove_unused(folder, path)
    return path


def _remove_unused(folder: Path, new: Path) -> None:
    """Remove the user's libraries of other sources, compilers and machines that nobody has loaded for long."""
    for path in folder.glob("*native-*.so*"):  # the unfinished files of writers that were killed too
        with contextlib.suppress(OSError):
            found = path.lstat()
            old = time.time() - found.st_mtime > _UNUSED
            if old and path != new and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                path.unlink()


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have put it there."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _cpu() -> str:
    """What decides which instructions there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _reason(error: Exception) -> str:
    """In one line; of a compiler that failed, the first line in which it says so."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = error.stderr.decode(errors="replace").strip().splitlines()
    told = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
    return f"{error.cmd[0]} failed with {error.returncode}: {told.strip()}"
