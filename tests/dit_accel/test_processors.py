import inspect
import pickle

import pytest

from dit_accel import (
    GNA,
    AdaSpaProcessor,
    GNAProcessor,
    Guard,
    Processor,
    Radial,
    RadialProcessor,
    Schedule,
    UsageError,
)
from dit_accel.methods import REGISTRY, Method, find
from dit_accel.processors import PROCESSORS


def test_parameters_are_the_methods_plus_the_common_ones():
    processor = RadialProcessor(decay=0.5, block_size=64, schedule=Schedule(first=2), backend="gather")
    assert processor.method == Radial(decay=0.5, block_size=64)
    assert processor.schedule == Schedule(first=2)
    assert {"decay", "rule", "schedule", "guard", "backend"} <= set(inspect.signature(RadialProcessor).parameters)


def test_settings_compare_hash_and_pickle():
    one, two = RadialProcessor(decay=0.5), RadialProcessor(decay=0.5)
    assert one == two == pickle.loads(pickle.dumps(one))
    assert len({one, two, RadialProcessor(decay=0.6), RadialProcessor(guard=Guard(False))}) == 3


def test_every_public_method_has_its_processor_and_survives_a_round_trip():
    assert set(PROCESSORS) == set(REGISTRY)
    for name, processor in PROCESSORS.items():
        try:
            method = processor().method
        except UsageError:
            continue
        assert method.name == name
        assert Method.from_dict(method.to_dict()) == method


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dekay": 1}, "no parameter dekay; allowed: decay"), ({"backend": "cuda"}, "auto, reference"),
     ({"on_unsupported": "x"}, "'dense' or 'error'"), ({"quant": "int8"}, "quant")],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        RadialProcessor(**settings)


def test_an_unknown_method_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'radial'"):
        find("radail")


def test_presets_by_name():
    processor = GNAProcessor.preset("hunyuan", dilation=1, schedule=Schedule(first=3))
    assert (processor.method, processor.schedule) == (GNA.preset("hunyuan"), Schedule(first=3))
    assert GNAProcessor.preset("hunyuan").dense_steps(50) == list(range(15))
    with pytest.raises(UsageError, match="Radial has no presets; got 'hunyuan'"):
        RadialProcessor.preset("hunyuan")


def test_the_schedule_and_the_dense_steps_are_the_methods_where_none_is_given():
    assert RadialProcessor().schedule == Processor(None).schedule == Schedule()
    assert RadialProcessor().dense_steps(8) == [0, 1]
    assert Processor(None).dense_steps(3) == [0, 1, 2]
    assert AdaSpaProcessor().schedule == Schedule.none()
    assert AdaSpaProcessor().dense_steps(50) == list(range(10))
    late = AdaSpaProcessor(search_steps=(1,), schedule=Schedule(first=0, last=2))
    assert late.dense_steps(8) == [0, 1, 6, 7]


def test_called_as_a_bare_processor_it_names_the_right_call():
    with pytest.raises(TypeError, match=r"pipe.set_attn_processor"):
        Processor(None)(object(), 1)
