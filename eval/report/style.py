"""The look of a report, and the script that keeps its players in step. Neither asks the network for anything."""

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2733; --faint: #5c6773; --rule: #dfe3e7; --warn: #9a3412;
        --box: #f6f7f8; --none: #d5d9dd; --c0: #1f5f8b; --c1: #d7263d; --c2: #2e8b57; --c3: #c77c11; --c4: #7b4fa3;
        --c5: #66717d; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14191f; --ink: #e3e8ed; --faint: #a3afba; --rule: #303a45; --warn: #f4a27a; --box: #1d242c;
          --none: #4a545f; --c0: #6db3e8; --c1: #ff7a85; --c2: #5cc48a; --c3: #f2b64c; --c4: #bb9be0; --c5: #a3afba; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 38px 0 10px; }
h3 { font-size: 16px; margin: 26px 0 8px; overflow-wrap: anywhere; } h4 { font-size: 15px; margin: 18px 0 2px; }
p { margin: 6px 0; overflow-wrap: anywhere; } .faint { color: var(--faint); } .warn { color: var(--warn); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td:first-child { min-width: 9em; }
.number { text-align: right; } td.number { white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: 6px 24px; align-items: flex-start; }
figure { margin: 8px 0; max-width: 100%; }
figcaption { font-size: 13px; color: var(--faint); margin-bottom: 4px; }
svg { display: block; max-width: 100%; height: auto; }
.legend { font-size: 12px; color: var(--faint); } .legend span { margin-right: 14px; white-space: nowrap; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px; }
.player canvas, .player img, .player video { display: block; background: #111; image-rendering: pixelated;
                                             max-width: 100%; }
.player canvas { width: 100%; } .player:not(.drawn) .panels, .player:not(.drawn) .controls { display: none; }
.drawn .media { position: absolute; width: 1px; height: 1px; overflow: hidden; opacity: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px 18px; }
.panel { max-width: 420px; } .panel span { display: block; font-size: 13px; color: var(--faint); margin: 2px 0 10px; }
.controls { display: flex; gap: 10px; align-items: center; margin: 10px 0; max-width: 860px; }
.controls input { flex: 1; min-width: 60px; } .controls button { font: inherit; padding: 3px 12px; min-width: 5em; }
.controls output { min-width: 9em; font-size: 13px; color: var(--faint); font-variant-numeric: tabular-nums; }
.apart { border: 1px solid var(--warn); padding: 2px 16px 10px; margin: 14px 0; }
pre { overflow-x: auto; background: var(--box); padding: 10px 12px; font-size: 12.5px; white-space: pre-wrap;
      overflow-wrap: anywhere; } details { margin: 6px 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
@media (max-width: 600px) { body { padding: 16px; } .panels { gap: 10px; } }
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
      if (!video.seeking && Math.abs(video.currentTime - lead.currentTime) > 0.06) video.currentTime = lead.currentTime;
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
