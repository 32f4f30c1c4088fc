"""Stock processors: what may be set on a model beside ours, and putting back what diffusers itself would have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..arguments import shown
from ..errors import UnsupportedError, UsageError
from ..methods import Method
from ..processors import PROCESSORS, Processor
from .derive import stock_of

DEFAULT = "default"


def is_default(processor: Any) -> bool:
    return isinstance(processor, str) and processor == DEFAULT


def check(processor: Any, models: list[nn.Module]) -> None:
    """Raise ``UsageError`` for what is no processor, one of ours, a stock one, a dict of these, or ``"default"``.

    diffusers takes anything, and the model then fails in the middle of its forward.
    """
    if isinstance(processor, Processor) or is_default(processor):
        return
    if not isinstance(processor, dict):
        _check_one(processor, "set_attn_processor")
        return
    for name, one in processor.items():
        if isinstance(one, Processor):
            raise UsageError(
                f"{name} is given a {type(one).__name__}, which holds the settings of a whole model. Set it alone, "
                "set_attn_processor(processor); its schedule says which layers stay dense"
            )
        _check_one(one, name)
    for model in models:
        # Without a list of its own a model takes no stock processor at all, which is told when it is set.
        names = getattr(model, "attn_processors", processor).keys()
        wrong = sorted(processor.keys() ^ names)
        if wrong:
            raise UsageError(
                f"the dict of processors has {len(processor)} names and {type(model).__name__} has {len(names)} "
                f"attention layers; they differ in {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}. "
                "model.attn_processors has the right ones"
            )


def unwrapped(processor: Any) -> Any:
    """The processor without anything of ours, in a dict of its own: diffusers empties the one it is given."""
    if isinstance(processor, dict):
        return {name: stock_of(one) for name, one in processor.items()}
    return stock_of(processor)


def repair(model: nn.Module) -> None:
    """Give every attention module that holds no working processor the one that a new model has there.

    Raises ``UnsupportedError`` where diffusers cannot make such a model from this one's configuration.
    """
    broken = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "set_processor") and hasattr(module, "processor") and _is_broken(module.processor)
    }
    if not broken:
        return
    try:
        with torch.device("meta"):
            fresh = type(model).from_config(model.config)
        found = {name: fresh.get_submodule(name).processor for name in broken}
    except Exception as error:
        name, module = next(iter(broken.items()))
        raise UnsupportedError(
            f"{name} of {type(model).__name__} holds {shown(module.processor)}, and what stood there before cannot be "
            f"made again ({type(error).__name__}: {str(error)[:80]}); load the model again"
        ) from error
    for name, module in broken.items():
        module.set_processor(found[name])


def _is_broken(processor: Any) -> bool:
    return not callable(processor) or isinstance(processor, (type, Processor))


def _check_one(processor: Any, where: str) -> None:
    if _is_broken(processor):
        raise UsageError(f"{where} is given {shown(processor)}, which is no processor. {_advice(processor)}")


def _advice(value: Any) -> str:
    """What to type in the place of a value that is no processor."""
    if isinstance(value, str) and value in PROCESSORS:
        return f"Use set_attn_processor({PROCESSORS[value].__name__}())"
    if isinstance(value, type) and issubclass(value, Method) and value.name in PROCESSORS:
        return f"Use set_attn_processor({PROCESSORS[value.name].__name__}())"
    if isinstance(value, type):
        return f"Did you forget the brackets? {value.__name__}()"
    if isinstance(value, Method):
        return f"Use set_attn_processor(Processor({type(value).__name__}(...))) for a method of your own settings"
    return f"Processors: {', '.join(cls.__name__ for cls in PROCESSORS.values())}; 'default' puts the stock ones back"
