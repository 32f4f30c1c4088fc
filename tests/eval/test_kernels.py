"""The kernel benchmark: order, continuation, arithmetic, one tiny real row."""

import pytest

from dit_accel.eval.kernels import Case, cases, fraction, markdown, measure, run


def test_fraction_of_the_limit():
    assert fraction(dense=10.0, sparse=2.0, density=0.2) == pytest.approx(1.0)
    assert fraction(dense=10.0, sparse=4.0, density=0.2) == pytest.approx(0.5)


def test_every_length_of_a_density_comes_before_the_next_density():
    found = cases(grids=[(1, 2, 4), (2, 2, 4)], densities=(0.2, 0.5), methods=("radial",))
    assert [(c.density, c.grid[0]) for c in found] == [(0.2, 1), (0.2, 2), (0.5, 1), (0.5, 2)]


def test_a_run_out_of_time_goes_on_where_it_ended():
    todo, seen, rows, now = cases(densities=(0.2,), methods=("radial",)), [], {}, [0.0]

    def one(case):
        seen.append(case.key)
        now[0] += 50
        return {}

    assert not run(todo, rows, 1, one, clock=lambda: now[0])
    assert len(rows) == 2
    assert run(todo, rows, 1, one, clock=lambda: now[0])
    assert seen == [case.key for case in todo]


@pytest.mark.parametrize("method", ["random-blocks", "rectified"])
def test_a_row_names_its_tier_and_follows_from_its_times(method):
    case = Case(method, 0.5, (4, 8, 16), dim=16, heads=1)
    row = measure(case, repeats=1, backend="gather")
    assert (row["tokens"], row["tier"]) == (512, "gather")
    assert 0 < row["kept"] <= 1
    assert row["fraction"] == pytest.approx(row["kept"] * row["seconds"]["dense"] / row["seconds"]["sparse"])
    assert f"| {case.key} | gather |" in markdown({case.key: row})
