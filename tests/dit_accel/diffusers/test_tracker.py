"""Where in the run: from the pipeline's context, from its scheduler, from the timestep alone."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler

from dit_accel import AllBlocksProcessor, Schedule, set_attn_processor
from dit_accel.diffusers import engines
from dit_accel.diffusers.tracker import StepTracker
from tiny_models import tiny_pipeline, tiny_run, tiny_transformer


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
