"""Features that change or add weights: LoRA, fused projections, IP-adapters, quantised linears."""

import importlib.util

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from feature_trials import SPARSE, trial
from peft import LoraConfig

from dit_accel import AllBlocksProcessor, RandomBlocksProcessor
from dit_accel.diffusers import engines
from tiny_models import FAMILIES, tiny_pipeline, tiny_run, tiny_transformer

ORDERS = pytest.mark.parametrize("enable_first", [True, False], ids=["feature-first", "processor-first"])


@ORDERS
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lora(family, enable_first, record_feature):
    def enable(model, clock):
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))

    found = trial(family, enable, enable_first=enable_first)
    assert (found.plain - found.featured).abs().max() > 1e-3, "the adapter must matter"
    record_feature("LoRA (peft)", type(found.model).__name__, found.told())


def test_lora_loaded_fused_and_unloaded_in_a_pipeline(tmp_path, record_feature):
    pipe, plain = tiny_pipeline(), tiny_run(tiny_pipeline())
    torch.manual_seed(3)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    expected = tiny_run(pipe)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=_lora_weights(pipe.transformer))
    pipe = tiny_pipeline()
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    assert (expected - plain).abs().max() > 1e-3
    assert (tiny_run(pipe) - expected).abs().max() < 1e-4
    pipe.fuse_lora()
    assert (tiny_run(pipe) - expected).abs().max() < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert (tiny_run(pipe) - plain).abs().max() < 1e-4
    stats = engines(pipe)[0].stats
    assert (stats.sparse, stats.fallback) == (3 * 24, 0)
    record_feature("LoRA loaded, fused, unloaded", type(pipe.transformer).__name__, "equal")


def _lora_weights(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


# The other families' stock processors never call the fused layer, though the mixin makes it.
FUSED = {"wan", "flux", "cogvideox"}


@ORDERS
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fused_projections(family, enable_first, record_feature):
    fused = []

    def enable(model, clock):
        model.fuse_qkv_projections()
        for module in model.modules():
            if hasattr(module, "to_qkv"):
                module.to_qkv.register_forward_hook(lambda *_: fused.append(1))

    if family == "cogvideox" and not enable_first:
        model, _, _ = tiny_transformer(family)
        model.set_attn_processor(AllBlocksProcessor(**SPARSE))
        enable(model, None)
        assert engines(model) == [], "fusing sets stock processors here, which removes ours: fuse first"
        return
    found = trial(family, enable, enable_first=enable_first)
    assert bool(fused) == (family in FUSED)
    told = found.told() if fused else "equal; diffusers' own processor ignores the fused layer"
    if family == "cogvideox":
        told += "; fuse first, fusing sets stock processors"
    record_feature("fused QKV projections", type(found.model).__name__, told)


@ORDERS
@torch.no_grad()
def test_ip_adapter(enable_first, record_feature):
    """Its processors are modules with weights and attend twice: the image tokens' extra call stays stock."""
    call_with = {"ip_adapter_image_embeds": [torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))]}

    def enable(model):
        torch.manual_seed(4)
        model.encoder_hid_proj = torch.nn.Identity()
        model.set_attn_processor({
            name: stock if name.startswith("single") else FluxIPAdapterAttnProcessor(32, 16, num_tokens=(4,))
            for name, stock in model.attn_processors.items()
        })  # fmt: skip

    def run(model, call):
        return model(**call, joint_attention_kwargs={name: list(value) for name, value in call_with.items()}).sample

    model, call, _ = tiny_transformer("flux")
    plain = model(**call).sample
    enable(model)
    expected, names = run(model, call), set(model.state_dict())
    assert (expected - plain).abs().max() > 1e-3, "the image prompt must matter"
    if not enable_first:
        model, call, _ = tiny_transformer("flux")
        model.set_attn_processor(AllBlocksProcessor(**SPARSE))
        enable(model)
        assert engines(model) == [], "setting stock processors removes ours: install ours after the adapter"
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    assert (run(model, call) - expected).abs().max() < 1e-5
    (engine,) = engines(model)
    assert (engine.stats.sparse, engine.stats.dense) == (4, {"cross": 2})
    assert set(model.state_dict()) == names, "a derived processor adds no weights"
    model.reset_attn_processor()
    assert torch.equal(run(model, call), expected)
    record_feature("IP-adapter", type(model).__name__, "equal, its own two calls stay stock")


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes", "gguf"])
@torch.no_grad()
def test_quantised_weights(package, record_feature):
    """Only the attention primitive changes, so a quantised linear layer is called as it always is."""
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is here: its own kernels need a test on the device it serves")

    class Int8Linear(torch.nn.Module):
        """What such packages put in the place of a linear layer: no float ``weight`` to read."""

        def __init__(self, linear):
            super().__init__()
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
            self.register_buffer("scale", scale)
            self.bias = linear.bias

        def forward(self, x):
            return torch.nn.functional.linear(x, self.codes * self.scale, self.bias)

    def enable(model, clock):
        for module in list(model.modules()):
            for name in ("to_q", "to_k", "to_v"):
                if isinstance(getattr(module, name, None), torch.nn.Linear):
                    setattr(module, name, Int8Linear(getattr(module, name)))

    found = trial("wan", enable, enable_first=package == "gguf")
    assert not torch.equal(found.plain, found.featured)
    record_feature(f"{package}", type(found.model).__name__, "package absent; equal with a stand-in int8 linear")


def test_a_sparse_method_sees_the_adapter_too():
    """Not only at density 1: the mask is the method's, the values are the adapter's."""
    pipe = tiny_pipeline()
    pipe.set_attn_processor(RandomBlocksProcessor(density=0.3, **SPARSE))
    before = tiny_run(pipe)
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    assert (tiny_run(pipe) - before).abs().max() > 1e-3
    assert engines(pipe)[0].stats.effective_density < 1
