import subprocess
import sys

from dit_accel.pipelines import mini


def test_importing_the_package_does_not_import_torch():
    code = "import sys, dit_accel.pipelines.mini as m; m.path(); m.defaults(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defaults_are_arguments_of_the_stock_call():
    import inspect

    from diffusers import WanPipeline

    settings = mini.defaults()
    assert settings.pop("fps") > 0
    assert set(settings) <= set(inspect.signature(WanPipeline.__call__).parameters)


def test_bundle_stays_small():
    sizes = [p.stat().st_size for p in mini.path().rglob("*") if p.is_file()]
    assert sum(sizes) <= 16 * 2**20
    assert max(sizes) <= 12 * 2**20


def test_default_size_lets_radial_attention_skip_three_quarters():
    import torch

    import dit_accel

    settings = mini.defaults()
    grid = ((settings["num_frames"] - 1) // 2 + 1, settings["height"] // 8, settings["width"] // 8)
    tokens = torch.zeros(1, 1, grid[0] * grid[1] * grid[2], 32)
    plan = dit_accel.plan(tokens, tokens, tokens, dit_accel.Radial(block_size=64), layout=dit_accel.Layout(grid=grid))
    assert grid[1] * grid[2] <= 120
    assert plan.density <= 0.25
