"""Fidelity of folders, paired by prompt and seed."""

import json

import numpy as np
import pytest

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.eval import lpips
from dit_accel.eval.fidelity import fidelity
from dit_accel.eval.lpips import Lpips
from dit_accel.eval.paired import compare_folders, outputs, summarise
from dit_accel.pipelines.video import write_frames, write_mp4


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    return {(f"prompt {i}", seed): rng.integers(0, 256, (3, 16, 32, 3), dtype=np.uint8)
            for i, seed in enumerate((1, 2) * 3)}  # fmt: skip


def save(folder, clips, *, frames=True, beside=False):
    """As ``render`` leaves them; numbered by order, so that only the records tell what is what.

    Where there are frames the video is never read, so an empty file stands for it.
    """
    for number, ((prompt, seed), video) in enumerate(clips.items(), 1):
        stem = f"{number:04d}-x-s{seed}"
        folder.mkdir(exist_ok=True)
        if frames:
            (folder / f"{stem}.mp4").touch()
        else:
            write_mp4(folder / f"{stem}.mp4", video, 8)
        if beside:
            (folder / f"{stem}-dense-vs-radial.mp4").touch()
        record = {"schema": 1, "settings": {"prompt": prompt, "seed": seed}}
        (folder / f"{stem}.json").write_text(json.dumps(record))
        if frames:
            write_frames(folder / "frames" / stem, video)
    return folder


def changed(clips, amount):
    return {key: np.clip(v.astype(int) + amount, 0, 255).astype(np.uint8) for key, v in clips.items()}


def test_pairs_are_found_whatever_their_order(clips, tmp_path):
    dense = save(tmp_path / "dense", clips)
    other = changed(clips, 4)
    fast = save(tmp_path / "fast", dict(reversed(list(other.items()))), beside=True)
    found = compare_folders(dense, fast, dense_frames=dense / "frames", fast_frames=fast / "frames")
    assert found["lossless"]
    assert len(found["rows"]) == 6
    for row in found["rows"]:
        key = (row["prompt"], row["seed"])
        assert row["psnr"] == fidelity(clips[key], other[key]).psnr
        assert len(row["psnr_frames"]) == 3
    summary = found["summary"]["psnr"]
    assert summary["clips"] == 6
    assert summary["low"] <= summary["mean"] <= summary["high"]
    assert summary["worst"]["value"] == min(row["psnr"] for row in found["rows"])
    assert json.loads(json.dumps(found)) is not None


def test_video_files_are_compared_and_marked(clips, tmp_path):
    few = dict(list(clips.items())[:2])
    dense, fast = save(tmp_path / "a", few, frames=False), save(tmp_path / "b", few, frames=False)
    found = compare_folders(dense, fast, border="zero")
    assert not found["lossless"]
    assert found["summary"]["psnr"]["mean"] == 100  # the same file twice
    assert "zero border" in found["conventions"]["ssim"]


def test_clips_without_a_partner_are_named(clips, tmp_path):
    less = dict(list(clips.items())[:2])
    folders = save(tmp_path / "a", clips), save(tmp_path / "b", less)
    found = compare_folders(
        *folders, **{f"{side}_frames": f / "frames" for side, f in zip(("dense", "fast"), folders, strict=True)}
    )
    assert len(found["rows"]) == 2
    assert len(found["unpaired"]["dense"]) == 4
    values = found["summary"]["psnr"]
    assert len(values["values"]) == 2
    assert "low" not in values


def test_what_cannot_be_paired(clips, tmp_path):
    dense = save(tmp_path / "a", clips)
    with pytest.raises(UsageError, match="has a partner of the same prompt and seed"):
        compare_folders(dense, save(tmp_path / "b", {("other", 1): clips["prompt 0", 1]}))
    with pytest.raises(UsageError, match="no clip in"):
        outputs(tmp_path / "a" / "frames")
    with pytest.raises(UsageError, match="there is no folder"):
        outputs(tmp_path / "absent")
    shorter = {key: video[:2] for key, video in clips.items()}
    with pytest.raises(UsageError, match="equal frame counts"):
        compare_folders(dense, save(tmp_path / "c", shorter), dense_frames=dense / "frames",
                        fast_frames=tmp_path / "c" / "frames")  # fmt: skip
    record = (dense / "0001-x-s1.json").read_text()
    (dense / "0002-x-s2.json").write_text(record)
    with pytest.raises(UsageError, match="have the same prompt and seed"):
        outputs(dense)


def test_a_summary_leaves_out_what_was_not_measured():
    rows = [{"prompt": str(i), "seed": 0} for i in range(6)]
    found = summarise([None, 3.0, 1.0, 2.0, 4.0, 5.0], rows, lowest=False)
    assert (found["clips"], found["mean"], found["worst"]["value"]) == (5, 3.0, 5.0)
    assert summarise([None] * 6, rows) == {"mean": None, "clips": 0}


def test_lpips_says_why_it_is_missing(monkeypatch):
    with pytest.raises(UsageError, match="net 'resnet' is unknown"):
        Lpips("resnet")
    monkeypatch.setattr(lpips, "unavailable", lambda: "the lpips package does not import")
    with pytest.raises(UnsupportedError, match="LPIPS is not available: the lpips package"):
        Lpips()
