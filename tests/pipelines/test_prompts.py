import pytest

from dit_accel.errors import UsageError
from dit_accel.pipelines.prompts import Prompt, parse_size, read_prompts, slug


@pytest.fixture
def write(tmp_path):
    def make(content):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def test_comments_blanks_and_the_byte_order_mark_are_left_out(write):
    path = write(b"\xef\xbb\xbfa red circle\r\n\r\n# no\n  a blue square  \n\t\n")
    assert read_prompts(path) == [Prompt("a red circle", 1), Prompt("a blue square", 4)]


def test_a_mark_before_a_comment_does_not_make_it_a_prompt(write):
    assert [p.text for p in read_prompts(write(b"\xef\xbb\xbf# first\nx"))] == ["x"]


def test_rare_line_separators_belong_to_the_prompt(write):
    assert len(read_prompts(write("one\u2028still one\x0bone\ntwo"))) == 2


def test_json_lines_set_more_and_mix_with_text(write):
    path = write(
        'plain\n{"prompt": "x", "seed": 7, "size": "32x48", "frames": 9, "negative_prompt": "n", "guidance": 3, '
        '"num_inference_steps": 4}\n{"prompt": "y", "width": 64, "height": 16, "image": "a.png"}\n'
    )
    assert read_prompts(path) == [
        Prompt("plain", 1),
        Prompt("x", 2, negative="n", seed=7, size=(32, 48), frames=9, steps=4, guidance=3.0),
        Prompt("y", 3, size=(64, 16), image="a.png"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts in .*prompts.txt"),
        ("# only\n\n", "no prompts in"),
        ('a\n{"prompt": }', "line 2 starts like JSON"),
        ('{"prompt": "x", "sed": 1}', "unknown key 'sed'; allowed: .*seed"),
        ('{"seed": 1}', 'needs a "prompt"'),
        ('{"prompt": "  "}', 'needs a "prompt"'),
        ('{"prompt": "x", "seed": "7"}', 'seed must be int; got "7"'),
        ('{"prompt": "x", "seed": true}', "seed must be int; got true"),
        ('{"prompt": "x", "frames": 9.0}', "frames must be int"),
        ('{"prompt": "x", "guidance": NaN}', "guidance must be float"),
        ('{"prompt": "x", "width": 8}', '"width" and "height" together'),
        ('{"prompt": "x", "size": "big"}', "WIDTHxHEIGHT"),
        (b"\xff\xfea", "not UTF-8"),
    ],
)
def test_errors_name_the_file_and_what_to_do(write, content, message):
    with pytest.raises(UsageError, match=message):
        read_prompts(write(content))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="no prompt file at"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="cannot read the prompt file"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(("text", "size"), [("832x480", (832, 480)), (" 8 X 6 ", (8, 6)), ("16×32", (16, 32))])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "832", "0x8", "8x", "-8x8", "8x8x8", "axb"])
def test_what_is_not_a_size(text):
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_slugs_are_safe_short_and_never_empty():
    assert slug("A red  circle, moving/right!") == "a-red-circle-moving-right"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("?!") == "prompt"
    assert slug("Ein größerer Würfel") == "ein-größerer-würfel"
    assert slug("红色的圆") == "红色的圆"
    long = slug("word " * 40)
    assert len(long) <= 48
    assert long.endswith("word")
    assert len(slug("圆" * 200).encode()) <= 144
