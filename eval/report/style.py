"""The look of a report, and the script that keeps its players in step. Neither asks the network for anything."""

CSS = """
:root { color-scheme: light; --ink: #1d2733; --faint: #66717d; --rule: #dfe3e7; --warn: #9a3412; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 38px 0 10px; }
h3 { font-size: 16px; margin: 26px 0 8px; overflow-wrap: anywhere; }
p { margin: 6px 0; } .faint { color: var(--faint); } .warn { color: var(--warn); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td.number { text-align: right; white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }
figure { margin: 10px 0; max-width: 100%; overflow-x: auto; }
figcaption { font-size: 13px; color: var(--faint); margin-bottom: 4px; }
.legend { font-size: 12px; color: var(--faint); } .legend span { margin-right: 14px; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px; }
.player canvas, .player img, .player video { display: block; background: #111; image-rendering: pixelated; }
.player canvas { width: 100%; } .player:not(.drawn) .row, .player:not(.drawn) .controls { display: none; }
.drawn .media { position: absolute; width: 1px; height: 1px; overflow: hidden; opacity: 0; }
.panel { flex: 1 1 220px; max-width: 420px; }
.panel span { font-size: 13px; color: var(--faint); }
.controls { display: flex; gap: 10px; align-items: center; margin: 10px 0; max-width: 860px; }
.controls input { flex: 1; } .controls button { font: inherit; padding: 3px 12px; }
.controls output { min-width: 9em; font-size: 13px; color: var(--faint); font-variant-numeric: tabular-nums; }
.apart { border: 1px solid var(--warn); padding: 2px 16px 10px; margin: 14px 0; }
pre { overflow-x: auto; background: #f6f7f8; padding: 10px 12px; font-size: 12.5px; white-space: pre-wrap;
      overflow-wrap: anywhere; } details { margin: 6px 0; } summary { cursor: pointer; }
"""

# One clock for all media of a player: the first video leads, the others are corrected when they run away. Panels are
# canvases, so that one file may hold several pictures side by side, and a difference needs no pixel to be read back.
SCRIPT = """
"use strict";
for (const player of document.querySelectorAll(".player")) {
  const media = [...player.querySelectorAll(".media > *")];
  const videos = media.filter(m => m.tagName === "VIDEO");
  const panels = [...player.querySelectorAll("canvas")];
  const [button, slider, told] = ["button", "input", "output"].map(s => player.querySelector(".controls " + s));
  const lead = videos[0];
  player.classList.add("drawn");
  const size = m => m.tagName === "VIDEO" ? [m.videoWidth, m.videoHeight] : [m.naturalWidth, m.naturalHeight];
  const part = spec => {
    const [index, begin, width] = spec.split(",").map(Number), source = media[index], [w, h] = size(source);
    return [source, begin * w, 0, width * w, h];
  };
  const draw = () => {
    for (const canvas of panels) {
      const [source, x, y, w, h] = part(canvas.dataset.of);
      if (!w || !h) continue;
      if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
      const brush = canvas.getContext("2d");
      brush.globalCompositeOperation = "source-over";
      brush.drawImage(source, x, y, w, h, 0, 0, w, h);
      if (!canvas.dataset.minus) continue;
      brush.globalCompositeOperation = "difference";
      brush.drawImage(...part(canvas.dataset.minus), 0, 0, w, h);
      brush.globalCompositeOperation = "lighter";
      for (let times = 1; times < 4; times *= 2) brush.drawImage(canvas, 0, 0);
    }
    if (lead && lead.duration) {
      slider.value = lead.currentTime / lead.duration;
      told.value = lead.currentTime.toFixed(2) + " of " + lead.duration.toFixed(2) + " s";
    }
  };
  const follow = () => {
    for (const video of videos.slice(1))
      if (Math.abs(video.currentTime - lead.currentTime) > 0.06) video.currentTime = lead.currentTime;
  };
  const loop = () => {
    follow();
    draw();
    if (!lead.paused) requestAnimationFrame(loop);
  };
  for (const m of media) for (const event of ["loadeddata", "seeked", "load"]) m.addEventListener(event, draw);
  if (lead) {
    button.addEventListener("click", () => {
      if (lead.paused) Promise.all(videos.map(v => v.play())).then(loop);
      else videos.forEach(v => v.pause());
      button.textContent = lead.paused ? "Play" : "Pause";
    });
    slider.addEventListener("input", () => {
      for (const video of videos) video.currentTime = slider.value * (lead.duration || 0);
    });
  }
  draw();
}
"""
