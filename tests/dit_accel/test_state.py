import pytest
import torch

from dit_accel import GNA, AdaSpa, Layout, Pisa, Pyramid, Radial, Rectified, VMoBA, attend
from dit_accel.kernels import BlockList
from dit_accel.state import State
from dit_accel.step import Step


def test_a_plan_is_built_once_per_key():
    state, built = State(), []
    for key in ("a", "b", "a"):
        state.plan(key, lambda key=key: built.append(key))
    assert built == ["a", "b"]


def test_slots_are_apart_by_run_branch_and_layer():
    state = State()
    state.slot(Step(run=0, branch="cond"), 3)["map"] = 1
    assert state.slot(Step(run=0, branch="cond", index=9), 3) == {"map": 1}
    assert state.slot(Step(run=0, branch="uncond"), 3) == {}
    assert state.slot(Step(run=1, branch="cond"), 3) == {}
    assert state.slot(Step(run=0, branch="cond"), 4) == {}


def test_bytes_are_told_by_layer():
    state = State()
    state.slot(Step(branch="cond"), 2)["lse"] = torch.zeros(3, 5)
    state.slot(Step(branch="uncond"), 2)["lse"] = torch.zeros(2, dtype=torch.int16)
    state.slot(Step(), 4)["lists"] = BlockList.from_mask(torch.ones(1, 1, 2, 3, dtype=torch.bool))
    state.slot(Step(), 5)["seen"] = 7
    assert state.bytes() == {2: 3 * 5 * 4 + 2 * 2, 4: (2 + 2 * 3) * 4, 5: 0}
    state.close_run(0)
    assert state.bytes() == {}


def test_closing_a_run_forgets_it_and_earlier_ones():
    state = State()
    for run in range(3):
        state.slot(Step(run=run), 0)["seen"] = run
    state.close_run(1)
    assert len(state) == 1
    assert state.slot(Step(run=2), 0) == {"seen": 2}


@pytest.mark.parametrize(
    "method",
    [
        Radial(block_size=16), GNA((3, 3, 3)), AdaSpa(block_size=16, density=0.4), VMoBA(),
        Pisa(block_size=16, density=0.3), Rectified(block_size=16, density=0.3),
        Pyramid(block_q=16, block_k=16, tile=8),
    ],
    ids=lambda method: method.name,
)  # fmt: skip
def test_what_a_render_in_inference_mode_kept_serves_training(method):
    # A layout that no other test uses: some tables are kept for all states.
    layout, state = Layout((3, 4, 7), text=11), State()
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0))
    how = {"layout": layout, "backend": "gather"}
    with torch.inference_mode():
        attend(q, k, v, method, state=state, step=Step(5, 10), **how)
    q.requires_grad_()
    attend(q, k, v, method, state=state, step=Step(6, 10), **how).sum().backward()
    assert q.grad.abs().sum() > 0
