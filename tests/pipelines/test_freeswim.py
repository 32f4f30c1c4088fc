"""FreeSwim's dual path against hand-written processors, its facts F1 to F5, skipped rows, and a clean way out."""

import math
from collections import Counter

import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from diffusers.models.transformers import transformer_ltx, transformer_wan
from tiny_ltx import tiny_ltx_pipeline
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import GNA, Layout, RadialProcessor, plan
from dit_accel.diffusers import engines
from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.pipelines.freeswim import SCALE_FACTOR, FreeSwimPipeline, render_large
from dit_accel.pipelines.freeswim_engine import Clock
from dit_accel.step import Step
from tiny_models import tiny_pipeline, tiny_run, tiny_transformer

SIZE = {"height": 112, "width": 80, "num_frames": 5}  # a grid of 2 x 7 x 5 tokens
NATIVE = (48, 48)  # windows of 3 x 3 tokens


def swim(pipe, cache_steps=2, **settings):
    return FreeSwimPipeline(pipe, cache_steps, **{"native_size": NATIVE, "backend": "gather", **settings})


def ltx_run(pipe, **settings):
    settings = {"height": 32, "width": 64, "num_frames": 5, "guidance_scale": 3.0, "prompt": "a red ball", **settings}
    return pipe(
        num_inference_steps=4, max_sequence_length=8, output_type="latent", generator=torch.Generator().manual_seed(0),
        **settings,
    ).frames  # fmt: skip


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# The window, by the rule of the released code.


def inward(length, d):
    """bool (length, length): rows y - d - o .. y + d + u, u what the window lacks below, o what it lacks above."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for y in range(length):
        u, o = max(d - y, 0), max(d + y - length + 1, 0)
        seen[y, max(y - d - o, 0) : y + d + u + 1] = True
    return seen


def inward_mask(grid, d_h, d_w):
    t, h, w = grid
    axes = ((h, d_h), (w, d_w))
    rows, columns = (inward(n, d) if 2 * d + 1 <= n else torch.ones(n, n, dtype=torch.bool) for n, d in axes)
    frame = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(h * w, h * w)
    return frame.repeat(t, t)


@pytest.mark.parametrize(("grid", "native"), [((2, 7, 5), (48, 48)), ((3, 9, 4), (80, 240)), ((1, 5, 11), (48, 112))])
def test_f1_f2_the_window_is_the_released_one(grid, native):
    d_h, d_w = native[0] // 16 // 2, native[1] // 16 // 2
    found = plan(None, None, None, GNA.inward(native), layout=Layout(grid=grid)).token_mask()[0, 0]
    assert torch.equal(found, inward_mask(grid, d_h, d_w))
    assert found.sum(1).unique().tolist() == [grid[0] * min(2 * d_h + 1, grid[1]) * min(2 * d_w + 1, grid[2])]


def test_f5_the_softmax_scale():
    squared = SCALE_FACTOR**2
    assert squared == pytest.approx(1.0942744, abs=5e-8)
    pipe = tiny_pipeline()
    assert swim(pipe).method(pipe.transformer).window == (-1, 3, 3)
    assert swim(pipe).method(pipe.transformer).scale == pytest.approx(math.sqrt(1.0942744 / 12))
    assert swim(pipe, scale_factor=1.0).method(pipe.transformer).scale == pytest.approx(12**-0.5)


# The dual path, by hand.


class ByHand:
    """Rows come in pairs (window, full). ``text``: cross-attention, with queries of the full rows only."""

    def __init__(self, mask, scale, text=False):
        self.mask, self.scale, self.text = mask, scale, text

    def attend(self, q, k, v, mask=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.text:
            mask = None if mask is None else mask[1::2]
            out = scaled_dot_product_attention(q[1::2], k[1::2], v[1::2], attn_mask=mask)
            return out.repeat_interleave(2, 0).transpose(1, 2)
        window = scaled_dot_product_attention(q[::2], k[::2], v[::2], attn_mask=self.mask, scale=self.scale)
        full = scaled_dot_product_attention(q[1::2], k[1::2], v[1::2], scale=self.scale)
        return torch.stack([window, full], 1).flatten(0, 1).transpose(1, 2)


def patch(monkeypatch, module, model, layers, by_hand):
    """Run the stock processors of ``layers`` on ``by_hand`` instead of the dispatcher."""
    active = []
    for name in layers:
        text = name.endswith("attn2")
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, text=text: active.append(text))
    monkeypatch.setattr(
        module, "dispatch_attention_fn",
        lambda q, k, v, attn_mask=None, **_: by_hand[active[-1]].attend(q, k, v, attn_mask),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_a_guided_forward_is_the_dual_path_written_by_hand(family, monkeypatch):
    module = {"wan": transformer_wan, "ltx": transformer_ltx}[family]
    model, call, layout = tiny_transformer(family, batch=2)
    if family == "ltx":
        call["encoder_attention_mask"][0, 5:] = 0  # one prompt is shorter
    pipe = {"wan": tiny_pipeline, "ltx": tiny_ltx_pipeline}[family]()
    pipe.transformer = model
    native = NATIVE if family == "wan" else (12, 12)
    with torch.no_grad(), swim(pipe, None, native_size=native).attached():
        out = model(**call, return_dict=False)[0]
    twice = {k: v.repeat_interleave(2, 0) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    scale = math.sqrt(1.0942744 / model.config.attention_head_dim)
    by_hand = [ByHand(inward_mask(layout.grid, 1, 1), scale, text) for text in (False, True)]
    names = [name for name, _ in model.named_modules() if name.endswith((".attn1", ".attn2"))]
    patch(monkeypatch, module, model, names, by_hand)
    with torch.no_grad():
        expected = model(**twice, return_dict=False)[0][::2]
    close(out, expected)


def test_f3_with_every_step_a_guide_the_cached_conditional_pass_is_the_uncached_one():
    pipe = tiny_pipeline()
    runs = [tiny_run(swim(pipe, n), guidance_scale=1.0, **SIZE) for n in (1, None)]
    assert torch.equal(*runs)
    assert not torch.allclose(runs[0], tiny_run(swim(pipe, 3), guidance_scale=1.0, **SIZE), atol=1e-5)
    assert not torch.allclose(runs[0], tiny_run(pipe, guidance_scale=1.0, **SIZE), atol=1e-4)


def test_f4_the_cross_attention_of_a_block_does_not_depend_on_the_window_row():
    model, call, _ = tiny_transformer("wan", batch=1)
    pipe = tiny_pipeline()
    pipe.transformer = model
    cross, seen = model.blocks[1].attn2, []
    hidden = torch.randn(2, 90, 24)

    def peek(module, args, output):
        if not seen:
            text = args[1]
            with torch.no_grad():
                changed = hidden.clone()
                changed[0] += 1
                seen.extend(torch.stack(list(module.forward(x, text))) for x in (hidden, changed, hidden.flip(0)))

    handle = cross.register_forward_hook(peek)
    with torch.no_grad(), swim(pipe, None).attached() as (engine,):
        model(**call)
        assert engine.counts.full_rows == 1
    handle.remove()
    before, changed, swapped = seen
    assert torch.equal(before[0], before[1])
    assert torch.equal(before, changed)
    assert not torch.allclose(before, swapped)


# Whole pipelines.


def watched(model):
    """Batch sizes that arrive at the first block's self-attention, forward by forward."""
    sizes = []
    first = model.get_submodule("blocks.0.attn1" if hasattr(model, "blocks") else "transformer_blocks.0.attn1")

    def note(module, args, kwargs):
        sizes.append((args[0] if args else kwargs["hidden_states"]).shape[0])

    return sizes, first.register_forward_pre_hook(note, with_kwargs=True)


def test_only_guide_steps_carry_the_full_row():
    pipe = tiny_pipeline()
    sizes, handle = watched(pipe.transformer)
    fs = swim(pipe, 2)
    tiny_run(fs, steps=5, **SIZE)
    handle.remove()
    assert sizes == [2, 1, 1, 1, 2, 1, 1, 1, 2, 1]  # conditional and unconditional forwards of five steps
    assert fs.report() == {
        "forwards": 10, "guide_forwards": 3, "window_rows": 10, "full_rows": 3,
        "cross_rows": 3 * (3 + 5), "cross_reused": 3 * 2,
    }  # fmt: skip


def test_without_a_cache_every_forward_carries_it():
    pipe = tiny_pipeline()
    sizes, handle = watched(pipe.transformer)
    fs = swim(pipe, None)
    tiny_run(fs, steps=2, **SIZE)
    handle.remove()
    assert sizes == [2, 2, 2, 2]
    assert fs.counts.cross_reused == 0


def test_light_steps_do_not_compute_the_conditional_cross_attention(monkeypatch):
    pipe, stock, calls = tiny_pipeline(), transformer_wan.dispatch_attention_fn, Counter()

    def counting(query, key, value, **kwargs):
        calls["full" if query.shape[1] == key.shape[1] else "cross"] += query.shape[0]
        return stock(query, key, value, **kwargs)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", counting)
    tiny_run(swim(pipe, 2), steps=4, guidance_scale=1.0, **SIZE)
    assert calls == {"full": 3 * 2, "cross": 3 * 2}  # three blocks, two guide steps out of four


def test_the_reused_output_is_the_guide_step_s():
    """The unconditional pass is windows alone, and light conditional passes see the text through old eyes."""
    pipe = tiny_pipeline()
    fs = swim(pipe, 2)
    with fs.attached() as (engine,):
        kept, attend = [], engine._attend_text

        def spy(layer, call):
            out = attend(layer, call)
            kept.append((engine._clock.ordinal, engine.forward.step.branch, layer, out.clone()))
            return out

        engine._attend_text = spy
        tiny_run(pipe, steps=4, **SIZE)
    cond = {(step, layer): out for step, branch, layer, out in kept if branch == "cond"}
    uncond = {(step, layer): out for step, branch, layer, out in kept if branch == "uncond"}
    for layer in {layer for _, layer in cond}:
        assert torch.equal(cond[0, layer][:1], cond[1, layer])
        assert torch.equal(cond[0, layer][:1], cond[0, layer][1:])
        assert not torch.equal(cond[1, layer], cond[2, layer][:1])
        assert not torch.equal(uncond[0, layer], uncond[1, layer])


def test_a_batch_is_its_samples():
    pipe, prompts = tiny_pipeline(), ["a red ball runs", "the blue cat falls on grass"]

    def run(prompt, latents):
        return swim(pipe)(
            prompt=prompt, num_inference_steps=3, max_sequence_length=8, output_type="latent", guidance_scale=4.0,
            latents=latents, **SIZE,
        ).frames  # fmt: skip

    latents = torch.randn(2, 4, 2, 14, 10, generator=torch.Generator().manual_seed(1))
    both = run(prompts, latents)
    for number, prompt in enumerate(prompts):
        close(both[number : number + 1], run(prompt, latents[number : number + 1]))


def test_ltx_guidance_in_one_batch():
    pipe = tiny_ltx_pipeline()
    sizes, handle = watched(pipe.transformer)
    fs = swim(pipe, 2, native_size=(12, 28))
    guided = ltx_run(fs)
    assert sizes == [3, 2, 3, 2]
    assert fs.counts.cross_reused == 2 * 2
    sizes.clear()
    alone = ltx_run(swim(pipe, 2, native_size=(12, 28)), guidance_scale=1.0)
    assert sizes == [2, 1, 2, 1]
    sizes.clear()
    ltx_run(swim(pipe, None, native_size=(12, 28)))
    assert sizes == [4, 4, 4, 4]
    handle.remove()
    assert guided.isfinite().all()
    assert not torch.equal(guided, alone)


def test_ltx_unguided_cached_every_step_is_uncached():
    pipe = tiny_ltx_pipeline()
    runs = [ltx_run(swim(pipe, n, native_size=(12, 28)), guidance_scale=1.0) for n in (1, None)]
    assert torch.equal(*runs)


def test_each_of_two_denoisers_starts_with_a_guide_step():
    pipe = tiny_pipeline(two_transformers=True)
    watch = [watched(model) for model in (pipe.transformer, pipe.transformer_2)]
    tiny_run(swim(pipe, 4), steps=6, guidance_scale=1.0, **SIZE)
    first, second = (sizes for sizes, _ in watch)
    assert first[0] == second[0] == 2
    assert len(first) + len(second) == 6
    assert sum(first) + sum(second) <= 6 + 3


def test_image_to_video_keeps_image_and_text_results_apart():
    """Two primitives per cross-attention: both are led, and both are reused."""
    model = transformer_wan.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", image_dim=16,
        added_kv_proj_dim=24, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    pipe = tiny_pipeline()
    pipe.transformer = model
    call = {
        "hidden_states": torch.randn(1, 4, 2, 10, 12), "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, 257, 16), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad(), swim(pipe, 2).attached() as (engine,):
        engine.tracker.poll = lambda timestep: Step(index=int(1000 - timestep.max()), branch="cond")
        outs = [model(timestep=torch.tensor([t]), **call)[0] for t in (1000, 999, 998)]
    assert engine.counts.cross_reused == 2 * 2
    assert engine.counts.cross_rows == 2 * 2 * 2
    assert all(out.shape == (1, 4, 2, 10, 12) for out in outs)


def test_the_whole_recipe_over_the_stock_video_to_video_pipeline(monkeypatch):
    made = []
    counted = FreeSwimPipeline.__call__
    monkeypatch.setattr(FreeSwimPipeline, "__call__", lambda self, **kw: (made.append(self), counted(self, **kw))[1])
    pipe = tiny_pipeline()
    frames = render_large(
        pipe, "a red ball runs", size=(80, 64), native_size=(48, 48), num_frames=5, num_inference_steps=6,
        negative_prompt="slow", max_sequence_length=8, generator=torch.Generator().manual_seed(0), backend="gather",
    )  # fmt: skip
    assert frames.shape == (1, 5, 80, 64, 3)
    (large,) = made
    assert isinstance(large.pipe, WanVideoToVideoPipeline)
    assert large.pipe.scheduler.config.shift == 9.0
    assert pipe.scheduler.config.shift == 3.0
    assert large.pipe.video_processor is pipe.video_processor
    # int(6 * 0.7) = 4 steps, two passes each, every other conditional one with its full row.
    assert (large.counts.forwards, large.counts.guide_forwards) == (8, 2)


def test_the_pipeline_is_as_before_even_after_an_error():
    pipe = tiny_pipeline()
    stock = tiny_run(pipe, **SIZE)
    processors = dict(pipe.transformer.attn_processors)
    hooks = len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks)
    tiny_run(swim(pipe), **SIZE)
    with pytest.raises(RuntimeError, match="stop"):
        tiny_run(swim(pipe), callback_on_step_end=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")), **SIZE)
    after = pipe.transformer.attn_processors
    assert all(after[name] is processors[name] for name in processors)
    assert (len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks)) == hooks
    assert engines(pipe) == []
    assert torch.equal(tiny_run(pipe, **SIZE), stock)


def test_another_accelerated_attention_comes_back():
    pipe = tiny_pipeline()
    pipe.set_attn_processor(RadialProcessor(block_size=32, backend="gather"))
    before, radial = engines(pipe), tiny_run(pipe, **SIZE)
    tiny_run(swim(pipe), **SIZE)
    assert engines(pipe) == before
    sparse = before[0].stats.sparse
    assert torch.equal(tiny_run(pipe, **SIZE), radial)
    assert before[0].stats.sparse == 2 * sparse


def test_a_fault_repeats_the_forward_with_its_rows(monkeypatch):
    from dit_accel.diffusers import engine as seam

    stock, calls = seam.attend, []

    def faulty(*args, **kwargs):
        calls.append(args)
        # The first of three layers, in the forward and in its repeat.
        return stock(*args, **kwargs) * (math.nan if len(calls) in (1, 4) else 1)

    pipe = tiny_pipeline()
    monkeypatch.setattr(seam, "attend", faulty)
    with swim(pipe).attached() as (engine,):
        out = tiny_run(pipe, steps=2, **SIZE)
    assert out.isfinite().all()
    assert engine.stats.repeats == 1
    assert engine.stats.guard_events[0]["layer"] == 0


@pytest.mark.slow
def test_compiled_blocks_give_the_same():
    pipe = tiny_pipeline()
    expected = tiny_run(swim(pipe), steps=2, guidance_scale=1.0, **SIZE)
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    close(tiny_run(swim(pipe), steps=2, guidance_scale=1.0, **SIZE), expected)


def test_the_clock_counts_steps_whatever_their_index():
    clock = Clock()
    found = []
    for index in (0, 0, 16, 16, 17, 17):  # video-to-video: the scheduler knows its index after the first step only
        clock.tick(Step(index=index, total=50))
        found.append((clock.ordinal, clock.forwards))
    assert found == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize("cache_steps", [0, -1, True, 1.5])
def test_cache_steps_must_be_a_count(cache_steps):
    with pytest.raises(UsageError, match="cache_steps is the number of steps"):
        swim(tiny_pipeline(), cache_steps)


def test_the_native_size_must_be_known():
    pipe = tiny_pipeline()
    with pytest.raises(UsageError, match=r"with 2 heads is not known; give native_size=\(height, width\)"):
        FreeSwimPipeline(pipe)
    config = pipe.transformer.config
    pipe.transformer.register_to_config(num_attention_heads=12)
    assert FreeSwimPipeline(pipe).method(pipe.transformer).window == (-1, 31, 53)
    assert config is not pipe.transformer.config


def test_joint_attention_is_refused():
    pipe = tiny_pipeline()
    pipe.transformer = tiny_transformer("hunyuan-video")[0]
    with pytest.raises(UnsupportedError, match="HunyuanVideoTransformer3DModel is of family 'hunyuan-video'"):
        swim(pipe)
    with pytest.raises(UnsupportedError, match="which exists for a WanPipeline with one transformer"):
        render_large(tiny_ltx_pipeline(), "a red ball")


def test_one_graph_around_the_model_is_refused(monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UnsupportedError, match="compile the blocks instead"), swim(pipe).attached():
        pipe.transformer(torch.randn(1, 4, 2, 8, 8), torch.tensor([5]), torch.randn(1, 4, 16))
