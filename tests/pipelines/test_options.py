"""Options of loading: each reaches the pipeline, what cannot be is refused before weights are read."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from dit_accel import AllBlocksProcessor, Schedule
from dit_accel.cli import main
from dit_accel.diffusers import engines
from dit_accel.errors import DitAccelError, UnsupportedError, UsageError
from dit_accel.pipelines.load import load
from dit_accel.pipelines.options import LoadOptions
from tiny_models import tiny_pipeline, tiny_run

SPARSE = AllBlocksProcessor(backend="gather", schedule=Schedule.none(), block_size=16)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA file for the tiny Wan."""
    pipe, folder = tiny_pipeline(), tmp_path_factory.mktemp("lora")
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return next(folder.glob("*.safetensors"))


def run(folder, **options):
    pipe = load(str(folder), device="cpu", options=LoadOptions(**options))
    pipe.set_progress_bar_config(disable=True)
    pipe.set_attn_processor(SPARSE)
    return pipe, tiny_run(pipe)


@pytest.fixture(scope="module")
def plain(tiny_wan):
    return run(tiny_wan)[1]


def test_a_cache_skips_blocks(tiny_wan, plain):
    pipe, _ = run(tiny_wan, cache="firstblock=10")
    assert pipe.transformer.is_cache_enabled
    assert 0 < engines(pipe)[0].stats.sparse < 24
    careful, out = run(tiny_wan, cache="firstblock=1e-9")
    assert engines(careful)[0].stats.sparse == 24
    assert torch.allclose(out, plain, atol=1e-5)


def test_a_lora_at_its_scale(tiny_wan, plain, lora):
    _, full = run(tiny_wan, lora=(str(lora),))
    _, half = run(tiny_wan, lora=(f"{lora}=0.5",))
    _, none = run(tiny_wan, lora=(f"{lora}=0",))
    assert (full - plain).abs().max() > (half - plain).abs().max() > 1e-3
    assert torch.allclose(none, plain, atol=1e-5)


def test_tiling_and_compilation_reach_the_parts(tiny_wan, monkeypatch):
    from diffusers import WanTransformer3DModel

    compiled = []
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", lambda self: compiled.append(self))
    pipe, _ = run(tiny_wan, vae_tiling=True, compile=True)
    assert pipe.vae.use_tiling
    assert compiled == [pipe.transformer]


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offloading_is_asked_of_the_pipeline(tiny_wan, kind, monkeypatch):
    """Without an accelerator the call is what can be seen."""
    pipe, asked = tiny_pipeline(), []
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "to"):
        monkeypatch.setattr(type(pipe), method, lambda self, *a, _name=method, **k: asked.append(_name))
    LoadOptions(offload=kind)._place(pipe, torch.device("cuda:0"))
    LoadOptions(offload=kind)._place(pipe, torch.device("cpu"))
    wanted = {"group": "enable_group_offload"}.get(kind, f"enable_{kind}_cpu_offload")
    assert asked == [wanted, "to"], "on a CPU everything is where it should be already"


def test_a_device_map(tiny_wan, plain):
    pipe = load(str(tiny_wan), device="cpu", options=LoadOptions(device_map="cpu"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.hf_device_map is not None
    assert torch.allclose(tiny_run(pipe), plain, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"offload": "disk"}, "use one of model, sequential, group"),
        ({"offload": "model", "device_map": "balanced"}, "give one of them"),
        ({"offload": "sequential", "compile": True}, "--offload model or group"),
        ({"cache": "teacache"}, "firstblock=0.1"),
        ({"cache": "firstblock=-1"}, "above 0"),
        ({"quantize": "int3"}, "bnb-8bit, bnb-4bit"),
        ({"lora": ("a=b=c",)}, "optional =SCALE"),
        ({"lora": ("nowhere/a.safetensors",)}, "no such file"),
        ({"lora": ("a.ckpt",)}, "pickle"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options, why):
    with pytest.raises(UsageError, match=why):
        LoadOptions(**options)


def test_an_absent_quantiser_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        LoadOptions(quantize="bnb-4bit")


def test_parts_that_lack_a_feature(tiny_wan, tmp_path):
    pipe = tiny_pipeline()
    pipe.register_modules(vae=torch.nn.Identity())
    with pytest.raises(UnsupportedError, match="no tiling"):
        LoadOptions(vae_tiling=True).apply(pipe, torch.device("cpu"))
    (tmp_path / "not.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DitAccelError, match=r"--lora .*not\.safetensors could not be loaded into a WanPipeline"):
        run(tiny_wan, lora=(str(tmp_path / "not.safetensors"),))


def test_only_what_changes_pixels_is_part_of_the_record(lora):
    assert LoadOptions(offload="model", compile=True, device_map=None).settings() == {}
    found = LoadOptions(cache="firstblock", vae_tiling=True, lora=(f"{lora}=0.5",)).settings()
    assert found["cache"] == "firstblock"
    assert found["vae_tiling"] is True
    assert found["lora"][0][0] == f"{lora}=0.5"
    assert len(found["lora"][0][1]) == 16


def test_the_command_takes_them(tiny_wan, tmp_path, lora, capsys):
    (tmp_path / "p.txt").write_text("a ball\n")
    small = ["--size", "32x48", "--frames", "5", "--steps", "2", "--method", "dense", "-o", str(tmp_path / "out")]
    more = ["--lora", f"{lora}=0.5", "--cache", "firstblock=0.1", "--vae-tiling", "--offload"]
    arguments = ["render", str(tmp_path / "p.txt"), "--model", str(tiny_wan), *small]
    assert main([*arguments, *more]) == 0
    assert main([*arguments, "--resume", *more]) == 0
    assert "skip" in capsys.readouterr().out
    assert main([*arguments, "--resume"]) == 1
    assert 'cache: "firstblock=0.1" -> null' in capsys.readouterr().err
