import json

import pytest
import torch
from diffusers import WanPipeline

from dit_accel.pipelines.mini.train import Run, load_config, main

TOY = {
    "seed": 0,
    "autocast": False,
    "vae": {"steps": 2, "lr": 1e-3, "base_dim": 16, "z_dim": 4, "tokens": 5, "clip_frames": [5], "kl": 1e-3},
    "data": {"shards": 1, "first": 1, "grow": 1, "shard": 4},
    "denoiser": {
        "steps": 4, "lr": 1e-3, "warmup": 1, "width": 64, "head_dim": 32, "layers": 1, "text_dim": 16, "shift": 3.0,
        "dropout": 0.5, "every": 99, "samples": 0, "phases": [{"until": 4, "frames": 3, "batch": 2}],
    },
}  # fmt: skip


def config(tmp_path):
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(TOY))
    return str(path)


def losses(out):
    return [line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())]


def test_one_command_trains_and_exports_a_loadable_pipeline(tmp_path):
    out = tmp_path / "run"
    assert main(["--config", config(tmp_path), "--out", str(out), "--device", "cpu"]) == 0
    assert (out / "vae.png").is_file()
    pipeline = WanPipeline.from_pretrained(out / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 80, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 32}
    frames = pipeline("a red circle moves left on a white background", output_type="np", **settings).frames
    assert frames.shape == (1, 5, 64, 80, 3)
    # The same seed on the same device gives the same curve.
    again = tmp_path / "again"
    assert main(["--config", config(tmp_path), "--out", str(again), "--device", "cpu"]) == 0
    assert losses(out) == losses(again)


def test_stopped_by_the_clock_returns_one(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--config", config(tmp_path), "--out", str(out), "--stage", "vae", "--device", "cpu"]
    assert main([*arguments, "--max-minutes", "0.00001"]) == 1
    assert "the same command continues" in capsys.readouterr().out
    assert main(arguments) == 0


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_shipped_configs_are_complete(name, tmp_path):
    shipped = load_config(name)
    assert shipped["denoiser"]["phases"][-1]["until"] == shipped["denoiser"]["steps"]
    assert shipped["denoiser"]["phases"][-1]["frames"] == 33
    assert Run(shipped, tmp_path).seed == shipped["seed"]


def test_unknown_config_lists_the_shipped_ones():
    with pytest.raises(SystemExit, match="cpu, gpu"):
        load_config("nothing")
