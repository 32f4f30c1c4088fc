import pytest

from dit_accel.eval.speed import alternate, amdahl, effective_density, summary


def test_amdahl():
    assert amdahl(0.0, 0.1) == 1.0
    assert amdahl(1.0, 0.25) == 4.0
    assert amdahl(0.65, 0.2) == pytest.approx(1 / (0.35 + 0.13))
    assert amdahl(0.8, 1.0) == pytest.approx(1.0)


def test_dense_steps_count_in_the_effective_density():
    assert effective_density(0.2, 0, 10) == pytest.approx(0.2)
    assert effective_density(0.2, 10, 10) == 1.0
    assert effective_density(0.2, 3, 12) == pytest.approx((3 + 9 * 0.2) / 12)


def test_summary():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "iqr": 2.0, "runs": 3}
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0])["iqr"] == 2.0
    assert summary([4.0]) == {"median": 4.0, "min": 4.0, "iqr": 0.0, "runs": 1}


def test_candidates_take_turns_after_their_warm_up():
    calls = []
    result = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert set(result) == {"a", "b"}
    assert all(r["runs"] == 3 and r["min"] >= 0 for r in result.values())
