import errno
import os

import pytest

from dit_accel.errors import DitAccelError, UsageError
from dit_accel.pipelines.outputs import Outputs, explain, prepare_folder, read_json, write_json


def test_files_appear_together_under_their_final_names(tmp_path):
    a, b = tmp_path / "a.mp4", tmp_path / "b.json"
    with Outputs() as outputs:
        for path in (a, b):
            partial = outputs.add(path)
            assert partial.parent == path.parent
            assert partial.name == path.name + ".partial"
            partial.write_text(path.name)
            assert not path.exists()
        outputs.commit()
    assert {p.name for p in tmp_path.iterdir()} == {"a.mp4", "b.json"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_nothing_is_left_when_writing_stops(tmp_path, error):
    def write():
        with Outputs() as outputs:
            outputs.add(tmp_path / "a").write_text("x")
            folder = outputs.add(tmp_path / "frames")
            folder.mkdir()
            (folder / "0.png").write_text("x")
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_takes_the_earlier_ones_back(tmp_path, monkeypatch):
    replace = os.replace

    def fail_on_json(source, target):
        if str(target).endswith(".json"):
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    def write():
        with Outputs() as outputs:
            outputs.add(tmp_path / "a.mp4").write_text("x")
            outputs.add(tmp_path / "a.json").write_text("x")
            outputs.commit()

    monkeypatch.setattr(os, "replace", fail_on_json)
    with pytest.raises(OSError, match="broken"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", range(4))
def test_an_interrupted_replacement_leaves_what_was_there(tmp_path, monkeypatch, at):
    (tmp_path / "a.mp4").write_text("old")
    (tmp_path / "a.json").write_text("old")
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        replace(source, target)

    def write():
        with Outputs() as outputs:
            for name in ("a.mp4", "a.json"):
                outputs.add(tmp_path / name).write_text("new")
            outputs.commit()

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.mp4": "old", "a.json": "old"}


def test_a_folder_is_replaced_whole_and_a_stale_partial_is_no_obstacle(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old.png").write_text("x")
    (tmp_path / "f.partial").mkdir()
    (tmp_path / "f.partial" / "stale.png").write_text("x")
    with Outputs() as outputs:
        folder = outputs.add(tmp_path / "f")
        folder.mkdir()
        (folder / "new.png").write_text("x")
        outputs.commit()
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["new.png"]


@pytest.mark.parametrize("path", ["/dev/null/x", "/proc/nope"])
def test_a_folder_that_cannot_be_written_to(path):
    from pathlib import Path

    with pytest.raises(UsageError, match=f"-o {path} cannot be written to"):
        prepare_folder(Path(path))


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="cannot be written to"):
        prepare_folder(tmp_path / "out")


def test_a_full_disk_is_explained(tmp_path):
    text = str(explain(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "a.mp4"))
    assert "disk is full while writing a.mp4" in text
    assert "--resume" in text
    text = str(explain(OSError(errno.EIO, "Input/output error"), tmp_path / "a"))
    assert "a could not be written: Input/output error" in text


def test_a_document_makes_its_folders_and_is_read_again(tmp_path):
    path = tmp_path / "not" / "yet" / "a.json"
    write_json(path, {"rows": [1]})
    assert read_json(path) == {"rows": [1]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    with pytest.raises(DitAccelError, match="could not be written"):
        write_json(path / "b.json", {})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_file_that_is_no_document_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.json .*; give another file or remove it"):
        read_json(path)
