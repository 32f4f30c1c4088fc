"""Context parallelism: several processes give what one gives, with the same mask, whatever the order of the tokens."""

from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from dit_accel import AllBlocksProcessor, Layout, RandomBlocksProcessor, Schedule, State
from dit_accel.diffusers import engines, ops
from dit_accel.diffusers.parallel import Refused, Ulysses, _order, _parts

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}


def shared(rank, jobs):
    """Every job on this rank: output, counters, what the engine saw. Runs in a process of its own."""
    return [_one(torch.distributed.get_world_size(), **job) for job in jobs]


def alone(jobs):
    return [_one(1, **job) for job in jobs]


def _one(ranks, family, processor, steps=2, poison=None, anything=False, padded=False, compiled=False):
    from diffusers import ContextParallelConfig

    from tiny_models import tiny_transformer

    model, call = _even(*tiny_transformer(family)[:2])
    if padded:
        call["encoder_hidden_states_mask"] = torch.arange(8)[None] < torch.tensor([[5], [8]])
    model.set_attn_processor(processor)
    (engine,) = engines(model)
    if ranks > 1:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=anything))
    if compiled:
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="eager")
    if poison is not None:
        _poison(engine, *poison)
    with torch.no_grad():
        for step in range(steps):
            timestep = call["timestep"] * (1 - 0.3 * step)
            (out,) = model(**{**call, "timestep": timestep.to(call["timestep"].dtype)}, return_dict=False)
    return {
        "out": out.numpy(), "sparse": engine.stats.sparse, "dense": engine.stats.dense,
        "layout": str(engine.forward.layout), "warnings": engine.stats.warnings,
        "density": engine.stats.effective_density, "events": engine.stats.guard_events,
        "repeats": engine.stats.repeats,
    }  # fmt: skip


def _even(model, call):
    """Sizes that four ranks can share evenly; four heads."""
    torch.manual_seed(7)
    cls, config = type(model), dict(model.config)
    config["num_attention_heads"] = 4
    model = cls.from_config(config).eval()
    if cls.__name__.startswith("Wan"):
        call["hidden_states"] = torch.randn(2, 4, 3, 8, 12)
    else:
        grid = (8, 10)
        call["hidden_states"] = torch.randn(2, 80, model.config.in_channels)
        call["encoder_hidden_states"] = torch.randn(2, 8, 16)
        if "img_ids" in call:
            call["img_ids"] = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(10.0))
            call["txt_ids"] = torch.zeros(8, 3)
        if "img_shapes" in call:
            call["img_shapes"] = [[(1, *grid)]] * 2
    return model, call


def _poison(engine, rank, layer):
    """Output of one layer on one rank is NaN."""
    from dit_accel.diffusers import engine as module

    if torch.distributed.is_initialized() and torch.distributed.get_rank() != rank:
        return
    stock, attend = module.Engine._sparse, module.attend
    current = []
    module.Engine._sparse = lambda self, i, *a: current.append(i) or stock(self, i, *a)
    module.attend = lambda *a, **k: attend(*a, **k) * (torch.nan if current[-1] == layer else 1)


def compare(jobs, ranks):
    expected = alone(jobs)
    for found in run_ranks(shared, ranks, jobs):
        for job, mine, one in zip(jobs, found, expected, strict=True):
            assert abs(mine["out"] - one["out"]).max() < 1e-5, job
            assert mine["layout"] == one["layout"]
            assert mine["sparse"] == one["sparse"] > 0
            assert mine["dense"] == one["dense"]
            assert mine["density"] == pytest.approx(one["density"])
    return expected


RANDOM = RandomBlocksProcessor(seed=3, density=0.4, backend="gather", block_size=16, schedule=Schedule(first=1))


def test_two_processes_equal_one():
    """Wan comes back in sequence; Flux does not, and a mask in the wrong order would show, as would dead keys."""
    jobs = [{"family": family, "processor": RANDOM} for family in ("wan", "flux")]
    compare([*jobs, {"family": "qwen-image", "processor": RANDOM, "padded": True}], ranks=2)
    dense, sparse = alone([{"family": "flux", "processor": p} for p in (AllBlocksProcessor(**SPARSE), RANDOM)])
    assert abs(dense["out"] - sparse["out"]).max() > 1e-3, "the mask must matter"


@pytest.mark.slow
@pytest.mark.parametrize("anything", [False, True], ids=["even", "anything"])
def test_four_processes_equal_one(anything):
    jobs = [
        {"family": family, "processor": processor, "anything": anything}
        for family in ("wan", "flux", "qwen-image") for processor in (RANDOM, AllBlocksProcessor(**SPARSE))
    ]  # fmt: skip
    compare(jobs, ranks=4)


def primitive(**changed):
    degrees = {"ring_degree": 1, "ulysses_degree": 2, "ulysses_anything": False, **changed.pop("degrees", {})}
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(**degrees))
    q = torch.randn(1, 12, changed.pop("heads", 4), 8)
    return ops.Primitive("BSHD", None, q, q, q, extra={"parallel_config": config}, **changed)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (primitive(degrees={"ring_degree": 2}), r"all keys of a head at once; use .*ulysses_degree=2"),
        (primitive(heads=3), "3 query and 3 key heads do not divide among 2 ranks"),
        (primitive(attn_mask=torch.ones(1, 1, 24, 24)), "only a rank's own key mask"),
    ],
    ids=["ring", "heads", "mask"],
)
def test_what_is_refused(call, why):
    with pytest.raises(Refused, match=why):
        Ulysses.of(call)


def test_slices_that_do_not_fit_the_layout_are_refused():
    ulysses = Ulysses(None, 0, 2, False)
    with pytest.raises(Refused, match="expected text and video each split evenly"):
        ulysses.share((20, 20), Layout(grid=(1, 5, 6), text=9), State(), torch.device("cpu"))


def test_without_context_parallelism_there_is_nothing_to_share():
    q = torch.randn(1, 12, 4, 8)
    tensor_parallel = SimpleNamespace(context_parallel_config=None)
    assert Ulysses.of(ops.Primitive("BSHD", None, q, q, q)) is None
    assert Ulysses.of(ops.Primitive("BSHD", None, q, q, q, extra={"parallel_config": tensor_parallel})) is None


@pytest.mark.slow
def test_compiled_blocks():
    """The configuration cannot cross the operator; the engine finds it on its layer.

    Without ``fullgraph``, which diffusers' own splitting hooks do not stand.
    """
    compare([{"family": "wan", "processor": RANDOM, "compiled": True}], ranks=2)


def test_a_fault_on_one_rank_is_repaired_on_all():
    """The repeat of a forward holds collectives: one rank alone would wait for ever."""
    job = {"family": "wan", "processor": AllBlocksProcessor(**SPARSE), "poison": (1, 1)}
    (expected,) = alone([{"family": "wan", "processor": AllBlocksProcessor(**SPARSE)}])
    for (found,) in run_ranks(shared, 2, [job]):
        assert abs(found["out"] - expected["out"]).max() < 1e-5
        assert found["repeats"] == 1
        assert [event["layer"] for event in found["events"]] == [1]


@pytest.mark.parametrize(("text_first", "ranks"), [(True, 2), (False, 4), (True, 3)])
def test_the_gathered_order_of_joint_models(text_first, ranks):
    """Against slices of named tokens."""
    layout = Layout(grid=(2, 3, 5), text=7, text_first=text_first)
    text, video = [f"t{i}" for i in range(7)], [f"v{i}" for i in range(30)]
    parts = (text, video) if text_first else (video, text)
    sequence = parts[0] + parts[1]

    def split(tokens):  # as tensor_split does: the first ones are longer by one
        return [x.tolist() for x in torch.arange(len(tokens)).tensor_split(ranks)]

    gathered = [part[i] for rank in range(ranks) for part in parts for i in split(part)[rank]]
    order, back = _order(_parts(layout, ranks), torch.device("cpu"))
    assert [sequence[i] for i in order] == gathered
    assert [gathered[i] for i in back] == sequence


def test_references_are_split_with_the_video():
    from dit_accel import Segment

    layout = Layout(segments=[Segment("text", 6), Segment("main", (1, 4, 4)), Segment("reference", (1, 3, 4))])
    assert _parts(layout, 2) == [[3, 3], [14, 14]]
    assert _order(_parts(Layout(grid=(2, 3, 4)), 2), torch.device("cpu")) == (None, None)
