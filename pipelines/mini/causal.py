"""Trains the bundled streaming model: ``python -m dit_accel.pipelines.mini.causal --config cpu --out FOLDER``.

A causal student of the bundled model, from whose transformer it starts; autoencoder, text encoder and tokenizer are
shared and stay as they are. Stages, each resumable: ``encode`` (draw and encode the training clips), ``student``,
``export`` (a transformer folder). ``encode`` may run beside ``student`` in a second process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel

from . import command, path, sheets
from .command import load_config
from .data import SHARD, Latents, encode_shards
from .export import save_causal
from .loop import Stage, schedule_of
from .rows import CHUNK, LATER, START, encode_moments
from .student import Student, forcing_loss, pick_memory
from .text import MAX_LENGTH
from .vae import SPATIAL
from .world import HEIGHT, WIDTH

STAGES = ("encode", "student", "export")


class CausalRun:
    """One training run of the student in one folder, from the pipeline in ``source`` (default: the bundled one)."""

    def __init__(self, config: dict[str, Any], out: Path, device: str = "cpu", source: Path | None = None) -> None:
        self.config, self.out, self.device, self.seed = config, out, torch.device(device), config["seed"]
        out.mkdir(parents=True, exist_ok=True)
        self.pipe = WanPipeline.from_pretrained(source or path(), dtype=torch.float32)
        for part in (self.pipe.vae, self.pipe.text_encoder):
            part.to(self.device).eval().requires_grad_(False)

    def encode(self, deadline: float | None) -> bool:
        """Draws and encodes the training clips."""
        data = self.config["data"]
        return encode_shards(
            self.pipe.vae, self.out / "data", data["shards"], self.seed, deadline, data.get("shard", SHARD),
            data.get("workers", 0), data.get("batch", 8), encode_moments,
        )  # fmt: skip

    def stage(self) -> Stage:
        """The student's training stage, at its last checkpoint."""
        part, data = self.config["student"], self.config["data"]
        latents = Latents(self.out / "data", data["shards"], data["first"], data["grow"])
        student = Student(_stock(self.pipe.transformer).to(self.device), (HEIGHT // SPATIAL, WIDTH // SPATIAL))

        def loss(step: int, generator: torch.Generator):
            phase = next(p for p in part["phases"] if step < p["until"])
            rows = pick_memory(part["memories"], generator)
            clips = max(phase["rows"] // len(rows), 1)
            clean, _, texts = latents.batch(step, clips, (START + LATER) * CHUNK, generator)
            return forcing_loss(
                student, clean.to(self.device), self._embed(texts), rows, generator, shift=part["shift"],
                least=part["least"], blur=part["blur"], own=phase["own"],
            )  # fmt: skip

        def report(module: Student, step: int) -> None:
            sheets.loss_curve(self.out)
            if part.get("samples", 4):
                sheets.stream_sheet(
                    self._streaming(module), self.out / f"stream_{step:06d}.png", sheets.PROMPTS[: part["samples"]]
                )

        return Stage(
            "student", student, loss, schedule_of(part), self.out, seed=self.seed, autocast=self.config["autocast"],
            every=part.get("every", 100), report=report,
        )  # fmt: skip

    def train(self, deadline: float | None) -> bool:
        """Trains the student."""
        return self.stage().run(deadline)

    def export(self, folder: Path) -> None:
        """Writes the averaged weights of the last checkpoint as a transformer folder."""
        save_causal(_stock(self.stage().averaged().transformer), folder)

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> torch.Tensor:
        return self.pipe._get_t5_prompt_embeds(texts, max_sequence_length=MAX_LENGTH, device=self.device)

    def _streaming(self, student: Student) -> WanPipeline:
        """The pipeline with a stock copy of the student."""
        return WanPipeline(**{**self.pipe.components, "transformer": _stock(student.transformer).to(self.device)})


def _stock(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """A copy with diffusers' own attention and rotary embedding."""
    copy = WanTransformer3DModel.from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    return copy.eval()


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit code (0 done, 1 stopped by ``--max-minutes``: start the same command
    again)."""
    parser = command.parser("causal", __doc__, STAGES, "transformer")
    parser.add_argument("--source", type=Path, help="pipeline folder to start from (default: the bundled one)")
    args = command.parse(parser, argv)
    run = CausalRun(load_config(args.config, "causal_"), args.out, args.device, args.source)
    return command.work(args, {"encode": run.encode, "student": run.train}, run.export)


if __name__ == "__main__":
    raise SystemExit(main())
