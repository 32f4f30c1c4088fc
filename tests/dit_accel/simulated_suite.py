"""Every method on a simulated CUDA device: what a call waits for. Run by test_simulated.py with TRITON_INTERPRET=1 set.

The first call of a shape may fill caches. A later one, of another run with tensors of its own, must leave the host and
the device apart: no value read, no copy to the device (which waits for pageable memory and which a CUDA graph refuses).
"""

import contextlib
import warnings
from types import SimpleNamespace

import emulator
import pytest
import torch
from paro_plans import plan_file
from simulated_cuda import simulated

from dit_accel import (
    AdaSpa,
    Clear,
    Guard,
    Paro,
    Pisa,
    Pyramid,
    Quant,
    Radial,
    RandomBlocks,
    Rectified,
    Step,
    VMoBA,
    attend,
    plan,
)
from dit_accel.diffusers.stats import Stats
from dit_accel.diffusers.tracker import StepTracker
from dit_accel.diffusers.watch import Ran, Watch
from dit_accel.layout import Layout
from dit_accel.methods import GNA, REGISTRY, Method
from dit_accel.state import State

emulator.speed_up()
torch.set_num_threads(1)

TEXT = 5
GRID = {"clear": (1, 6, 8), "clear-pool": (1, 8, 8)}
PYRAMID = {"block_q": 16, "block_k": 16, "tile": 8}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    METHODS = {
        "dense": None,
        "radial": Radial(block_size=16),
        "gna": GNA((3, 3, 3)),
        "gna-strided": GNA((3, 3, 3), stride=(1, 2, 3)),
        "clear": Clear(radius=3),
        "clear-pool": Clear(radius=3, pool=2),
        "paro": "a plan file",
        "random": RandomBlocks(density=0.4, block_size=16),
        "adaspa": AdaSpa(block_size=16, density=0.4),
        "vmoba": VMoBA(),
        "vmoba-threshold": VMoBA(select="threshold"),
        "vmoba-block": VMoBA(granularity="block"),
        "pisa": Pisa(density=0.3, block_size=16),
        "pisa-zeroth": Pisa(density=0.3, block_size=16, order="zeroth"),
        "pisa-bias": Pisa(density=0.3, block_size=16, norm_bias=True, tile=None),
        "rectified": Rectified(density=0.3, block_size=16),
        "pyramid": Pyramid(**PYRAMID),
        "pyramid-threshold": Pyramid(**PYRAMID, mode="threshold", similarity=(0.7, 0.65, 0.6)),
    }
# Text, whether its end is padding, and quantisation. Quantised products are the slowest to interpret.
SHAPES = {
    "alone": ({}, False, None),
    "text": ({"text": TEXT}, True, "sage2"),
    "text-first": ({"text": TEXT, "text_first": True}, False, None),
}
# Blocks differ between tiers, and with them how a quantised weight rounds.
NEAR = {None: 1e-5, "sage2": 0.05}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name and layout -> method."""

    def make(name, layout):
        if name != "paro":
            return METHODS[name]
        file, _ = plan_file(tmp_path_factory.mktemp("paro") / "plan", layout, heads=2, head_dim=16, block=16)
        return Paro(str(file))

    return make


def tensors(layout, seed, count=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, layout.tokens, 2, 16, generator=g).transpose(1, 2) for _ in range(count)]


def events_of(log):
    return "\n".join(f"{times} x {' '.join(what)}" for what, times in log.events.items())


# Variants of a method run the shape that asks most of them; the cells of a pooled Clear take no small grid with text.
CASES = [(name, shape) for name in METHODS for shape in SHAPES if "-" not in name or shape == "text"]
CASES = [(name, "alone" if name == "clear-pool" else shape) for name, shape in CASES]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_later_call_waits_for_nothing(name, shape, made):
    text, padded, quant = SHAPES[shape]
    layout = Layout(GRID.get(name, (3, 3, 5)), **text)
    method, qkv, valid = made(name, layout), tensors(layout, 1), None
    if padded:
        valid = torch.tensor([layout.tokens - 2], dtype=torch.int32)
    first, again = Step(5, 10), Step(6, 10, run=1)
    how = {"layout": layout, "quant": quant}
    expected = attend(*qkv, method, kv_valid=valid, step=again, state=State(), backend="reference", **how)
    with simulated() as log:
        how |= {"kv_valid": None if valid is None else valid.to("cuda"), "state": State()}
        attend(*(x.to("cuda") for x in tensors(layout, 0)), method, step=first, **how)
        qkv = [x.to("cuda") for x in qkv]
        with log.recording():
            out = attend(*qkv, method, step=again, **how)
            if name == "adaspa":  # once more, with the maps that it kept
                attend(*qkv, method, step=again, **how)
    assert not log.events, events_of(log)
    assert out.device.type == "cuda"
    assert log.launches or name == "dense", "Triton's tier did not run"
    error = (out.held - expected).norm() / expected.norm()
    assert error < NEAR[quant], error


def test_every_method_is_here():
    names = {"paro", *(method.name for method in METHODS.values() if isinstance(method, Method))}
    # One watches dense attention for a calibration; one is another way to say dense, which quantised "dense" runs.
    assert names == REGISTRY.keys() - {"observe", "all-blocks"}


def test_heads_of_4_and_8_bits_wait_for_nothing():
    layout, quant = Layout((3, 3, 5)), Quant(qk="int8", head_bits=(4, 8))
    qkv, how = tensors(layout, 0), {"layout": layout, "quant": quant}
    expected = attend(*qkv, METHODS["random"], backend="reference", **how)
    with simulated() as log:
        qkv, state = [x.to("cuda") for x in qkv], State()
        attend(*qkv, METHODS["random"], state=state, **how)
        with log.recording():
            out = attend(*qkv, METHODS["random"], state=state, **how)
    assert not log.events, events_of(log)
    assert log.launches
    error = (out.held - expected).norm() / expected.norm()
    assert error < NEAR["sage2"], error


def test_a_forward_reads_its_step_once_per_tensor_and_a_schedule_once_per_run():
    with simulated() as log:
        timesteps = torch.tensor([9.0, 5.0], device="cuda")
        scheduler = SimpleNamespace(timesteps=timesteps, sigmas=timesteps / 10, step_index=0)
        told, counted = StepTracker(lambda: scheduler), StepTracker()
        for index in range(2):
            scheduler.step_index = index
            timestep = timesteps[index].expand(2)
            with log.recording():
                steps = [tracker.poll(timestep) for tracker in (told, told, counted, counted)]
            assert [(step.index, step.total) for step in steps] == [(index, 2)] * 2 + [(index, None)] * 2
            assert steps[0].sigma == pytest.approx((0.9, 0.5)[index])
    assert all(kind == "sync" for kind, *_ in log.events), events_of(log)
    assert sum(log.events.values()) == 2 + 2, events_of(log)


@pytest.mark.parametrize("name", ["gna", "pisa", "rectified", "pyramid"])
def test_the_guard_looks_without_waiting_and_reads_once(name):
    layout, guard = Layout((3, 3, 5), text=TEXT), Guard(drift=True, budget=100.0, rate=1.0, rows=4)
    with simulated() as log:
        q, k, v = (x.to("cuda") for x in tensors(layout, 0))
        valid = torch.tensor([layout.tokens - 2], dtype=torch.int32).to("cuda")
        made = plan(q, k, v, METHODS[name], layout=layout, kv_valid=valid, step=Step(5, 10))
        watch = Watch(guard, Stats([("blocks.0", "self")]), lambda message: None)
        for again in range(2):
            ran = Ran(q, k, v, v.clone(), made, None, valid, None)
            with log.recording() if again else contextlib.nullcontext():
                assert watch.look(0, Step(5, 10), ran)
        assert not log.events, events_of(log)
        with log.recording():
            assert watch.read() == {0: "fault"}
    assert [kind for kind, *_ in log.events] == ["sync"], events_of(log)
    assert sum(log.events.values()) == 1, events_of(log)


PLANTED = {
    "item": ("sync", lambda x, host: x.sum().item()),
    "bool": ("sync", lambda x, host: bool(x.any())),
    "float": ("sync", lambda x, host: float(x.max())),
    "tolist": ("sync", lambda x, host: x.tolist()),
    "to-host": ("sync", lambda x, host: x.cpu()),
    "mask-index": ("sync", lambda x, host: x[x > 0]),
    "mask-assigned": ("sync", lambda x, host: x.__setitem__(x[0] > 0, x + 1)),
    "nonzero": ("sync", lambda x, host: torch.where(x > 0)),
    "inside-another": ("sync", lambda x, host: torch.nn.functional.one_hot(x[0].long())),
    "to-device": ("copy", lambda x, host: host.to("cuda")),
    "to-another": ("copy", lambda x, host: host.to(x)),
    "list": ("copy", lambda x, host: torch.tensor([1, 2], device="cuda")),
    "host-index": ("copy", lambda x, host: x[torch.tensor([0])]),
    "list-index": ("copy", lambda x, host: x[[0]]),
    "written": ("copy", lambda x, host: x.copy_(host)),
    "assigned": ("copy", lambda x, host: x.__setitem__(0, host[0])),
    "two-devices": ("mixed", lambda x, host: x + host),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_simulation_catches(what):
    kind, planted = PLANTED[what]
    host = torch.ones(4, 4)
    with simulated() as log:
        x = host.to("cuda")
        assert not log.events
        with log.recording():
            planted(x, host)
    assert {event[0] for event in log.events} == {kind}


def test_the_simulation_lets_pass_what_waits_for_nothing():
    host = torch.arange(12.0).view(3, 4) - 5
    expected = torch.relu(host).mT.contiguous() @ host
    expected[0] = 1.5
    expected[expected < 0] = 0.0
    with simulated() as log:
        x = host.to("cuda")
        with log.recording():
            out = torch.relu(x).mT.contiguous() @ x.to("cuda")
            out[0] = 1.5
            out[out < 0] = 0.0
            out += torch.zeros(4, device=x.device).long()[torch.arange(4, device="cuda")]
    assert not log.events
    assert torch.equal(out.held, expected)
