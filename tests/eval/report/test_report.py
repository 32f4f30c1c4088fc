"""The report made from real records of a tiny model: complete, escaped, offline, and its numbers are the records'."""

import base64
import json
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dit_accel import QuantProcessor, Schedule
from dit_accel.cli import main
from dit_accel.cli.attention import chosen
from dit_accel.cli.parser import parse
from dit_accel.errors import UsageError
from dit_accel.eval.report import renders, report
from dit_accel.eval.report.sources import gather, render_command
from dit_accel.eval.report.style import SCRIPT
from dit_accel.pipelines.acceleration import choose
from dit_accel.pipelines.model import inspect_model

# A prompt that would break out of text, of attributes and of scripts.
EVIL = 'a red </script><script>alert(1)</script> "ball" \' onerror=alert(2) <img src=http://x.example/p.png> & so'
SHAPES = Path(__file__).parents[3] / "eval" / "results" / "shapes-mini12-radial.json"


class Page(HTMLParser):
    """Elements with attributes and text, and whether every one was closed."""

    VOID = ("meta", "input", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in self.VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]


@pytest.fixture(scope="module")
def runs(tiny_wan, tmp_path_factory):
    """What ``render --compare`` and the judges write, on disk."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": EVIL, "seed": 7}) + "\n")
    small = ["--model", tiny_wan, "--size", "32x48", "--frames", "9", "--steps", "2", "--backend", "gather"]
    method = ["--method", "random-blocks", "--param", "block_size=4", "--dense-steps", "0"]
    assert main([str(w) for w in ("render", prompts, *small, *method, "--compare", "-o", folder / "a", "--quiet",
                                  "--frames-dir", folder / "frames")]) == 0  # fmt: skip
    assert main([str(w) for w in ("render", prompts, *small, "--method", "radial", "--param", "block_size=4",
                                  "-o", folder / "b", "--quiet")]) == 0  # fmt: skip
    assert main([str(w) for w in ("eval", "attention", "--method", "random-blocks:block_size=4", *small,
                                  "-o", folder / "attention.json")]) == 0  # fmt: skip
    shutil.copy(SHAPES, folder / "shapes.json")
    (folder / "other.json").write_text('{"not": "ours"}')
    return folder


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    return report([runs], out), out.read_text(), Page(out.read_text())


def record(runs, name="a"):
    (path,) = (runs / name).glob("*.json")
    return path, json.loads(path.read_text())


def test_every_record_is_there_whole(runs, written):
    found, _, page = written
    assert len(found["sources"]) == 4
    assert [Path(one["file"]).name for one in found["skipped"]] == ["other.json"]
    raw = {e["data-record"]: json.loads(e["text"]) for e in page.all("pre") if "data-record" in e}
    assert raw == {path: json.loads(Path(path).read_text()) for path in found["sources"]}


def test_numbers_are_those_of_the_record(runs, written):
    _, data = record(runs)
    page = written[2]
    cells = [e["text"] for e in page.all("td")]
    compare = data["compare"]
    same, speed = compare["fidelity"], compare["speedup"]
    told = (f"{same['psnr']:.2f}", f"{same['ssim']:.4f}", f"{speed['loop']:.2f}x", f"{compare['bound']:.2f}x")
    for value in (*told, "gather", "random-blocks"):
        assert value in cells
    row = json.loads(SHAPES.read_text())["paired"]["psnr"]
    assert f"PSNR {row['mean']:.2f} dB" in written[1]
    layers = json.loads((runs / "attention.json").read_text())["methods"]["random-blocks:block_size=4"]["layers"]
    assert all(f"{one['rel_l1']:.4f}" in cells for one in layers)


def test_curves_and_maps_hold_every_value(runs, written):
    _, data = record(runs)
    page = written[2]
    same = data["compare"]["fidelity"]
    assert [len(e["points"].split()) for e in page.all("polyline") if e["text"].startswith("random-blocks")] == [
        len(same["psnr_frames"]), len(same["ssim_frames"]),
    ]  # fmt: skip
    heat = json.loads((runs / "attention.json").read_text())["methods"]["random-blocks:block_size=4"]["heat"]["rel_l1"]
    titles = [e["text"] for e in page.all("rect")]
    for layer, row in enumerate(heat):
        for step, value in enumerate(row):
            assert f"layer {layer}, step {step}: {value:.4g}" in titles


def test_text_cannot_break_out(written):
    _, text, page = written
    assert "<script>alert" not in text
    assert len(page.all("script")) == 1
    assert page.all("script")[0]["text"] == SCRIPT
    assert not [name for e in page.elements for name in e if name.startswith("on")]
    assert EVIL in [e["text"].removesuffix(" (seed 7)") for e in page.all("h3")]


def test_nothing_is_asked_of_the_network(written):
    page = written[2]
    addresses = [e[name] for e in page.elements for name in ("src", "href", "srcset", "poster", "action") if name in e]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    (policy,) = [e["content"] for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "url(" not in written[1].split("</style>")[0]


def test_players_hold_the_videos_dense_first(runs, written):
    page = written[2]
    path, data = record(runs)
    videos = page.all("video")
    assert len(videos) == 2
    both = next(path.with_name(name) for name in data["files"] if "dense-vs" in name)
    assert base64.b64decode(videos[0]["src"].partition("base64,")[2]) == both.read_bytes()
    canvases = page.all("canvas")
    assert [e["aria-label"] for e in canvases] == [
        "dense", "random-blocks", "|random-blocks - dense| x 4", "radial", "|radial - dense| x 4",
    ]  # fmt: skip
    assert [e["data-of"] for e in canvases] == ["0,0,0.5", "0,0.5,0.5", "0,0.5,0.5", "1,0,1", "1,0,1"]
    assert [e.get("data-minus") for e in canvases] == [None, None, "0,0,0.5", None, "0,0,0.5"]


def test_too_much_video_is_linked_and_named(runs, tmp_path):
    found = report([runs], tmp_path / "r.html", limit=0)
    assert len(found["linked"]) == 2
    sources = [e["src"] for e in Page((tmp_path / "r.html").read_text()).all("video")]
    assert all((tmp_path / source).resolve().is_file() for source in sources)


def test_commands_render_the_same_again(runs):
    for name in ("a", "b"):
        settings = record(runs, name)[1]["settings"]
        line = render_command(settings, compare=name == "a")
        prompt, _, command = line.partition(" > prompt.jsonl && ")
        assert json.loads(shlex.split(prompt)[1]) == {"prompt": EVIL, "seed": 7}
        args = parse(shlex.split(command)[1:])
        info = inspect_model(args.model)
        again = choose(chosen(args), info, layout=None, frames=args.frames, steps=args.steps)
        assert json.loads(json.dumps(again.processor.to_dict())) == settings["attention"]
        assert (args.size, args.frames, args.steps, args.compare) == ("32x48", 9, 2, name == "a")


def test_what_ran_dense_is_told_with_its_reason(runs, written):
    _, data = record(runs)
    attention = data["attention"]
    assert f"{attention['sparse_calls']} attention calls accelerated; dense: none" in written[1]
    attention["dense_calls"] = {"schedule": 6, "no-history": 2}
    told = renders._calls(attention)
    assert told[1] == "dense: 6 schedule, 2 no-history"


def test_the_command_holds_all_that_shows_in_the_pixels(runs):
    settings = record(runs)[1]["settings"] | {
        "negative_prompt": "a blur", "image": "0123abcd", "dtype": "bfloat16", "fps": 24, "cache": "firstblock=0.1",
        "vae_tiling": True, "lora": [["me/lora=0.8", None], ["me/other", None]], "gif": True,
    }  # fmt: skip
    prompt, _, command = render_command(settings, True, repeats=3, compiled=True).partition(" > prompt.jsonl && ")
    assert json.loads(shlex.split(prompt)[1]) == {
        "prompt": EVIL, "seed": 7, "negative": "a blur", "image": "0123abcd.png",
    }  # fmt: skip
    args = parse(shlex.split(command)[1:])
    assert (args.dtype, args.fps, args.cache, args.vae_tiling, args.gif) == ("bfloat16", 24, "firstblock=0.1", 1, 1)
    assert args.lora == ["me/lora=0.8", "me/other"]
    assert (args.compare, args.repeats, args.compile) == (True, 3, True)


def test_quantised_products_are_part_of_the_command():
    settings = {"prompt": "a", "seed": 1, "frames": 9, "steps": 2}
    for quant in ("auto", "sage2"):
        attention = QuantProcessor(quant, schedule=Schedule(first=0)).to_dict()
        line = render_command({**settings, "attention": attention}, compare=True)
        assert f"--method dense --quant {quant} --dense-steps 0" in line


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "deep" / "r.html"
    assert main(["report", str(runs), "-o", str(out), "--title", "A & B", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["page"] == str(out)
    assert "left out: " in captured.err
    assert Page(out.read_text()).all("h1")[0]["text"] == "A & B"
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "there is nothing at" in capsys.readouterr().err
    assert main(["report", str(runs), "--max-mb", "-1"]) == 2


def test_what_is_no_page_is_not_overwritten(runs, tmp_path):
    path, _ = record(runs)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is no HTML page, so it is kept; give another -o"):
        report([runs], path)
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match=r"is a folder; .*report\.html"):
        report([runs], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        report([runs], tmp_path / "file" / "r.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    for _ in range(2):
        report([runs], tmp_path / "r.html")


def test_methods_of_one_prompt_share_their_axes_and_equal_names_are_told_apart(runs, tmp_path):
    _, data = record(runs)
    for number, density in ((1, 0.25), (2, 0.75)):
        other = json.loads(json.dumps(data))
        other["settings"]["attention"]["method"]["seed"] = number
        other["attention"]["density"] = density
        (tmp_path / f"{number}.json").write_text(json.dumps(other))
    report([tmp_path], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    names = ["random-blocks 0.25 #1", "random-blocks 0.75 #2"]
    assert [e["text"] for e in page.all("h4")] == names
    captions = [e["text"] for e in page.all("figcaption")]
    assert len([text for text in captions if text.startswith("PSNR per frame")]) == 1
    bars = {e["text"].split(",")[0] for e in page.all("rect") if e["text"].endswith(" s")}
    assert bars == {*names, *(f"dense / {name}" for name in names)}
    assert len([text for text in captions if text.startswith("Density by layer and step")]) == 2


def test_records_without_steps_show_their_layers(runs, tmp_path):
    _, data = record(runs)
    for layer in data["attention"]["layers"]:
        del layer["density_steps"], layer["drift_steps"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    report([tmp_path], tmp_path / "r.html")
    titles = [e["text"] for e in Page((tmp_path / "r.html").read_text()).all("rect")]
    for number, layer in enumerate(data["attention"]["layers"]):
        assert f"density, layer {number}: {layer['density']:.4g}" in titles


def test_a_folder_without_records_is_refused(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match="no record of a render or measurement"):
        gather([tmp_path])


NODE = """
const made = {}, drawn = [];
const element = (tag, extra) => Object.assign({tagName: tag, dataset: {}, heard: {},
  addEventListener(name, run) { this.heard[name] = run; }}, extra);
const video = () => element("VIDEO", {videoWidth: 96, videoHeight: 32, duration: 2, currentTime: 0, paused: true,
  play() { this.paused = false; return Promise.resolve(); }, pause() { this.paused = true; }});
const videos = [video(), video()];
const canvas = (of, minus) => element("CANVAS", {dataset: minus ? {of, minus} : {of}, width: 0, height: 0,
  getContext() { const brush = {drawImage: (...a) => drawn.push([brush.globalCompositeOperation, ...a.slice(1)])};
                 return brush; }});
const panels = [canvas("0,0,0.5"), canvas("1,0,1"), canvas("0,0.5,0.5", "0,0,0.5")];
const parts = {".controls button": element("BUTTON"), ".controls input": element("INPUT", {value: 0}),
               ".controls output": element("OUTPUT", {value: ""})};
const player = {classList: {add() {}}, querySelector: s => parts[s],
                querySelectorAll: s => s === "canvas" ? panels : videos};
globalThis.document = {querySelectorAll: () => [player]};
let frames = 0;
globalThis.requestAnimationFrame = run => { if (frames++ < 1) run(); };
SCRIPT
const first = drawn.splice(0);
parts[".controls input"].value = 0.5; parts[".controls input"].heard.input();
const sought = videos.map(v => v.currentTime);
videos[0].currentTime = 1.5;
parts[".controls button"].heard.click();
Promise.resolve().then(() => Promise.resolve()).then(() => setTimeout(() => {
  console.log(JSON.stringify({sizes: panels.map(c => [c.width, c.height]), first, sought,
    playing: videos.map(v => !v.paused), together: videos.map(v => v.currentTime),
    label: parts[".controls button"].textContent, told: parts[".controls output"].value}));
}, 5));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script here; it is not installed")
def test_the_script_keeps_players_in_step():
    """With a stand-in for the page: crops, differences, one clock for all videos."""
    done = subprocess.run(["node", "-e", NODE.replace("SCRIPT", SCRIPT)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["sizes"] == [[48, 32], [96, 32], [48, 32]]
    modes = [entry[0] for entry in found["first"]]
    assert modes == ["source-over", "source-over", "source-over", "difference", "lighter", "lighter"]
    assert found["first"][0][1:5] == [0, 0, 48, 32]
    assert found["first"][2][1:5] == [48, 0, 48, 32]
    assert found["first"][3][1:5] == [0, 0, 48, 32]
    assert found["sought"] == [1, 1]
    assert found["playing"] == [True, True]
    assert found["together"] == [1.5, 1.5]
    assert found["label"] == "Pause"
    assert found["told"] == "1.50 of 2.00 s"
