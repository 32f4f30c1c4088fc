import time

import pytest
import torch

from dit_accel.pipelines.phases import Clock, timed


class Bar:
    def __init__(self, total=None):
        self.total, self.updates = total, 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def update(self, n=1):
        self.updates += n


class Vae(torch.nn.Module):
    def decode(self, x):
        time.sleep(0.02)
        return x + 1


class Pipe:
    def __init__(self):
        self.vae = Vae()

    def encode_prompt(self, text):
        time.sleep(0.01)
        return len(text)

    def progress_bar(self, total=None):
        return Bar(total)

    def __call__(self):
        n = self.encode_prompt("four")
        with self.progress_bar(total=n) as bar:
            for _ in range(n):
                time.sleep(0.005)
                bar.update()
        assert bar.updates == n
        return self.vae.decode(torch.tensor(1))


@pytest.fixture
def clock():
    return Clock(torch.device("cpu"))


def test_phases_are_told_apart_and_the_result_is_the_same(clock):
    pipe = Pipe()
    start = time.perf_counter()
    with timed(pipe, clock):
        assert pipe() == 2
    total = time.perf_counter() - start
    assert set(clock.seconds) == {"text", "loop", "vae"}
    assert clock.seconds["text"] >= 0.01
    assert clock.seconds["loop"] >= 0.02
    assert clock.seconds["vae"] >= 0.02
    assert sum(clock.seconds.values()) <= total


def test_the_pipeline_is_as_before_also_after_an_error(clock):
    pipe = Pipe()
    before = dict(vars(pipe)), set(vars(pipe.vae))

    def stop():
        with timed(pipe, clock):
            pipe.encode_prompt("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert (dict(vars(pipe)), set(vars(pipe.vae))) == before
    assert set(clock.seconds) == {"text"}


def test_an_instances_own_override_comes_back(clock):
    pipe = Pipe()
    pipe.encode_prompt = own = lambda text: 1
    with timed(pipe, clock):
        pipe()
    assert pipe.encode_prompt is own


def test_a_pipeline_without_a_vae(clock):
    pipe = Pipe()
    del pipe.vae
    with timed(pipe, clock):
        pipe.encode_prompt("x")
    assert set(clock.seconds) == {"text"}
