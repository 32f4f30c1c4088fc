"""Every example of docs/models.md runs, with a tiny transformer of the family in the place of the checkpoint."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny_families import tiny

from dit_accel import set_attn_processor
from dit_accel.diffusers import engines, family_of, known_families

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
EXAMPLES = dict(
    re.findall(r"^### (\S+)\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
)


class Stand:
    """What the example is given for its pipeline: the class's own signature, a tiny transformer, its own call."""

    def __init__(self, cls, name):
        self.cls, self.case = cls, tiny(name)
        self.components = {"transformer": self.case.model}

    def enable_model_cpu_offload(self):
        pass

    set_attn_processor = set_attn_processor

    def __call__(self, **arguments):
        inspect.signature(self.cls.__call__).bind(self, **arguments)
        for _ in range(2):
            out = self.case.out(self.case.model(**self.case.call))
        return SimpleNamespace(frames=[out], images=[out])


@pytest.mark.parametrize("name", EXAMPLES)
@torch.no_grad()
def test_example(name, monkeypatch):
    made = []

    def from_pretrained(cls, checkpoint, **settings):
        made.append(Stand(cls, name))
        return made[-1]

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    scope = {}
    exec(EXAMPLES[name], scope)
    (pipe,) = made
    declared = str(inspect.signature(pipe.cls.__init__).parameters["transformer"].annotation)
    assert type(pipe.case.model).__name__ in declared
    assert family_of(pipe.case.model).name == name
    (engine,) = engines(pipe)
    assert engine.stats.sparse > 0
    assert not engine.stats.fallback
    assert (scope.get("frames") if "frames" in scope else scope["image"]).isfinite().all()


def test_examples_are_of_families_that_are_known():
    assert len(EXAMPLES) == 15
    assert set(EXAMPLES) <= {family.name for family in known_families()}
