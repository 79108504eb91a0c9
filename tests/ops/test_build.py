"""Where the kernels' library comes from: kept, compiled anew, or not there, and then the reason is told."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from dsv3.ops import build

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere there are no kernels")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache folder, not there yet; nothing that the one who runs the tests has set."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("DSV3_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dsv3"


@pytest.fixture
def compiled(monkeypatch) -> list[list[str]]:
    """The compiler's command lines, as they come; it compiles without optimising, which takes a fifth of the time."""
    commands = []
    run = subprocess.run

    def noted(command, **kwargs):
        commands.append(command)
        return run(command, **kwargs)

    monkeypatch.setattr(build, "_FLAGS", tuple(flag for flag in build._FLAGS if flag != "-O3"))
    monkeypatch.setattr(build.subprocess, "run", noted)
    return commands


def program(path: Path, script: str) -> str:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


def load_quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return build.load()


@needs_compiler
def test_a_library_is_compiled_once_and_kept(cache, compiled):
    assert load_quietly().linear is not None and load_quietly().linear is not None
    assert len(compiled) == 1
    (path,) = cache.iterdir()
    assert not path.stat().st_mode & 0o077 and not cache.stat().st_mode & 0o077


@needs_compiler
def test_what_it_is_made_of_decides_its_name(cache, compiled, monkeypatch):
    load_quietly()
    monkeypatch.setattr(build, "_cpu", lambda: "flags: another machine's")
    load_quietly()
    monkeypatch.setenv("CXX", "c++ -DOTHER")
    load_quietly()
    assert len(compiled) == 3 and len(list(cache.iterdir())) == 3


@needs_compiler
def test_a_compiler_with_arguments(tmp_path, compiled, monkeypatch):
    launcher = program(tmp_path / "launcher of mine", 'exec "$@"\n')
    monkeypatch.setenv("CXX", f"'{launcher}' c++ -DOF_A_TEST='a b'")
    assert load_quietly() is not None
    assert compiled[0][:3] == [launcher, "c++", "-DOF_A_TEST=a b"]


@needs_compiler
@pytest.mark.parametrize(
    ("mode", "held"), [(0o777, b"what they want to be run"), (0o720, b""), (0o700, b"\x7fELF and no more")]
)
def test_what_others_could_have_written_or_is_damaged_is_compiled_anew(mode, held, cache, compiled, monkeypatch):
    load_quietly()
    (good,) = cache.iterdir()
    other = cache.with_name("other") / "dsv3"  # the good one is loaded: it is not written over
    other.mkdir(parents=True, mode=0o700)
    bad = other / good.name
    bad.write_bytes(held)
    bad.chmod(mode)
    monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent))
    assert load_quietly() is not None
    assert len(compiled) == 2 and bad.stat().st_mode & 0o777 == 0o700 and len(bad.read_bytes()) > 1000


def in_the_way(cache, monkeypatch):
    cache.parent.write_text("a file")


def open_to_others(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.chmod(0o777)


def of_another(cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)


def without_a_home(cache, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", nowhere)


def full_disk(cache, monkeypatch):
    def refused(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refused)


@needs_compiler
@pytest.mark.parametrize("place", [in_the_way, open_to_others, of_another, without_a_home, full_disk])
def test_where_none_can_be_kept_each_process_compiles_its_own(place, cache, compiled, monkeypatch, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(private))
    place(cache, monkeypatch)
    for _ in range(2):
        with pytest.warns(UserWarning, match="kernels cannot be kept.*XDG_CACHE_HOME") as told:
            assert build.load().linear is not None
        assert len(told) == 1 and "\n" not in str(told[0].message)
    assert len(compiled) == 2
    assert not list(private.iterdir()), "nothing stays behind"
    assert not cache.is_dir() or not list(cache.iterdir())


@needs_compiler
def test_libraries_out_of_use_are_removed(cache, compiled, monkeypatch):
    load_quietly()
    (first,) = cache.iterdir()
    names = {
        "native-0123.so": 31,
        "native-4567.so": 29,
        ".native-89ab.so.0a0b.tmp": 31,
        "of-another-kind": 31,
    }
    for name, days in {**names, first.name: 31}.items():
        path = cache / name
        path.touch()
        os.utime(path, (time.time() - days * 86400,) * 2)
    folder = cache / "native-folder.so"
    folder.mkdir()
    os.utime(folder, (0, 0))
    (cache / "native-link.so").symlink_to(cache / "native-0123.so")
    load_quietly()  # loads the first, which is thereby in use
    assert (cache / "native-0123.so").exists()
    monkeypatch.setenv("CXX", "c++ -DOTHER")
    load_quietly()
    left = {path.name for path in cache.iterdir()}
    assert first.name in left and len(left) == 6
    assert not left & {"native-0123.so", ".native-89ab.so.0a0b.tmp"}


@needs_compiler
def test_nothing_of_another_user_is_removed(cache, compiled, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    path = cache / "native-0123.so"
    path.touch()
    os.utime(path, (0, 0))
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    build._remove_unused(cache, cache / "native-new.so")
    assert path.exists()
    monkeypatch.undo()
    build._remove_unused(cache, cache / "native-new.so")
    assert not path.exists()


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("no-such-compiler -x", "there is no compiler no-such-compiler"),
        ("'c++", "No closing quotation"),
        ("{folder}/broken", "broken failed with 3: broken: fatal error: no such thing"),
        ("{folder}/silent", "silent failed with 1: no message"),
    ],
)
def test_a_compiler_that_fails_is_told_once(cxx, reason, tmp_path, monkeypatch):
    program(tmp_path / "broken", 'echo "in file x:" >&2; echo "broken: fatal error: no such thing" >&2; exit 3\n')
    program(tmp_path / "silent", "exit 1\n")
    monkeypatch.setenv("CXX", cxx.format(folder=tmp_path))
    with pytest.warns(UserWarning, match=f"PyTorch does their work.*{reason}") as told:
        assert build.load() is None
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_it_is_told_once_for_a_process_and_not_where_it_was_switched_off():
    code = "from dsv3.ops import native; print([native.library() for _ in range(2)])"
    for switched_off in (False, True):
        env = {**os.environ, "CXX": "no-such-compiler"} | ({"DSV3_NATIVE": "0"} if switched_off else {})
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == "[None, None]"
        assert ran.stderr.count("no kernels") == (0 if switched_off else 1)
