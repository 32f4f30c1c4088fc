"""The report in a real headless browser, from a file: nothing is fetched, nothing complains, players play together."""

import json
import shutil
import time

import pytest

from dit_accel.cli import main
from dit_accel.eval.report import report

pytestmark = pytest.mark.browser
sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def until(page, expression):
    """Wait until ``expression`` holds. Playwright's own waiting evaluates text inside the page, which the page's
    content security policy forbids, as it should."""
    limit = time.monotonic() + 30
    while not page.evaluate(expression):
        if time.monotonic() > limit:
            pytest.fail(f"never became true within 30 s: {expression}; the page said {page.said}")
        page.wait_for_timeout(50)


@pytest.fixture(scope="module")
def written(tiny_wan, tmp_path_factory):
    """A report of two methods against dense; its page and their records."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = folder / "prompts.txt"
    prompts.write_text('a red </script><b onclick=x> "ball" & so\n')
    small = ["--model", tiny_wan, "--size", "32x48", "--frames", "33", "--steps", "2", "--backend", "gather"]
    for name in ("random-blocks", "radial"):
        method = ["--method", name, "--param", "block_size=4", "--dense-steps", "0", "--guard", "nonfinite,fault,drift"]
        argv = ["render", prompts, *small, *method, "--compare", "-o", folder / name, "--quiet"]
        assert main([str(word) for word in argv]) == 0
    report([folder], folder / "report.html")
    records = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    return folder / "report.html", records


@pytest.fixture
def page(written):
    """The page opened from its file; ``page.asked`` and ``page.said`` hold requests and complaints."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto(written[0].as_uri())
        until(page, "[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
        yield page
        assert page.said == []
        assert all(url.startswith(("file:", "data:")) for url in page.asked)
        assert len([url for url in page.asked if url.startswith("file:")]) == 1
        browser.close()


def test_players_play_in_step_and_draw(page):
    page.click(".controls button")
    until(page, "[...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime > 0.3)")
    times = page.evaluate("[...document.querySelectorAll('video')].map(v => v.currentTime)")
    assert len(times) == 2
    assert abs(times[0] - times[1]) < 0.2
    page.click(".controls button")
    assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
    drawn = page.evaluate("""[...document.querySelectorAll('canvas')].map(c => {
        const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return [c.getAttribute('aria-label'), c.width, new Set(pixels).size];
    })""")
    assert [one[0] for one in drawn] == [
        "dense", "radial", "|radial - dense| x 4", "random-blocks", "|random-blocks - dense| x 4",
    ]  # fmt: skip
    assert all(width == 32 for _, width, _ in drawn)
    assert all(values > 4 for _, _, values in drawn)


def test_seeking_moves_every_player(page):
    page.evaluate("""{const s = document.querySelector('.controls input');
        s.value = 0.5; s.dispatchEvent(new Event('input'));}""")
    until(page, "[...document.querySelectorAll('video')].every(v => !v.seeking && v.currentTime > 0.5)")
    shares = page.evaluate("[...document.querySelectorAll('video')].map(v => v.currentTime / v.duration)")
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)


def test_what_is_read_is_what_was_recorded(page, written):
    cells = page.evaluate("[...document.querySelectorAll('td')].map(c => c.innerText)")
    raw = page.evaluate("[...document.querySelectorAll('pre[data-record]')].map(p => p.textContent)")
    assert [json.loads(text) for text in raw] == written[1]
    for record in written[1]:
        compare = record["compare"]
        assert f"{compare['fidelity']['psnr']:.2f}" in cells
        assert f"{compare['speedup']['loop']:.2f}x" in cells
        assert record["settings"]["prompt"] in cells
        told = page.inner_text("body")
        assert f"rows of {record['attention']['guard_checks']} calls checked" in told
        assert f"drift mean {record['attention']['drift']['mean']:.4f}" in told


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
