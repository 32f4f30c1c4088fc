import pytest

from dit_accel.errors import UsageError
from dit_accel.eval.tune.budget import Budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("psnr>=28", Budget("psnr", 28)),
        (" PSNR >= 28.5 dB", Budget("psnr", 28.5)),
        ("speed>=1.6", Budget("speed", 1.6)),
        ("speed>=2x", Budget("speed", 2)),
    ],
)
def test_budgets(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "28", "psnr", "psnr=28", "psnr>28", "ssim>=0.9", "psnr>=nan", "psnr>=-3"])
def test_what_is_no_budget_is_told_what_is(text):
    with pytest.raises(UsageError, match=r"psnr>=DB and speed>=FACTOR"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["psnr>=100", "psnr>=0", "speed>=1", "speed>=0.5"])
def test_a_budget_out_of_range(text):
    with pytest.raises(UsageError, match="cannot be"):
        Budget.parse(text)
