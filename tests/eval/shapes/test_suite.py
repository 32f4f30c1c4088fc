import pytest

from dit_accel.errors import UsageError
from dit_accel.eval.shapes.suite import difference_table, prompts, summarize, table
from dit_accel.pipelines.mini.captions import parse


def test_bundled_lists_follow_the_grammar():
    assert len(prompts("mini-12")) == 12
    assert len(set(prompts("shapes-120"))) == 120
    for name in ("prompt", "mini-12", "shapes-120"):
        for text in prompts(name):
            parse(text)


def test_unknown_list_names_the_bundled_ones():
    with pytest.raises(UsageError, match="mini-12"):
        prompts("nothing")


def test_a_file_is_read_as_for_rendering(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbf# a comment\r\na red circle\r\n\r\na blue square\r\n")
    assert prompts(str(path)) == ["a red circle", "a blue square"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no prompts in"),
        (b"# nothing\n", "no prompts in"),
        (b"\xff\xfea\x00", "is not UTF-8"),
        (b'a red circle\n{"prompt": "a blue square", "seed": 7}\n', "line 2 sets more than the prompt"),
    ],
)
def test_a_file_that_will_not_do_is_refused(content, told, tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=told):
        prompts(str(path))


def test_unstated_dimensions_are_left_out():
    rows = [
        {"prompt": "a", "scores": {"color": 1.0, "relation": None}},
        {"prompt": "b", "scores": {"color": 0.0, "relation": 0.5}},
    ]
    summary = summarize(rows, ("color", "relation"))
    assert summary["dimensions"]["relation"]["videos"] == 1
    assert summary["dimensions"]["color"]["mean"] == 0.5
    assert table(summary).splitlines()[2] == "| color | 0.500 | no interval: 1.000, 0.000 | 50% | 2 |"


def test_differences_read_as_signed_numbers():
    paired = {"color": {"mean": -0.02, "low": -0.1, "high": 0.05, "videos": 9},
              "psnr": {"mean": 30.0, "low": 28.0, "high": 33.0, "videos": 9}}  # fmt: skip
    assert "| color | -0.020 | -0.100 to +0.050 | 9 |" in difference_table(paired)
    assert "| PSNR, dB | 30.00 | 28.00 to 33.00 | 9 |" in difference_table(paired)
