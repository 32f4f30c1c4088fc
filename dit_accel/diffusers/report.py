"""Description: what an accelerated pipeline runs, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Description:
    """A snapshot. ``str()`` is a table per transformer; :meth:`to_dict` is plain data for JSON."""

    models: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, engines: list[Engine]) -> Description:
        return cls(tuple(_model(engine) for engine in engines))

    def to_dict(self) -> dict[str, Any]:
        return {"models": [dict(model) for model in self.models]}

    def __str__(self) -> str:
        if not self.models:
            return "stock attention: no processor of dit_accel is set"
        return "\n\n".join(_table(model) for model in self.models)


def _model(engine: Engine) -> dict[str, Any]:
    processor, forward = engine.processor, engine.forward
    return {
        "model": type(engine.model).__name__,
        "family": engine.family.name,
        "processor": processor.to_dict(),
        "layout": str(forward.layout) if forward else None,
        "stats": engine.stats.to_dict(),
        "layers": [_layer(i, layer, processor) for i, layer in enumerate(engine.stats.layers)],
    }


def _layer(index: int, layer: Any, processor: Any) -> dict[str, Any]:
    return {
        "layer": index,
        "name": layer.name,
        "kind": layer.kind,
        "method": processor.name,
        "last": layer.last or None,
        "layout": str(layer.layout) if layer.layout else None,
        "tier": next(reversed(layer.tiers), None),
        "tier_reason": layer.tier_reason or None,
        "density": layer.density,
        "sparse": layer.sparse,
        "dense": dict(layer.dense),
        "fallback": layer.fallback,
        "checks": layer.checks,
        "drift": layer.drift,
    }


_COLUMNS = ("layer", "name", "kind", "method", "tier", "density", "sparse", "dense", "fallback", "last")


def _table(model: dict[str, Any]) -> str:
    rows = [_COLUMNS, *([_cell(layer[column]) for column in _COLUMNS] for layer in model["layers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    stats = model["stats"]
    head = [
        f"{model['model']} (family {model['family']}): {_settings(model['processor']['method'])}",
        f"layout {model['layout'] or 'not seen yet'}; {stats['sparse_calls']} sparse calls, "
        f"{sum(stats['dense_calls'].values())} dense, {stats['fallback_calls']} of them fallback; "
        f"effective density {_cell(stats['effective_density'])}",
        *sorted({f"tier {x['tier']}: {x['tier_reason']}" for x in model["layers"] if x["tier"]}),
    ]
    if stats["guard_checks"]:
        drift = stats["drift"]
        told = f"; drift mean {drift['mean']:.3f}, most {drift['max']:.3f}" if drift else ""
        head.append(f"guard: rows of {stats['guard_checks']} calls checked{told}; {len(stats['guard_events'])} layers "
                    "taken out of use")  # fmt: skip
    body = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*head, *body, *(f"warning: {text}" for text in stats["warnings"])])


def _settings(method: dict[str, Any] | None) -> str:
    values = dict(method or {"method": "dense"})
    return ", ".join([values.pop("method"), *(f"{name} {value}" for name, value in values.items())])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{n} {reason}" for reason, n in value.items()) or "0"
    return str(value)
