"""Trains the bundled model: ``python -m dit_accel.pipelines.mini.train --config cpu --out FOLDER``.

Stages, each resumable: ``vae`` (autoencoder), ``encode`` (draw and encode the training clips), ``refine`` (decoder
alone), ``denoiser`` (text
encoder and transformer), ``export`` (a WanPipeline folder). ``encode`` may run beside ``denoiser`` in a second process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from . import command, export, sheets
from .command import load_config
from .data import SHARD, Latents, encode_shards
from .loop import Stage, schedule_of
from .model import Denoiser, build_transformer, denoising_loss
from .text import MAX_LENGTH, build_text_encoder, build_tokenizer
from .vae import build_vae, clip_batch, latent_statistics, vae_loss

STAGES = ("vae", "encode", "refine", "denoiser", "export")


class Run:
    """One training run in one folder."""

    def __init__(self, config: dict[str, Any], out: Path, device: str = "cpu") -> None:
        self.config, self.out, self.device = config, out, torch.device(device)
        self.seed = config["seed"]
        out.mkdir(parents=True, exist_ok=True)

    def _stage(self, name: str, module: torch.nn.Module, loss, part: dict[str, Any], report) -> Stage:
        return Stage(
            name,
            module,
            loss,
            schedule_of(part),
            self.out,
            seed=self.seed,
            autocast=self.config["autocast"],
            every=part.get("every", 100),
            report=report,
        )

    def vae_stage(self) -> Stage:
        """The autoencoder's training stage, at its last checkpoint."""
        part = self.config["vae"]
        torch.manual_seed(self.seed)
        vae = build_vae(part["base_dim"], part["z_dim"]).to(self.device)
        return self._stage("vae", vae, self._vae_loss(vae, part), part, self._vae_report)

    def _vae_report(self, module: AutoencoderKLWan, step: int) -> None:
        sheets.vae_sheet(module, self.out / "vae.png")

    def _vae_loss(self, vae: AutoencoderKLWan, part: dict[str, Any]):
        lengths = part["clip_frames"]

        def loss(step: int, generator: torch.Generator):
            rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
            frames = lengths[step % len(lengths)]
            video = clip_batch(rng, max(part["tokens"] // frames, 1), frames).to(self.device)
            return vae_loss(vae, video, generator, part["kl"])

        return loss

    def train_vae(self, deadline: float | None) -> bool:
        """Trains the autoencoder, then measures its latents and saves it to ``vae/``."""
        if (self.out / "vae" / "config.json").is_file():
            return True
        stage = self.vae_stage()
        if not stage.run(deadline):
            return False
        vae = stage.averaged().eval()
        mean, std = latent_statistics(vae, np.random.default_rng(self.seed))
        vae.register_to_config(latents_mean=[round(v, 5) for v in mean], latents_std=[round(v, 5) for v in std])
        vae.save_pretrained(self.out / "vae")
        return True

    def vae(self) -> AutoencoderKLWan:
        """The trained autoencoder."""
        return AutoencoderKLWan.from_pretrained(self.out / "vae").to(self.device).eval()

    def encode(self, deadline: float | None) -> bool:
        """Draws and encodes the training clips."""
        data = self.config["data"]
        return encode_shards(
            self.vae(),
            self.out / "data",
            data["shards"],
            self.seed,
            deadline,
            data.get("shard", SHARD),
            data.get("workers", 0),
            data.get("batch", 8),
        )

    def refine(self, deadline: float | None) -> bool:
        """Sharpens the decoder with the encoder held fixed, so that encoded clips stay valid."""
        part = self.config.get("refine")
        if part is None:
            return True
        vae = self.vae()
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(False)
        stage = self._stage("refine", vae, self._vae_loss(vae, self.config["vae"] | part), part, self._vae_report)
        if not stage.finished and not stage.run(deadline):
            return False
        stage.averaged().eval().save_pretrained(self.out / "vae")
        return True

    def denoiser_stage(self) -> Stage:
        """The denoiser's training stage, at its last checkpoint."""
        part, data = self.config["denoiser"], self.config["data"]
        torch.manual_seed(self.seed + 1)
        tokenizer = build_tokenizer()
        text_encoder = build_text_encoder(tokenizer, part["text_dim"])
        channels = self.config["vae"]["z_dim"]
        transformer = build_transformer(part["width"], part["head_dim"], part["layers"], channels, part["text_dim"])
        model = Denoiser(text_encoder, transformer).to(self.device)
        latents = Latents(self.out / "data", data["shards"], data["first"], data["grow"])

        def loss(step: int, generator: torch.Generator):
            phase = next(p for p in part["phases"] if step < p["until"])
            clean, frames, texts = latents.batch(step, phase["batch"], phase["frames"], generator)
            drop = torch.rand(len(texts), generator=generator) < part["dropout"]
            texts = ["" if d else t for d, t in zip(drop.tolist(), texts, strict=True)]
            tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
            tensors = (clean, tokens.input_ids, tokens.attention_mask, frames)
            clean, ids, mask, frames = (t.to(self.device) for t in tensors)
            return denoising_loss(model, clean, ids, mask, frames, generator, part["shift"])

        def report(module: Denoiser, step: int) -> None:
            sheets.loss_curve(self.out)
            if part.get("samples", 4) == 0:
                return
            parts = (tokenizer, module.text_encoder, module.transformer, self.vae())
            with module.stock():
                pipeline = export.build_pipeline(*parts, part["shift"])
                path = self.out / f"samples_{step:06d}.png"
                sheets.sample_sheet(pipeline, path, sheets.PROMPTS[: part.get("samples", 4)])

        return self._stage("denoiser", model, loss, part, report)

    def train_denoiser(self, deadline: float | None) -> bool:
        """Trains text encoder and transformer."""
        return self.denoiser_stage().run(deadline)

    def export(self, folder: Path) -> None:
        """Writes the averaged weights of the last checkpoint as a WanPipeline folder."""
        stage = self.denoiser_stage()
        model = stage.averaged().eval().cpu()
        parts = (build_tokenizer(), model.text_encoder, model.transformer, self.vae().cpu())
        with model.stock():
            export.save(export.build_pipeline(*parts, self.config["denoiser"]["shift"]), folder)


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit code (0 done, 1 stopped by ``--max-minutes``: start the same command
    again)."""
    args = command.parse(command.parser("train", __doc__, STAGES, "pipeline"), argv)
    run = Run(load_config(args.config), args.out, args.device)
    steps = {"vae": run.train_vae, "encode": run.encode, "refine": run.refine, "denoiser": run.train_denoiser}
    return command.work(args, steps, run.export)


if __name__ == "__main__":
    raise SystemExit(main())
