import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.pipelines.streaming import Steps, noise_of


def test_self_forcings_levels():
    assert Steps().sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625))
    assert Steps().forwards == 5
    rolling = Steps((1000, 800, 600, 400, 200))
    assert [1000 * s for s in rolling.sigmas] == pytest.approx([1000, 952.38, 882.35, 769.23, 555.56], abs=0.005)
    assert Steps.even(5).times == rolling.times


def test_noise_depends_on_chunk_and_step_alone():
    shape = (1, 2, 3, 4, 5)
    torch.manual_seed(0)
    first = noise_of(7, 2, 1, shape)
    noise_of(7, 0, 0, (100,))
    assert torch.equal(noise_of(7, 2, 1, shape), first)
    others = [noise_of(*key, shape) for key in ((7, 1, 2), (7, 2, 0), (8, 2, 1), (-7, 2, 1))]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": (500, 1000)}, "fall from 1000"),
        ({"times": ()}, "fall from 1000"),
        ({"times": (1000, 1000)}, "fall from 1000"),
        ({"shift": 0}, "shift is a positive factor; got 0"),
        ({"context_time": 1000}, "context_time is a time.*got 1000"),
        ({"renoise": "old"}, "'old'; choose one of fresh, predicted"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Steps(**settings)
