"""Where in the run: from the pipeline's context, from its scheduler, from the timestep alone."""

import gc
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)
from PIL import Image

from dit_accel import AllBlocksProcessor, Schedule, set_attn_processor
from dit_accel.diffusers import engines
from dit_accel.diffusers.tracker import StepTracker
from tiny_models import WAN, tiny_pipeline, tiny_run, tiny_transformer


def steps_of(tracker, timesteps):
    return [tracker.poll(torch.tensor([value])).index for value in timesteps]


def log_steps(engine):
    """Every step that the engine saw, from now on."""
    seen, begin = [], engine.begin

    def logged(timestep, read):
        begin(timestep, read)
        seen.append(engine.forward.step)

    engine.begin = logged
    return seen


def test_context_wins_over_the_scheduler():
    scheduler = SimpleNamespace(timesteps=torch.tensor([9.0, 5.0]), step_index=1, sigmas=torch.tensor([0.9, 0.5]))
    tracker = StepTracker(lambda: scheduler)
    with tracker.context(name="uncond", step_index=3, num_inference_steps=7, sigma=0.25):
        step = tracker.poll(torch.tensor(5.0))
    assert (step.index, step.total, step.sigma, step.branch) == (3, 7, 0.25, "uncond")


def test_a_context_with_a_name_alone_leaves_the_step_to_the_scheduler():
    scheduler = SimpleNamespace(timesteps=torch.tensor([9.0, 5.0]), step_index=1, sigmas=torch.tensor([0.9, 0.5, 0.0]))
    tracker = StepTracker(lambda: scheduler)
    with tracker.context(name="cond_uncond"):
        step = tracker.poll(torch.tensor(5.0))
    assert (step.index, step.total, step.sigma, step.branch) == (1, 2, 0.5, "")
    assert tracker.poll(torch.tensor(5.0)).branch == ""


def test_a_scheduler_that_has_not_stepped_is_at_its_begin_index():
    scheduler = SimpleNamespace(timesteps=torch.tensor([9.0, 5.0, 1.0]), step_index=None, begin_index=2)
    assert StepTracker(lambda: scheduler).poll(torch.tensor(1.0)).index == 2


def test_a_scheduler_without_step_index_is_asked_for_the_value():
    scheduler = SimpleNamespace(timesteps=torch.tensor([999, 749, 499, 249]))
    assert steps_of(StepTracker(lambda: scheduler), [999, 999, 749, 499, 249]) == [0, 0, 1, 2, 3]
    scaled = StepTracker(lambda: scheduler, scale=1000.0)
    assert steps_of(scaled, [0.999, 0.749]) == [0, 1]


def test_new_timesteps_begin_a_new_run_and_so_does_a_step_back():
    scheduler = SimpleNamespace(timesteps=torch.tensor([9.0, 5.0]), step_index=0)
    tracker = StepTracker(lambda: scheduler)
    assert [tracker.poll(0).run, tracker.poll(0).run] == [0, 0]
    scheduler.timesteps = torch.tensor([9.0, 5.0])
    assert tracker.poll(0).run == 1
    scheduler.step_index = 1
    assert tracker.poll(0).run == 1
    scheduler.step_index = 0
    assert tracker.poll(0).run == 2


@pytest.mark.parametrize("values", [[900, 600, 300], [0.1, 0.4, 0.8]])
def test_without_a_scheduler_distinct_values_count(values):
    tracker = StepTracker()
    assert steps_of(tracker, [x for x in values for _ in range(2)]) == [0, 0, 1, 1, 2, 2]
    assert tracker.poll(torch.tensor([values[0]])).run == 1
    assert tracker.poll(torch.tensor([values[1]])).index == 1


def test_token_wise_timesteps_count_by_their_noisiest():
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 500.0]))
    assert StepTracker(lambda: scheduler).poll(torch.tensor([[0.0, 500.0, 500.0]])).index == 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_pipeline_run(guidance):
    pipe = tiny_pipeline()
    pipe.set_attn_processor(AllBlocksProcessor(backend="gather", schedule=Schedule(first=0.25, last=1)))
    (engine,) = engines(pipe)
    seen = log_steps(engine)
    tiny_run(pipe, guidance_scale=guidance)
    branches = ["cond", "uncond"] if guidance > 1 else ["cond"]
    assert [(s.index, s.branch) for s in seen] == [(i, branch) for i in range(4) for branch in branches]
    assert {(s.total, s.run) for s in seen} == {(4, 0)}
    assert seen[0].sigma > seen[-1].sigma
    calls = len(branches) * len(engine.stats.layers)
    assert (engine.stats.sparse, engine.stats.dense) == (2 * calls, {"schedule": 2 * calls})
    tiny_run(pipe, guidance_scale=guidance)
    assert {s.run for s in seen} == {0, 1}


def test_two_transformers_see_global_steps():
    pipe = tiny_pipeline(two_transformers=True)
    pipe.set_attn_processor(AllBlocksProcessor(backend="gather", schedule=Schedule(first=1)))
    logs = [log_steps(engine) for engine in engines(pipe)]
    tiny_run(pipe, guidance_scale=1.0)
    assert [[s.index for s in log] for log in logs] == [[0, 1], [2, 3]]
    assert {s.total for log in logs for s in log} == {4}
    first, second = (engine.stats.dense for engine in engines(pipe))
    assert first == {"schedule": 3}
    assert second == {}, "the first steps of the run are dense, not the first steps of each model"


def test_a_scheduler_swapped_after_the_processor_was_set():
    pipe = tiny_pipeline()
    pipe.set_attn_processor(AllBlocksProcessor(backend="gather"))
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    seen = log_steps(engines(pipe)[0])
    tiny_run(pipe, steps=3, guidance_scale=1.0)
    assert [(s.index, s.total) for s in seen] == [(0, 3), (1, 3), (2, 3)]


class Loop:
    def __init__(self, transformer, scheduler):
        self.components = {"transformer": transformer}
        self.scheduler = scheduler


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("make", [CogVideoXDDIMScheduler, HeunDiscreteScheduler])
def test_a_hand_written_loop(make, batched):
    """A loop that names no context: a scheduler without step_index, one with doubled steps; guidance batched or not."""
    scheduler = make()
    model, call, _ = tiny_transformer("cogvideox", batch=2 if batched else 1)
    pipe = Loop(model, scheduler)
    set_attn_processor(pipe, AllBlocksProcessor(backend="gather"))
    seen = log_steps(engines(pipe)[0])
    scheduler.set_timesteps(3)
    sample = call["hidden_states"]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            for _ in range(1 if batched else 2):
                noise = model(**{**call, "hidden_states": sample, "timestep": timestep.expand(len(sample))}).sample
            sample = scheduler.step(noise, timestep, sample).prev_sample
    assert sorted({s.index for s in seen}) == list(range(len(scheduler.timesteps)))
    assert {(s.total, s.run) for s in seen} == {(len(scheduler.timesteps), 0)}


def test_an_unknown_number_of_steps_is_told():
    model, call, _ = tiny_transformer("wan")
    model.set_attn_processor(AllBlocksProcessor(backend="gather"))
    with torch.no_grad():
        model(**call)
    (warning,) = engines(model)[0].stats.warnings
    assert "number of steps of this run is not known" in warning


def test_a_run_that_begins_midway_is_found_by_its_timestep():
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 700.0, 500.0, 300.0]), step_index=None, begin_index=None)
    tracker = StepTracker(lambda: scheduler, scale=1000.0)
    assert steps_of(tracker, [0.5]) == [2]
    scheduler.step_index = 3
    step = tracker.poll(torch.tensor([0.3]))
    assert (step.index, step.total, step.run) == (3, 4, 0)
    # Rounded to the model's precision it is still the nearest one.
    scheduler.timesteps, scheduler.step_index = torch.tensor([1000.0, 997.0, 500.6, 300.0]), None
    assert steps_of(tracker, [0.997, torch.tensor(0.5006, dtype=torch.bfloat16)]) == [1, 2]


def test_a_number_of_another_kind_is_the_first_step_until_the_scheduler_steps():
    scheduler = SimpleNamespace(timesteps=torch.tensor([1.1, 0.4, -0.2]), step_index=None, begin_index=None)
    tracker = StepTracker(lambda: scheduler)
    assert steps_of(tracker, [80.0, 80.0]) == [0, 0]
    scheduler.step_index = 1
    step = tracker.poll(torch.tensor([3.0]))
    assert (step.index, step.total, step.run) == (1, 3, 0)


@pytest.mark.parametrize("ended", [False, True], ids=["never-ran", "at-its-end"])
def test_a_scheduler_of_another_pipeline_is_not_believed(ended):
    """Two pipelines share a transformer and the processor was set on the one that does not run."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if ended:
        scheduler.set_timesteps(2)
        for timestep in scheduler.timesteps:
            scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    tracker = StepTracker(lambda: scheduler)
    steps = [tracker.poll(torch.tensor([value])) for value in (1000.0, 1000.0, 871.5, 612.25, 254.75)]
    assert [step.index for step in steps] == [0, 0, 1, 2, 3]
    assert steps[-1].total is None


def test_a_pipeline_made_of_the_components_of_one_that_is_gone():
    first = tiny_pipeline()
    first.set_attn_processor(AllBlocksProcessor(backend="gather"))
    pipe = WanVideoToVideoPipeline(
        **{name: value for name, value in first.components.items() if name not in ("transformer_2",)}
    )
    (engine,) = engines(first)
    del first
    gc.collect()
    seen = log_steps(engine)
    pipe.set_progress_bar_config(disable=True)
    video = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(5)]
    pipe(video=video, prompt="a red ball", height=16, width=16, num_inference_steps=8, strength=0.5, guidance_scale=1.0)
    assert [(s.index, s.total, s.run) for s in seen] == [(i, 8, 0) for i in range(4, 8)]
    assert engine.stats.warnings == []


@pytest.mark.parametrize("ar_step", [0, 2])
def test_frames_that_step_copies_of_the_scheduler(ar_step):
    """SkyReels' diffusion forcing: the pipeline's own scheduler never steps, frames lag behind one another."""
    wan = tiny_pipeline()
    pipe = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=wan.tokenizer, text_encoder=wan.text_encoder, vae=wan.vae,
        transformer=SkyReelsV2Transformer3DModel(**WAN).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.set_attn_processor(AllBlocksProcessor(backend="gather", schedule=Schedule(first=0.25)))
    (engine,) = engines(pipe)
    seen = log_steps(engine)
    lag = {"ar_step": ar_step, "causal_block_size": 1} if ar_step else {}
    for run in range(2):
        seen.clear()
        pipe(
            prompt="a red ball", height=16, width=16, num_frames=9, num_inference_steps=8, guidance_scale=1.0,
            output_type="latent", **lag,
        )  # fmt: skip
        order = [s.index for s in seen]
        assert order == sorted(order)
        assert set(order) == set(range(8))
        assert {(s.total, s.run) for s in seen} == {(8, run)}
    assert engine.stats.sparse > 0
    assert engine.stats.dense.keys() == {"schedule"}
