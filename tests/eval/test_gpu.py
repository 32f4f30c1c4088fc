"""All of a GPU's work in pieces, with stub children: what runs, in which order, and where it goes on."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_accel.errors import UsageError
from dit_accel.eval import environment, gpu
from dit_accel.eval.gpu import Step, child, go_on, opened, steps
from dit_accel.eval.kernels.cases import SECTIONS

ROOT = Path(__file__).parents[2]


class Machine:
    """Steps that take as long as they are said to. ``ran``: what was started."""

    def __init__(self, takes, codes=()):
        self.takes, self.codes, self.ran, self.now = takes, dict(codes), [], 0.0

    def run(self, step, seconds):
        self.ran.append(step.name)
        took = self.takes[step.name]
        self.now += min(took, seconds)
        return self.codes.get(step.name, 0) if took <= seconds else None

    def go_on(self, todo, done, minutes):
        return go_on(todo, done, minutes, self.run, lambda: None, lambda: self.now)


def stubs(*names):
    return [Step(name, ("true",)) for name in names]


def test_a_run_out_of_time_goes_on_where_it_ended():
    machine, todo, done = Machine({"a": 50, "b": 40, "c": 20}), stubs("a", "b", "c"), {}
    assert not machine.go_on(todo, done, 1)
    assert machine.ran == ["a", "b"]
    assert list(done) == ["a"]
    assert machine.go_on(todo, done, 1)
    # It was ended in the middle and starts anew.
    assert machine.ran == ["a", "b", "b", "c"]
    assert all(end["code"] == 0 for end in done.values())
    assert machine.go_on(todo, done, 1)
    assert len(machine.ran) == 4


def test_one_that_had_all_the_time_does_not_hold_up_the_others():
    machine, todo, done = Machine({"long": 100, "a": 5}), stubs("long", "a"), {}
    assert not machine.go_on(todo, done, 1)
    assert done["long"]["code"] is None
    assert machine.ran == ["long"]
    assert not machine.go_on(todo, done, 1)
    # What was never tried comes first.
    assert machine.ran[1:] == ["a", "long"]
    assert done["a"]["code"] == 0


def test_a_failure_is_told_and_tried_again_last(capsys):
    machine, todo, done = Machine({"a": 1, "b": 1}, {"a": 3}), stubs("a", "b"), {}
    assert machine.go_on(todo, done, 1)
    assert machine.ran == ["a", "b"]
    assert done["a"]["code"] == 3
    assert "a: exit code 3" in capsys.readouterr().out
    machine.codes.clear()
    assert machine.go_on(todo, done, 1)
    assert machine.ran == ["a", "b", "a"]
    assert done["a"]["code"] == 0


@pytest.mark.parametrize(("took", "late"), [(45, True), (3, False)])
def test_a_timed_step_that_ends_with_its_time_is_no_failure(took, late):
    """Exit code 1 before that is one: the GPU's context broke."""
    todo, done = [Step("sparse", ("true",), timed=True)], {}
    machine = Machine({"sparse": took}, {"sparse": 1})
    assert machine.go_on(todo, done, 1) == (not late)
    assert ("sparse" in done) != late


def test_one_that_got_somewhere_is_not_stuck(tmp_path):
    kept, done = tmp_path / "found.json", {}

    def run(step, seconds):
        kept.write_text("more")
        now[0] += seconds

    now = [0.0]
    assert not go_on([Step("tune", ("true",), keeps=kept)], done, 1, run, lambda: None, lambda: now[0])
    assert done == {}


def test_a_child_says_where_it_ended(tmp_path, capsys):
    speak = "import os; print('first', *range(30), os.environ['OF_THE_STEP'], sep='\\n'); raise SystemExit(7)"
    step = Step("speaks", ("python", "-c", speak), {"OF_THE_STEP": "given"})
    assert child(step, 60, tmp_path / "logs") == 7
    said = capsys.readouterr().out
    assert said.endswith("29\ngiven\n\n")
    assert "first" not in said
    assert (tmp_path / "logs" / "speaks.txt").read_text().startswith("first\n0\n")


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_a_child_out_of_time_is_ended_with_what_it_started(tmp_path):
    grandchild = tmp_path / "grandchild"
    inner = f"import os, pathlib, time; pathlib.Path({str(grandchild)!r}).write_text(str(os.getpid())); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"

    wait = subprocess.Popen.wait

    def patient(self, timeout=None):
        """Its time ends when the grandchild runs, however slow this machine is."""
        if timeout is None:
            return wait(self)
        while not (grandchild.exists() and grandchild.read_text()):
            time.sleep(0.05)
        raise subprocess.TimeoutExpired(self.args, timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", patient)
        assert child(Step("slow", ("python", "-c", outer)), 1, tmp_path) is None
    pid = int(grandchild.read_text())
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        pytest.fail("the grandchild still runs")


def test_a_timed_child_leaves_room_for_its_last_case(tmp_path):
    show = Step("show", ("python", "-c", "import sys; print(sys.argv[1:])"), timed=True)
    for seconds, minutes in ((600, "9.00"), (40, "0.50")):
        assert child(show, seconds, tmp_path) == 0
        assert (tmp_path / "show.txt").read_text() == f"['--minutes', '{minutes}']\n"


def test_the_steps_in_order():
    found = steps(Path("out"), tests=True, sanitizer=True)
    names = [step.name for step in found]
    assert len(set(names)) == len(names)
    first = [next(i for i, name in enumerate(names) if name.startswith(kind)) for kind in (
        "tests-", "memcheck", "autotune", "kernels-sparse", "blocks-"
    )]  # fmt: skip
    assert first == sorted(first)
    assert {f"kernels-{section}" for section in SECTIONS if section != "cpu"} < set(names)
    bare = [step.name for step in steps(Path("out"), tests=False, sanitizer=True)]
    assert bare == names[first[2] :]


@pytest.mark.parametrize("name", ["kernels-sparse", "blocks-wan-14b-480p-radial", "autotune"])
def test_a_step_is_understood_by_what_it_calls(name):
    """Without a GPU each says that it needs one, which it does after it has read its arguments."""
    step = next(step for step in steps(Path("out"), tests=False, sanitizer=False) if step.name == name)
    command = [sys.executable, *step.command[1:], *(("--minutes", "1") if step.timed else ())]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "CUDA device" in ended.stderr


def test_the_parts_of_the_tests_hold_every_test_once():
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "tests/kernels"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ids = [line for line in ended.stdout.splitlines() if "::" in line]
    assert len(ids) > 300
    for one in ids:
        # -k looks anywhere in a name: of the head dims there, one at most, and that of the test's own parameter.
        dims = {int(dim) for dim in re.findall(r"(?<![a-z])d(\d+)", one)}
        assert [dim for dim in gpu.DIMS if f"d{dim}" in one] == [*dims]
        assert len(dims) <= 1
    assert max(sum(f"d{dim}" in one for one in ids) for dim in gpu.DIMS) < len(ids) / 3


def test_every_gpu_test_is_where_the_steps_look():
    mark = re.compile(r"^(@|pytestmark = )pytest\.mark\.gpu", re.M)
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if mark.search(path.read_text())]
    assert len(marked) >= 4
    assert all(path.is_relative_to(ROOT / "tests" / "kernels") for path in marked)


def test_the_list_needs_no_gpu(capsys):
    assert gpu.main(["--list", "-o", "there"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "python -m dit_accel.eval.kernels --section sparse -o there/kernels-sparse.json" in lines


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert gpu.main(["-o", str(tmp_path)]) == 2
    assert "needs a CUDA device; --list prints its commands" in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A GPU and two stub steps. ``codes``: what they exit with."""
    import torch

    codes = {"one": 0, "two": 0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "gpus", lambda: {"0": "A GPU"})
    monkeypatch.setattr(gpu, "steps", lambda out, **how: [
        Step(name, ("python", "-c", f"raise SystemExit({code})")) for name, code in codes.items()
    ])  # fmt: skip
    return codes


def test_the_command_goes_on_until_all_is_done(pretended, tmp_path, capsys):
    pretended["two"] = 4
    call = ["-o", str(tmp_path / "new")]
    assert gpu.main(call) == 1
    assert "done: 1 of 2; failed: two" in capsys.readouterr().out
    assert gpu.main([*call, "--minutes", "0"]) == 1
    assert "the time ended first; the same command goes on" in capsys.readouterr().out
    pretended["two"] = 0
    assert gpu.main(call) == 0
    said = capsys.readouterr().out
    assert "[2/2]" in said
    assert "[1/2]" not in said
    assert json.loads((tmp_path / "new" / "gpu.json").read_text())["done"]["two"]["code"] == 0


def test_another_gpus_record_is_refused(pretended, tmp_path, monkeypatch, capsys):
    assert gpu.main(["-o", str(tmp_path)]) == 0
    monkeypatch.setattr(environment, "gpus", lambda: {"0": "Another"})
    assert gpu.main(["-o", str(tmp_path)]) == 2
    assert "name another folder with -o" in capsys.readouterr().err
    with pytest.raises(UsageError):
        opened(tmp_path / "gpu.json", {})
