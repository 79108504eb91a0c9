import pytest

from dsv3.errors import UserError
from dsv3.files import atomic_writer, make_folder


def test_content_appears_whole_and_replaces_the_old(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "link").hardlink_to(path)
    with atomic_writer(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert (tmp_path / "link").read_bytes() == b"old", "the old file was written into, not replaced"
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "link"]


@pytest.mark.parametrize(
    ("failure", "seen"),
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failure_leaves_the_old_content_and_nothing_else(tmp_path, failure, seen):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(seen), atomic_writer(path) as file:
        file.write(b"half")
        raise failure
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"), atomic_writer(tmp_path / "file" / "inside") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="cannot write"):
        make_folder(tmp_path / "file" / "inside")
