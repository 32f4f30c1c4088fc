"""Checkpoints under Wan's original names, as released: loaded exactly, or refused with everything that is wrong."""

import pickle

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

from dit_accel.errors import DitAccelError, UsageError
from dit_accel.pipelines.streaming.weights import load_checkpoint, read_checkpoint, renamed
from tiny_models import WAN, tiny_transformer

DIM = 24


def original(seed=0, layers=3):
    """A tiny model's tensors as Wan's own code names and shapes them."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator)

    state = {"patch_embedding.weight": make(DIM, 4, 1, 2, 2), "patch_embedding.bias": make(DIM)}

    def linear(name, out, inner):
        state[f"{name}.weight"], state[f"{name}.bias"] = make(out, inner), make(out)

    linear("text_embedding.0", DIM, 16)
    linear("text_embedding.2", DIM, DIM)
    linear("time_embedding.0", DIM, 16)
    linear("time_embedding.2", DIM, DIM)
    linear("time_projection.1", 6 * DIM, DIM)
    for i in range(layers):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"blocks.{i}.{attention}.{part}", DIM, DIM)
            for norm in ("norm_q", "norm_k"):
                state[f"blocks.{i}.{attention}.{norm}.weight"] = make(DIM)
        state[f"blocks.{i}.norm3.weight"], state[f"blocks.{i}.norm3.bias"] = make(DIM), make(DIM)
        linear(f"blocks.{i}.ffn.0", 32, DIM)
        linear(f"blocks.{i}.ffn.2", DIM, 32)
        state[f"blocks.{i}.modulation"] = make(1, 6, DIM)
    linear("head.head", 16, DIM)
    state["head.modulation"] = make(1, 2, DIM)
    return state


def model_of():
    torch.manual_seed(9)
    return WanTransformer3DModel(**WAN).eval()


def reference(state):
    """diffusers' own conversion of single files."""
    return convert_wan_transformer_to_diffusers(dict(state))


def equal(model, state):
    ours = model.state_dict()
    return set(ours) == set(state) and all(torch.equal(ours[name], state[name]) for name in ours)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def test_names_are_those_of_diffusers_own_conversion():
    state = original()
    found, exact = renamed(state), reference(state)
    assert set(found) == set(exact)
    assert all(torch.equal(found[name], exact[name]) for name in found)
    assert renamed(found) == found  # and names of diffusers stay


LAYOUTS = {
    "self-forcing": lambda s: {"generator": prefixed(original(1), "model."), "generator_ema": prefixed(s, "model.")},
    "wrapped": lambda s: {"generator_ema": prefixed(s, "model._fsdp_wrapped_module.")},
    "longlive": lambda s: {"generator": prefixed(s, "model."), "step": 3000},
    "state dict": lambda s: prefixed(s, "model."),
    "bare": lambda s: s,
    "blocks wrapped": lambda s: {
        "model": {name.replace("blocks.", "_orig_mod.blocks._checkpoint_wrapped_module."): v for name, v in s.items()}
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_layouts(tmp_path, layout):
    state = original()
    torch.save(LAYOUTS[layout](state), tmp_path / "a.pt")
    model = model_of()
    report = load_checkpoint(model, tmp_path / "a.pt")
    assert equal(model, reference(state))
    assert report.ok
    assert report.loaded == len(state)


def test_the_model_runs_and_another_entry_can_be_chosen(tmp_path):
    torch.save(LAYOUTS["self-forcing"](original()), tmp_path / "a.pt")
    model, call = model_of(), tiny_transformer("wan")[1]
    assert load_checkpoint(model, tmp_path / "a.pt", entry="generator").entry == "generator"
    assert equal(model, reference(original(1)))
    with torch.no_grad():
        assert bool(model(**call).sample.isfinite().all())
    with pytest.raises(UsageError, match="no model 'critic'; entries: generator, generator_ema"):
        load_checkpoint(model, tmp_path / "a.pt", entry="critic")


def test_safetensors_and_half_precision(tmp_path):
    state = {name: value.bfloat16() for name, value in original().items()}
    save_file(state, tmp_path / "a.safetensors")
    model = model_of()
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert equal(model, reference({name: value.float() for name, value in state.items()}))


def test_a_base_and_its_adapter(tmp_path):
    state, generator = original(), torch.Generator().manual_seed(5)
    a, b = torch.randn(4, DIM, generator=generator), torch.randn(32, 4, generator=generator)
    name = "blocks.1.ffn.0"
    torch.save({"generator": prefixed(state, "model.")}, tmp_path / "base.pt")
    lora = {f"base_model.model.model.{name}.lora_A.default.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    model = model_of()
    report = load_checkpoint(model, tmp_path / "base.pt", lora=tmp_path / "lora.pt", lora_scale=0.5)
    state[f"{name}.weight"] = state[f"{name}.weight"] + 0.5 * b @ a
    found, exact = model.state_dict(), reference(state)
    assert report.merged == 1
    assert all(torch.allclose(found[key], exact[key], atol=1e-6) for key in exact)
    torch.save({f"blocks.7.ffn.0.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"1 parts of the adapter have no weight.*blocks\.7"):
        load_checkpoint(model, tmp_path / "base.pt", lora=tmp_path / "other.pt")


def test_everything_wrong_is_reported_and_nothing_loaded(tmp_path):
    state = original(layers=4)
    del state["head.head.bias"], state["blocks.0.modulation"]
    state["blocks.1.self_attn.q.weight"] = torch.zeros(DIM, DIM + 1)
    torch.save(state, tmp_path / "a.pt")
    model, before = model_of(), model_of().state_dict()
    with pytest.raises(UsageError) as error:
        load_checkpoint(model, tmp_path / "a.pt")
    message = str(error.value)
    assert "2 missing: proj_out.bias, blocks.0.scale_shift_table" in message.replace(
        "blocks.0.scale_shift_table, proj_out.bias", "proj_out.bias, blocks.0.scale_shift_table"
    )
    assert "27 unknown to the model: blocks.3.attn1.to_q.weight" in message
    assert "1 of another shape: blocks.1.attn1.to_q.weight [24, 25] instead of [24, 24]" in message
    assert "left as it was" in message
    assert equal(model, before)


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(UsageError, match=r"no checkpoint at .*b\.pt"):
        read_checkpoint(tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(DitAccelError, match="could not be read as weights"):
        read_checkpoint(tmp_path / "b.pt")
    torch.save({"optimizer": {"lr": torch.zeros(1)}}, tmp_path / "c.pt")
    with pytest.raises(UsageError, match="entries: optimizer"):
        read_checkpoint(tmp_path / "c.pt")
