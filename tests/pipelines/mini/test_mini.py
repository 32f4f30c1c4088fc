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
