"""Where a result cannot be written is said before the work that it is for."""

import pytest

from dit_accel.cli import main
from dit_accel.errors import UsageError
from dit_accel.eval.shapes import job as shapes
from dit_accel.eval.tune import job as tuning
from dit_accel.pipelines import calibrate, load
from dit_accel.pipelines.outputs import check_file

COMMANDS = {
    "calibrate paro": ["calibrate", "paro"],
    "calibrate precision": ["calibrate", "precision"],
    "tune": ["tune", "--budget", "psnr>=28"],
    "eval speed": ["eval", "speed"],
    "eval attention": ["eval", "attention"],
    "eval shapes": ["eval", "shapes"],
    "eval fidelity": ["eval", "fidelity", "dense", "fast"],
    "eval vbench": ["eval", "vbench", "totals", "results"],
    "report": ["report", "runs"],
    "mask": ["mask"],
}


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Loading weights is work that must not have begun."""

    def loaded(*_, **__):
        pytest.fail("weights were loaded")

    # All are imported before any is changed: a module that imported the changed one would keep it.
    for module in (load, calibrate, tuning, shapes):
        monkeypatch.setattr(module, "load", loaded)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_path_that_cannot_be_written(command, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    assert main([*command, "-o", str(tmp_path / "folder.png")]) == 2
    assert "is a folder" in capsys.readouterr().err or command[0] in ("calibrate", "tune")
    (tmp_path / "a").write_text("a file")
    assert main([*command, "-o", str(tmp_path / "a" / "b.png")]) == 2
    told = capsys.readouterr().err
    assert "cannot be written" in told or "there is no folder" in told


@pytest.mark.parametrize(
    "command",
    [
        *([*command, "-o"] for command in COMMANDS.values()),
        ["stream", "p.txt", "-o"],
        ["render", "p.txt", "-o"],
        ["render", "p.txt", "--frames-dir"],
        ["eval", "shapes", "--sheet"],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main([*command, ""]))
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"{command[-1]} is empty; give a path" in told
    assert list(tmp_path.iterdir()) == []


def test_the_sheet_of_shapes_too(tmp_path, capsys):
    assert main(["eval", "shapes", "--sheet", str(tmp_path)]) == 2
    assert f"--sheet {tmp_path} is a folder" in capsys.readouterr().err


def test_a_folder_that_refuses_files(tmp_path, monkeypatch):
    import tempfile

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(UsageError, match=r"plan\.json cannot be written: Permission denied; give"):
        check_file(tmp_path / "plan.json")


def test_nothing_is_left_behind(tmp_path):
    check_file(tmp_path / "not" / "yet" / "there.json")
    check_file(tmp_path / ("long" * 60))
    assert list(tmp_path.iterdir()) == []
