"""The official ``vbench`` package, in a Python environment of its own: what it lacks there, and running it.

It pins numpy below 2 and transformers 4.33, so it cannot live beside this library. Each dimension runs in a process of
its own, so that one failure does not cost the others; its raw results stay untouched beside ours.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DitAccelError, UsageError
from .vbench import CUSTOM, DIMENSIONS, judge_results, read_results

MODES = ("vbench_standard", "custom_input")
# Modules that the package cannot do without, and those of single dimensions.
_MODULES = ("vbench", "torch", "torchvision", "decord", "clip")
_GRIT = ("object_class", "multiple_objects", "color", "spatial_relationship")
_B32, _L14 = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")
_GRIT_FILE = ("grit_model/grit_b_densecap_objectdet.pth",)

# Files below the cache folder that each dimension reads; without them the package would download.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "subject_consistency": ("dino_model/dino_vitbase16_pretrain.pth",),
    "background_consistency": (_B32,),
    "temporal_flickering": ("raft_model/models/raft-things.pth",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": (_L14, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    **dict.fromkeys(_GRIT, _GRIT_FILE),
    "human_action": ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    "scene": ("caption_model/tag2text_swin_14m.pth",),
    "appearance_style": (_B32,),
    "temporal_style": _VICLIP,
    "overall_consistency": _VICLIP,
}

_PROBE = """
import importlib.util, json, sys
from importlib import metadata
names = json.loads(sys.argv[1])
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({
    "python": sys.version.split()[0],
    "modules": {name: importlib.util.find_spec(name) is not None for name in names},
    "versions": {name: version(name) for name in ("vbench", "torch", "transformers", "numpy")},
}))
"""

# Runs in the other environment. A device given as text would make the package shrink large frames; an object does not.
_DRIVER = """
import json, sys
job = json.loads(sys.argv[1])
import torch
from vbench import VBench
extra = {"imaging_quality_preprocessing_mode": "longer"} if job["dimension"] == "imaging_quality" else {}
VBench(torch.device(job["device"]), job["info"], job["out"]).evaluate(
    videos_path=job["videos"], name=job["name"], dimension_list=[job["dimension"]], local=job["local"],
    read_frame=False, mode=job["mode"], **extra)
"""


def cache_folder(folder: str | Path | None = None) -> Path:
    """Where the package keeps its weights: ``folder``, ``$VBENCH_CACHE_DIR`` or ``~/.cache/vbench``."""
    return Path(folder or os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def doctor(python: str | Path, cache: str | Path | None = None) -> dict[str, Any]:
    """What each dimension lacks in the environment of ``python``. Nothing is downloaded and no model is loaded.

    ``dimensions``: name -> ``{"ready": bool, "missing": [what]}``. Raises ``UsageError`` where ``python`` cannot run.
    """
    folder = cache_folder(cache)
    seen = json.loads(_python(python, _PROBE, [*_MODULES, "detectron2"]))
    absent = [name for name in _MODULES if not seen["modules"][name]]
    dimensions = {}
    for name, files in WEIGHTS.items():
        missing = [f"module {module}" for module in absent]
        if name in _GRIT and not seen["modules"]["detectron2"]:
            missing.append("module detectron2")
        missing += [str(folder / file) for file in files if not (folder / file).is_file()]
        dimensions[name] = {"ready": not missing, "missing": missing}
    return {"python": str(python), "cache": str(folder), "environment": seen, "dimensions": dimensions}


def run_official(
    videos: str | Path,
    out: str | Path,
    *,
    python: str | Path,
    dimensions: Sequence[str] | None = None,
    mode: str = "vbench_standard",
    cache: str | Path | None = None,
    info: str | Path | None = None,
    device: str = "cuda",
    local: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Score the videos of a folder and judge the results as :func:`~dit_accel.eval.vbench.judge_results` does.

    ``out``: where the package writes. ``dimensions``: None takes all, or the six of ``custom_input``. ``info``: its
    ``VBench_full_info.json`` (None: the installed one). Dimensions that fail are named in ``failed`` with the last line
    they said; the others stand. Raises ``DitAccelError`` when none succeeds.
    """
    wanted = list(dimensions or (DIMENSIONS if mode == "vbench_standard" else CUSTOM))
    _check(videos, wanted, mode)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "VBENCH_CACHE_DIR": str(cache_folder(cache))}
    # Located without importing the package, which takes seconds and needs decord.
    where = "import importlib.util as u, os; print(os.path.dirname(u.find_spec('vbench').origin))"
    info = str(info or Path(_python(python, where, None).strip()) / "VBench_full_info.json")
    failed: dict[str, str] = {}
    for name in wanted:
        tell(name)
        job = {"videos": str(videos), "out": str(folder), "name": name, "dimension": name, "mode": mode,
               "info": info, "device": device, "local": local}  # fmt: skip
        command = [str(python), "-c", _DRIVER, json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        (folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode or not (folder / f"{name}_eval_results.json").is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            failed[name] = lines[-1] if lines else f"exit code {done.returncode}, nothing said"
    if len(failed) == len(wanted):
        told = "; ".join(f"{name}: {text}" for name, text in failed.items())
        raise DitAccelError(f"no dimension could be scored: {told}. See what is missing with the doctor")
    found = {name: row for name, row in read_results(folder).items() if name in wanted}
    versions: Mapping[str, Any] = json.loads(_python(python, _PROBE, list(_MODULES)))["versions"]
    return judge_results(found, mode) | {"failed": failed, "versions": versions, "processes": 1, "raw": str(folder)}


def _check(videos: str | Path, wanted: Sequence[str], mode: str) -> None:
    if mode not in MODES:
        raise UsageError(f"VBench mode {mode!r} is unknown; choose {' or '.join(MODES)}")
    unknown = [name for name in wanted if name not in DIMENSIONS]
    if unknown:
        raise UsageError(f"unknown VBench dimension {', '.join(unknown)}; known: {', '.join(DIMENSIONS)}")
    folder = Path(videos)
    if not folder.is_dir() or not any(p.suffix in (".mp4", ".gif") for p in folder.iterdir()):
        raise UsageError(f"no mp4 or gif in {folder}; VBench reads videos named 'PROMPT-0.mp4' from one folder")


def _python(python: str | Path, code: str, argument: Any) -> str:
    try:
        done = subprocess.run([str(python), "-c", code, json.dumps(argument)], capture_output=True, text=True)
    except OSError as error:
        raise UsageError(
            f"cannot run {python} ({error}); give the python of the environment in which vbench is installed"
        ) from None
    if done.returncode:
        last = (done.stderr.strip() or "nothing said").splitlines()[-1]
        raise UsageError(f"{python} cannot be asked about vbench: {last}; install it there with: pip install vbench")
    return done.stdout
