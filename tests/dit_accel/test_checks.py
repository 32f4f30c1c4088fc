"""Bad values are refused where they are given, in one form: what was wrong, the value seen, what is allowed."""

import numpy as np
import pytest
import torch

from dit_accel import (
    GNA,
    AdaSpa,
    Clear,
    Guard,
    Layout,
    Method,
    Pisa,
    Processor,
    Pyramid,
    Quant,
    Radial,
    RadialProcessor,
    RandomBlocks,
    Rectified,
    Schedule,
    UsageError,
    VMoBA,
)  # fmt: skip
from dit_accel.eval.vbench import DIMENSIONS, totals
from dit_accel.layout import Segment
from dit_accel.methods import AllBlocks
from dit_accel.pipelines.streaming import CacheConfig
from dit_accel.pipelines.streaming.steps import Steps

LAYOUT = Layout(grid=(4, 8, 10))
PC = {"policy": "deep_sink+pc", "sink_frames": 10}
EMA = {"policy": "ema_sink", "sink_frames": 3}


@pytest.mark.filterwarnings("ignore:Clear is experimental")
@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        (Layout, {"grid": (1, 2, 2.5)}, r"three positive integers.*got \(1, 2, 2\.5\)"),
        (Layout, {"grid": 5}, r"three positive integers.*got 5\. Example"),
        (Layout, {"grid": "abc"}, "three positive integers.*got 'abc'"),
        (Layout, {"grid": (True, 2, 3)}, "got .True"),
        (Layout, {"grid": (1, 2, 3), "text": 2.5}, "whole number of tokens.*got 2.5"),
        (Layout, {"grid": (1, 2, 3), "prefix": "a"}, "whole number of tokens.*got 'a'"),
        (Layout, {"segments": [("main", (1, 2, 3))]}, "holds Segments"),
        (Segment, {"kind": "main", "size": (1, 2)}, r"grid of three.*got \(1, 2\)"),
        (RadialProcessor, {"schedule": 0.25}, r"schedule is a Schedule such as Schedule\(first=0.25\).*got 0.25"),
        (RadialProcessor, {"guard": True}, r"guard is a Guard such as.*Guard.off\(\).*got True"),
        (Processor, {"method": Radial}, r"method such as Radial\(\).*got the class Radial"),
        (Processor, {"method": "radial"}, "got 'radial'"),
        (Processor, {"method": None, "quant": []}, r"quant \[\] is unknown"),
        (Radial, {"decay": "a"}, "positive; got 'a'"),
        (Radial, {"decay": np.inf}, "got inf"),
        (Radial, {"block_size": "64"}, "block_size is a number of tokens, at least 1; got '64'"),
        (Radial, {"block_size": 64.5}, "got 64.5"),
        (Radial, {"block_size": True}, "got True"),
        (Radial, {"sink_frames": -1}, "sink_frames is a number of frames, at least 0; got -1"),
        (Pisa, {"block_size": 64.5}, "got 64.5"),
        (Pisa, {"density": "a"}, r"kept fraction and lies in \(0, 1\]; got 'a'"),
        (Pisa, {"density": True}, "got True"),
        (Pisa, {"order": ["hybrid"]}, r"\['hybrid'\]; choose one of zeroth"),
        (Pisa, {"norm_bias": "no"}, "norm_bias is True or False; got 'no'"),
        (Rectified, {"block_size": 64.5}, "got 64.5"),
        (Rectified, {"top_p": "a"}, "share of the pooled attention, 0 to 1; got 'a'"),
        (Rectified, {"top_p": float("nan")}, "got nan"),
        (Rectified, {"neighbors": "no"}, "neighbors is True or False; got 'no'"),
        (Pyramid, {"block_q": 1.5}, "block_q is a number of tokens, at least 1; got 1.5"),
        (Pyramid, {"levels": 3}, r"levels holds.*like \(1, 2, 4, 8\); got 3"),
        (Pyramid, {"levels": "1248"}, "got '1248'"),
        (Pyramid, {"bounds": ("a", "b", "c", "d")}, "share per level.*got 'a'"),
        (Pyramid, {"min_level1": None}, "min_level1 is a share.*got None"),
        (Pyramid, {"seed": "a"}, "seed is a whole number; got 'a'"),
        (RandomBlocks, {"seed": "a"}, "seed is a whole number; got 'a'"),
        (RandomBlocks, {"block_size": 0}, "at least 1; got 0"),
        (AllBlocks, {"block_size": 1.5}, "got 1.5"),
        (VMoBA, {"select": "threshold", "tau": "x"}, "tau is the share of the total weight.*got 'x'"),
        (VMoBA, {"k": "x"}, "got 'x'"),
        (VMoBA, {"k": (1, 2, True)}, "number of chunks"),
        (VMoBA, {"scope": 3}, "scope is 3; choose one of"),
        (AdaSpa, {"search_steps": 3}, r"search_steps holds.*for example \(9, 29\).*got 3"),
        (AdaSpa, {"block_size": "x"}, "block_size is a number of tokens, at least 1; got 'x'"),
        (GNA, {"window": True}, "got True"),
        (GNA, {"scale": "a"}, "scale is a positive softmax scale.*got 'a'"),
        (GNA, {"scale_factor": 0}, "scale_factor is a positive factor.*got 0"),
        (Clear, {"radius": True}, "got True"),
        (Clear, {"pool": 2.5}, "2 or more, or None; got 2.5"),
        (Schedule, {"first": "a"}, r"step count.*fraction.*got 'a'"),
        (Schedule, {"first": True}, "got True"),
        (Schedule, {"last": float("nan")}, "got nan"),
        (Schedule, {"layers": 2.5}, "got 2.5"),
        (Schedule, {"layers": ["a"]}, "layer indices.*got 'a'"),
        (Schedule, {"steps": 3}, r"steps holds step indices, like \{0, 20\}; got 3"),
        (Schedule, {"table": {(1, 2, 3)}}, "pairs of a step and a layer"),
        (Guard, {"rate": "a"}, r"share of the calls in \(0, 1\]; got 'a'"),
        (Guard, {"fault": "yes"}, "fault is True or False; got 'yes'"),
        (Guard, {"drift": True, "budget": "a"}, "budget"),
        (CacheConfig, {**PC, "pc_recent": 4.5}, "pc_recent is a whole number of latent frames.*got 4.5"),
        (CacheConfig, {**PC, "pc_budget": "16"}, "pc_budget is a whole number of latent frames.*got '16'"),
        (CacheConfig, {"max_frames": 0}, "max_frames is a whole number of latent frames, at least 1; got 0"),
        (CacheConfig, {**EMA, "ema_alpha": "a"}, "share of the old sink, 0 to 1; got 'a'"),
        (CacheConfig, {**PC, "key_storage": "roped", "positions": "absolute"}, "contradicts"),
        (CacheConfig, {"key_storage": "roped"}, "they need positions='absolute'"),
        (Steps, {"times": 3}, "times holds denoising times.*got 3"),
        (Steps, {"shift": "a"}, "shift is a positive factor; got 'a'"),
    ],
)  # fmt: skip
def test_refused_where_it_is_given(make, settings, told):
    with pytest.raises(UsageError, match=told):
        make(**settings)


@pytest.mark.parametrize("method", [Radial, Pisa, Rectified, Pyramid, VMoBA, AdaSpa, GNA], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("wanted", ["a", None, 0, 1.5, True], ids=repr)
def test_a_density_that_is_none(method, wanted):
    with pytest.raises(UsageError, match="density is the kept fraction"):
        method().with_density(wanted, LAYOUT)


def test_unknown_fields_are_named_with_the_known_ones():
    with pytest.raises(UsageError, match="Radial has no field decai; it has decay, block_size"):
        Method.from_dict({"method": "radial", "decai": 1})
    for cls, name in ((Schedule, "fist"), (Guard, "ratio"), (Quant, "bits")):
        with pytest.raises(UsageError, match=f"{cls.__name__} has no field {name}"):
            cls.from_dict({name: 1})
    with pytest.raises(UsageError, match="unknown method"):
        Method.from_dict({"method": 5})


def test_scores_of_another_kind_are_no_scores():
    scores = dict.fromkeys(DIMENSIONS, 0.5)
    for bad in (None, "0.5", True):
        with pytest.raises(UsageError, match="scene must be the package's own score"):
            totals({**scores, "scene": bad})


def test_numbers_of_numpy_become_plain_ones():
    assert Radial(decay=np.float32(0.5), block_size=np.int64(64)) == Radial(decay=0.5, block_size=64)
    assert type(Radial(block_size=np.int64(64)).block_size) is int
    assert Layout(np.array([2, 3, 4]), text=np.int32(5)) == Layout((2, 3, 4), text=5)
    assert type(Layout(np.array([2, 3, 4])).grid[0]) is int
    assert Layout(torch.tensor([2, 3, 4])) == Layout((2, 3, 4))
    assert Schedule(first=np.float64(0.5), layers=np.int64(2)) == Schedule(first=0.5, layers=2)
    assert type(Schedule(first=np.int64(2)).first) is int
    assert AdaSpa(search_steps=np.array([1, 3])).search_steps == (1, 3)
    assert VMoBA(k=np.int64(2)).k == 2
    assert Rectified(neighbors=np.bool_(False)).neighbors is False
    assert GNA(window=(np.int64(4),) * 3).window == (4, 4, 4)


def test_segments_given_as_lists_stay_hashable():
    assert hash(Segment("main", [1, 2, 3])) == hash(Segment("main", (1, 2, 3)))
    assert Layout(segments=[Segment("main", [1, 2, 3])]) == Layout((1, 2, 3))


def test_policies_whose_keys_may_be_roped():
    # Self-Forcing and the first LongLive stored keys rotated at their absolute frame (streaming spec, section 3).
    assert CacheConfig(key_storage="roped", positions="absolute").key_storage == "roped"
    assert CacheConfig("sink", sink_frames=3, key_storage="roped", positions="absolute").positions == "absolute"
