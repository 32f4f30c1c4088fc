"""Released causal checkpoints (Self-Forcing, LongLive, Reward Forcing and their kin) into diffusers' Wan transformer.

They are state dicts under Wan's original names, inside a training checkpoint. Loading is renaming; every tensor's
shape is compared first, and a model is changed only when all of them fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DitAccelError, UsageError

# Entries of a training checkpoint that hold a model, the best first: averaged weights are what papers report.
ENTRIES = ("generator_ema", "generator", "model", "state_dict", "generator_lora")
# What wrappers put into names: data-parallel training, activation checkpoints, compilation, Self-Forcing's own.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_PREFIXES = ("base_model.model.", "module.", "generator.", "model.diffusion_model.", "diffusion_model.", "model.")

# Wan's names -> diffusers', in order, on whole name parts. Wan's norm3 stands before the text, diffusers' norm2 does.
_RENAMED = [
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])\.", r".to_\1."),
    (r"\.o\.", ".to_out.0."),
    (r"\.([kv])_img\.", r".add_\1_proj."),
    (r"\.norm_k_img\.", ".norm_added_k."),
]


@dataclass(frozen=True)
class LoadReport:
    """How a checkpoint fits a model. ``entry``: which part of the file. ``mismatched``: name -> shapes (found, wanted).

    ``missing``: of the model, not in the file; ``unexpected``: of the file, not in the model. ``merged``: weights that
    a low-rank adapter was added to.
    """

    entry: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    merged: int = 0

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors of {self.entry!r} fit"]
        if self.merged:
            lines.append(f"{self.merged} of them with the adapter added")
        for what, names in (("missing", self.missing), ("unknown to the model", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {what}: {_some(names)}")
        if self.mismatched:
            shapes = [f"{n} {list(found)} instead of {list(wanted)}" for n, (found, wanted) in self.mismatched.items()]
            lines.append(f"{len(shapes)} of another shape: {_some(shapes)}")
        return "; ".join(lines)


def read_checkpoint(path: str | Path, entry: str | None = None) -> tuple[str, dict[str, Tensor]]:
    """(entry, state dict) of a ``.safetensors`` file or a checkpoint of ``torch.save``, names without wrappers.

    ``entry``: which model of a training checkpoint; default the first of :data:`ENTRIES` there. Code in a file is
    never run. Raises ``UsageError`` where there is no such file or entry, ``DitAccelError`` where it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}; give a .pt, .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            data: Any = load_file(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise DitAccelError(f"{path} could not be read as weights: {type(error).__name__}: {error}") from error
    known = {name: value for name, value in data.items() if isinstance(value, Mapping)}
    if entry is not None or known:
        names = [entry] if entry is not None else [name for name in ENTRIES if name in known]
        if not names or names[0] not in known:
            there = ", ".join(known) or "none, it is a plain state dict"
            raise UsageError(
                f"{path} has no model {entry or 'of a known name'!r}; entries: {there}. Choose with entry="
            )
        entry, data = names[0], known[names[0]]
    state = {_bare(name): value for name, value in data.items() if isinstance(value, Tensor)}
    return entry or "state dict", state


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under diffusers' names; one that has them already is passed on."""
    if any(name.startswith("condition_embedder.") for name in state):
        return dict(state)
    return {_renamed(name): value for name, value in state.items()}


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    entry: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
) -> LoadReport:
    """Load a released causal checkpoint into ``model``, a ``WanTransformer3DModel`` of the same size.

    ``lora``: a low-rank adapter of the checkpoint's format (LongLive comes as a base and an adapter of rank 256), added
    as ``lora_scale`` x B A; the scale is the adapter's alpha / rank. The model keeps its device and dtype. Raises
    ``UsageError`` with the whole report where anything is missing, unknown or of another shape; nothing is changed.
    """
    entry, state = read_checkpoint(path, entry)
    state = renamed(state)
    merged = 0
    if lora is not None:
        merged = _merge(state, renamed(read_checkpoint(lora)[1]), lora_scale)
    report = compare(model, state, entry, merged)
    if not report.ok:
        raise UsageError(f"{path} does not fit this {type(model).__name__}, which was left as it was: {report}")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[name])
    return report


def compare(model: nn.Module, state: Mapping[str, Tensor], entry: str = "state dict", merged: int = 0) -> LoadReport:
    """How ``state``, under diffusers' names, fits ``model``; nothing is loaded."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    both = [name for name in wanted if name in found]
    mismatched = {name: (found[name], wanted[name]) for name in both if found[name] != wanted[name]}
    return LoadReport(
        entry, len(both) - len(mismatched), tuple(name for name in wanted if name not in found),
        tuple(name for name in found if name not in wanted), mismatched, merged,
    )  # fmt: skip


def _bare(name: str) -> str:
    name = _WRAPPERS.sub("", name)
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _merge(state: dict[str, Tensor], lora: Mapping[str, Tensor], scale: float) -> int:
    """Add every B A of ``lora`` to its weight in ``state``; returns how many."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in lora.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", name)
        if found is None:
            raise UsageError(f"{name!r} is no part of a low-rank adapter (names end in lora_A.weight, lora_B.weight)")
        pairs.setdefault(found[1] + ".weight", {})[found[2]] = value
    lost = [name for name, pair in pairs.items() if name not in state or set(pair) != {"A", "B"}]
    if lost:
        raise UsageError(f"{len(lost)} parts of the adapter have no weight in the checkpoint: {_some(lost)}")
    for name, pair in pairs.items():
        weight, delta = state[name].float(), pair["B"].float() @ pair["A"].float()
        if weight.shape != delta.shape:
            raise UsageError(f"the adapter for {name} makes {list(delta.shape)}, the weight is {list(weight.shape)}")
        state[name] = weight + scale * delta
    return len(pairs)


def _some(names: Any, most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
