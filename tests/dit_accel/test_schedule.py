import pytest

from dit_accel.errors import UsageError
from dit_accel.schedule import Schedule
from dit_accel.step import Step


def dense(schedule, total, layer=5):
    return [i for i in range(total) if schedule.is_dense(Step(index=i, total=total), layer)]


def test_first_and_last_as_counts_and_fractions():
    assert dense(Schedule(first=2, last=1), 8) == [0, 1, 7]
    assert dense(Schedule(first=0.25), 50) == list(range(13))
    assert dense(Schedule(first=1.0), 4) == [0, 1, 2, 3]
    assert dense(Schedule.none(), 8) == []


def test_layers_steps_and_table():
    schedule = Schedule(first=0, layers=2, steps={3}, table={(5, 7)})
    assert [layer for layer in range(9) if schedule.is_dense(Step(index=1, total=8), layer)] == [0, 1]
    assert [layer for layer in range(9) if schedule.is_dense(Step(index=5, total=8), layer)] == [0, 1, 7]
    assert schedule.is_dense(Step(index=3, total=8), 8)
    assert Schedule(first=0, layers={4}).is_dense(Step(), 4)
    assert schedule.dense_steps(8) == [3]


def test_unknown_total_counts_fractions_as_zero():
    assert not Schedule(first=0.5, last=2).is_dense(Step(index=0, total=None), 0)
    assert Schedule(first=1).is_dense(Step(index=0, total=None), 0)


def test_round_trip_and_hash():
    schedule = Schedule(first=3, last=0.1, layers={1, 4}, table={(0, 1)})
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert hash(schedule) == hash(Schedule.from_dict(schedule.to_dict()))


@pytest.mark.parametrize("arguments", [{"first": -1}, {"first": 1.5}, {"last": -0.1}, {"layers": -2}])
def test_bad_schedules(arguments):
    with pytest.raises(UsageError):
        Schedule(**arguments)
