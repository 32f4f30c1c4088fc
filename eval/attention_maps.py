"""Where attention looks: ``python -m dit_accel.eval.attention_maps -o attention.png``.

Softmax mass by frame distance and by distance within the frame, per layer, on sampled query rows of a real run.
The uniform curve is what attention without any structure would give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..diffusers import reset_attn_processor, set_attn_processor
from ..layout import Grid
from ..methods import Call
from ..methods.observe import Observe
from ..pipelines.outputs import write_json
from ..processors import Processor
from ..schedule import Schedule
from .command import output_file, positive


class Distances:
    """Accumulates attention mass by distance for every layer.

    ``rows``: query rows sampled per call. ``by_frame``: float64 (layers, T), ``by_space``: (layers, S), sums over
    rows; S counts rounded Euclidean distances within a frame, in tokens.
    """

    def __init__(self, layers: int, grid: Grid, rows: int = 64, seed: int = 0):
        frames, height, width = grid
        t, y, x = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
        self._place = torch.stack([t, y, x])
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = rows
        reach = round(float(torch.tensor([height - 1.0, width - 1.0]).norm())) + 1
        self.by_frame = torch.zeros(layers, frames, dtype=torch.float64)
        self.by_space = torch.zeros(layers, reach, dtype=torch.float64)
        self.uniform_frame = torch.zeros(frames, dtype=torch.float64)
        self.uniform_space = torch.zeros(reach, dtype=torch.float64)
        self.counted = [0] * layers

    def listen(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        """An :class:`Observe` listener. Main tokens only; their mass is normalised over the main keys."""
        main = call.layout.main
        rows = torch.randint(0, main.stop - main.start, (self._rows,), generator=self._generator)
        queries = q[:, :, main][:, :, rows.to(q.device)].float()
        scores = queries @ k[:, :, main].float().mT * (call.scale or q.shape[-1] ** -0.5)
        mass = scores.softmax(-1).mean((0, 1)).double().cpu()
        delta = (self._place[:, rows, None] - self._place[:, None, :]).abs()
        space = (delta[1] ** 2 + delta[2] ** 2).double().sqrt().round().long()
        for table, uniform, distance in (
            (self.by_frame, self.uniform_frame, delta[0]),
            (self.by_space, self.uniform_space, space),
        ):
            table[call.layer].index_add_(0, distance.flatten(), mass.flatten())
            uniform.index_add_(0, distance.flatten(), torch.full_like(mass, 1 / mass.shape[1]).flatten())
        self.counted[call.layer] += len(rows)

    def to_dict(self) -> dict:
        """Mean mass per distance and layer, each row summing to 1, and the uniform curves."""
        rows = torch.tensor(self.counted, dtype=torch.float64)[:, None]
        total = sum(self.counted)
        return {
            "by_frame": (self.by_frame / rows).tolist(),
            "by_space": (self.by_space / rows).tolist(),
            "uniform_by_frame": (self.uniform_frame / total).tolist(),
            "uniform_by_space": (self.uniform_space / total).tolist(),
            "rows_per_layer": self.counted,
        }


def collect(prompts: list[str], *, steps: int, rows: int, seed: int) -> dict:
    """Run the bundled model densely over ``prompts`` and collect its distances."""
    from diffusers import WanPipeline

    from ..pipelines.mini import defaults, path

    pipe = WanPipeline.from_pretrained(path(), dtype=torch.float32)
    settings = {name: value for name, value in defaults().items() if name != "fps"} | {"num_inference_steps": steps}
    frames = (settings["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    patch = pipe.transformer.config.patch_size
    sides = (settings[name] // pipe.vae_scale_factor_spatial for name in ("height", "width"))
    grid = tuple(size // step for size, step in zip((frames, *sides), patch, strict=True))
    found = Distances(pipe.transformer.config.num_layers, grid, rows, seed)
    set_attn_processor(pipe, Processor(Observe(found.listen), schedule=Schedule.none()))
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + number)
        pipe(prompt, generator=generator, output_type="latent", **settings)
    reset_attn_processor(pipe)
    return {"grid": list(grid), "prompts": prompts, "steps": steps, "seed": seed, **found.to_dict()}


def draw(data: dict, file: Path) -> None:
    """Two panels, mass by frame distance and by in-frame distance, one line per layer. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    layers = len(data["by_frame"])
    for axis, key, label in ((axes[0], "by_frame", "frames apart"), (axes[1], "by_space", "tokens apart in the frame")):
        for layer, row in enumerate(data[key]):
            axis.plot(row, color=plt.cm.viridis(layer / max(layers - 1, 1)), label=f"layer {layer}", lw=1.4)
        axis.plot(data[f"uniform_{key}"], color="black", ls="--", lw=1, label="uniform")
        axis.set(xlabel=label, ylabel="softmax mass", yscale="log")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, ncols=2)
    figure.suptitle(f"Attention of the bundled model, grid {'x'.join(map(str, data['grid']))}", fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.eval.attention_maps", description=__doc__.splitlines()[0]
    )
    parser.add_argument("-o", "--out", type=output_file, default="attention.png")
    parser.add_argument("--prompts", default="mini-12", help="a bundled prompt list or a text file")
    parser.add_argument("--limit", type=positive, default=4)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--rows", type=positive, default=64, help="query rows sampled per call")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from .shapes.suite import prompts

    data = collect(prompts(args.prompts)[: args.limit], steps=args.steps, rows=args.rows, seed=args.seed)
    write_json(args.out.with_suffix(".json"), data, indent=None)
    draw(data, args.out)
    print(f"{args.out} and {args.out.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
