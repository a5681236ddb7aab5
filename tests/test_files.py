"""Files of a saved folder: written whole or not at all, found locally."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from spul.records.files import (
    SCRATCH,
    atomic_folder,
    atomic_write,
    check_can_hold,
    check_new_folder,
    find_file,
    write_text,
)


def test_a_file_is_replaced_when_the_block_ends_and_no_sooner(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
        assert scratch.parent == tmp_path
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.txt", "new")]


def test_an_error_leaves_the_old_file_and_no_scratch_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as scratch:
            scratch.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old"


def test_text_is_written_in_utf8_whatever_the_locale(tmp_path):
    write_text(str(tmp_path / "a.txt"), "ünknown\n")
    assert (tmp_path / "a.txt").read_bytes() == "ünknown\n".encode()


def test_a_file_gets_the_permissions_of_an_ordinary_one(tmp_path):
    write_text(tmp_path / "a.txt", "a")
    (tmp_path / "b.txt").write_text("b")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_tensors_get_the_permissions_of_an_ordinary_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "inner" / "a.safetensors")
        with atomic_write(tmp_path / "b.safetensors") as scratch:
            save_file({"a": torch.zeros(1)}, scratch)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")}
    assert modes == {0o666 & ~umask}


def test_a_killed_process_leaves_the_old_file_and_a_later_write_removes_what_it_left(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = """
        import os, signal, sys
        from spul.records.files import atomic_folder, atomic_write
        with atomic_write(sys.argv[1]) as scratch, atomic_folder(os.path.dirname(sys.argv[1])) as folder:
            scratch.write_text("half")
            (folder / "b.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert path.read_text() == "old"
    left = [one for one in tmp_path.iterdir() if one.name.startswith(SCRATCH)]
    assert len(left) == 2
    write_text(path, "new")
    assert all(one.exists() for one in left)  # it may belong to a process that is still at it
    for one in [*left, *(inner for folder in left for inner in folder.rglob("*"))]:
        os.utime(one, (0, 0))
    write_text(path, "newer")
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_moved_in_beside_what_is_there(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b", "other"):
        (tmp_path / name).write_text("old")
    with atomic_folder(tmp_path) as scratch:
        (scratch / "sub" / "deep").mkdir(parents=True)
        for name in ("a", "sub/b", "sub/deep/c"):
            (scratch / name).write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    found = {str(one.relative_to(tmp_path)): one.read_text() for one in tmp_path.rglob("*") if one.is_file()}
    assert found == {"a": "new", "sub/b": "new", "sub/deep/c": "new", "other": "old"}


def test_an_error_leaves_a_folder_as_it_was(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with atomic_folder(tmp_path) as scratch:
            (scratch / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a", "old")]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "a").write_text("a")
    with pytest.raises(ValueError, match="a' is a file; pass a folder"), atomic_folder(tmp_path / "a"):
        pass


def test_a_folder_that_cannot_be_made_is_refused_before_it_is_needed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link' is a link to nothing; expected a folder"):
        check_can_hold(tmp_path / "link" / "out")
    with pytest.raises(ValueError, match="path of the output folder is empty"):
        check_can_hold("")
    with pytest.raises(ValueError, match="path of the output folder is empty"), atomic_folder(""):
        pass
    with pytest.raises(ValueError, match="path of the output folder is empty"):
        check_new_folder("")
    with pytest.raises(FileExistsError, match="is a folder with files in it"):
        check_new_folder(tmp_path / "new" / "..")
    (tmp_path / "nowhere").mkdir()
    check_can_hold(tmp_path / "link" / "out")


def test_an_empty_mount_point_is_refused_before_it_would_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mounted")
    with pytest.raises(FileExistsError, match=r"mounted' is a mount point.*; name a folder in it, such as .*ed/spul"):
        check_new_folder(tmp_path / "mounted")
    assert check_new_folder(tmp_path / "mounted" / "spul") == tmp_path / "mounted" / "spul"


def test_a_missing_folder_is_created(tmp_path):
    with atomic_folder(tmp_path / "new" / "one") as scratch:
        (scratch / "a").write_text("a")
    assert (tmp_path / "new" / "one" / "a").read_text() == "a"


def test_a_file_is_found_in_a_folder_or_its_subfolder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text("{}")
    assert find_file(tmp_path, "a.json") is None
    assert find_file(str(tmp_path), "a.json", subfolder="sub") == tmp_path / "sub" / "a.json"
    assert find_file(tmp_path, "sub") is None


def test_a_folder_that_is_not_there_is_named_as_such(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder here"):
        find_file(tmp_path / "missing" / "adapter", "a.json")
