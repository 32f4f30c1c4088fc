"""One job, several processes: who renders what, what a killed one costs, what a rerun does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks

from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.job import Job
from dit_accel.pipelines.prompts import Prompt
from dit_accel.pipelines.render import plan_job, render
from dit_accel.pipelines.shares import Share, launched

SPARSE = Acceleration(method="radial", parameters={"block_size": 4}, backend="gather", dense_steps=1)


def job(folder, out, prompts, **settings):
    texts = tuple(Prompt(text, i) for i, text in enumerate(prompts, 1))
    base = {"model": str(folder), "size": (32, 48), "frames": 5, "steps": 1, "accel": SPARSE, "device": "cpu"}
    return Job(texts, out, **(base | settings))


def rendered(rank, folder, out, prompts, resume):
    """One process of a launch. Returns what it rendered, and what it then knows of all."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    assert launched()
    share = Share(cpu=True)
    plan = plan_job(job(folder, out, prompts, resume=resume))
    own = share.split(plan)
    render(plan, only=own, progress=False)
    share.collect(plan, own)
    statuses = [outcome.status for outcome in plan.outcomes]
    return [o.shot.number for o in own], statuses, all(o.record for o in plan.outcomes), share.is_main


def test_processes_share_what_is_pending_and_all_know_the_whole(tiny_wan, tmp_path):
    out, prompts = tmp_path / "out", ["a", "b", "c", "d", "e"]
    render(plan_job(job(tiny_wan, out, prompts[:2])), progress=False)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    first, second = run_ranks(rendered, 2, tiny_wan, out, prompts, True)
    assert (first[0], second[0]) == ([3, 4], [5])
    assert first[1] == second[1] == ["skipped", "skipped", "done", "done", "done"]
    assert first[2]
    assert (first[3], second[3]) == (True, False)
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items()), "nothing is written twice"
    assert len(list(out.glob("*.mp4"))) == len(list(out.glob("*.json"))) == 5
    first, second = run_ranks(rendered, 2, tiny_wan, out, prompts, True)
    assert (first[0], second[0]) == ([], [])
    assert first[1] == ["skipped"] * 5


def test_a_single_process_is_not_a_launch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launched()


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_loses_one_output_and_a_rerun_completes_the_rest(tiny_wan, tmp_path, kill):
    """The command itself under torch's launcher, which is what `accelerate launch` starts."""
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt number {i}\n" for i in range(8)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dit_accel",
        "render", str(prompts), "--model", str(tiny_wan), "--device", "cpu", "--size", "32x48", "--frames", "9",
        "--steps", "4", "--method", "radial", "--backend", "gather", "--resume", "-o", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while len(list(out.glob("*.json"))) < 2 and time.monotonic() < deadline:
        assert launch.poll() is None, launch.stdout.read()
        time.sleep(0.02)
    os.kill(_children(launch.pid)[1], kill)
    launch.communicate(timeout=120)
    assert launch.returncode != 0
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 2 <= len(finished) < 8, "the launch must have been cut short"
    assert all((out / json.loads(path.read_text())["files"][0]).is_file() for path in finished)

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == moment for path, moment in finished.items())
    assert len(list(out.glob("*.mp4"))) == len(list(out.glob("*.json"))) == 8
    assert not list(out.glob("*.partial"))
    total = f"{8 - len(finished)} rendered, {len(finished)} skipped (finished)"
    assert again.stdout.count(total) == 1, "one summary, of all processes"


def _children(pid):
    """Process ids of the launcher's workers, by age."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
