import pytest

from dit_accel.errors import UsageError
from dit_accel.eval.features import main, recorded, table

CASE = '<testcase name="{0}"><properties>{1}</properties>{2}</testcase>'


def write(path, *cases):
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def case(name, feature=None, model=None, result=None, inside=""):
    values = {"feature": feature, "model": model, "result": result}
    properties = "".join(f'<property name="{k}" value="{v}" />' for k, v in values.items() if v)
    return CASE.format(name, properties, inside)


def test_one_line_per_feature_and_one_column_per_model(tmp_path):
    report = write(
        tmp_path / "r.xml", case("a", "LoRA", "Wan", "equal"), case("b"), case("c", "LoRA", "Flux", "equal, 4 calls"),
        case("d", "compile", "Flux", "equal"),
    )  # fmt: skip
    assert table(recorded(report)).splitlines() == [
        "| feature | Wan | Flux |",
        "| --- | --- | --- |",
        "| LoRA | equal | equal, 4 calls |",
        "| compile |  | equal |",
    ]  # fmt: skip


def test_a_report_with_a_failure_makes_no_table(tmp_path, capsys):
    report = write(tmp_path / "r.xml", case("a", "LoRA", "Wan", "equal"), case("b", inside="<failure />"))
    assert main([str(report)]) == 2
    assert "1 failed tests (b)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "not xml", "<testsuites></testsuites>"])
def test_what_is_no_report(tmp_path, text):
    (tmp_path / "r.xml").write_text(text)
    with pytest.raises(UsageError):
        recorded(tmp_path / "r.xml")
