"""What a model folder or hub id holds, read from its configuration files before any weight is loaded."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..diffusers.families import Family, known_families
from ..errors import UnsupportedError, UsageError

BUNDLED = "bundled"
# A plan of `dit-accel calibrate paro` under this name in the folder of a model is its default method.
PLAN = "paro.safetensors"
# A transformer under this name beside a pipeline's parts, with its settings in STREAM, is the model's for streams.
CAUSAL, STREAM = "causal", "stream.json"

# Frames per second of each family's published examples, by the start of the pipeline's class name.
_FPS = {"Wan": 16, "SkyReels": 24, "Hunyuan": 24, "LTX": 24, "CogVideoX": 8, "Mochi": 30, "Cosmos": 24, "Allegro": 15}


@dataclass(frozen=True)
class ModelInfo:
    """A pipeline on disk.

    ``name``: what the user typed. ``folder``: where its configuration files lie. ``source``: what
    ``from_pretrained`` is given. ``pipeline_class``: the diffusers class that will be loaded. ``revision``: the
    hub commit, or None. ``defaults``: call arguments that the bundled model brings along.
    """

    name: str
    folder: Path
    source: str
    pipeline_class: type
    vae: dict[str, Any]
    transformer: dict[str, Any]
    revision: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def call_arguments(self) -> dict[str, Any]:
        """Parameter name -> default (``inspect.Parameter.empty`` without one) of the pipeline's ``__call__``."""
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        return {name: p.default for name, p in parameters.items()}

    @functools.cached_property
    def family(self) -> Family | None:
        """How attention is accelerated on this transformer; None where no row knows its class."""
        import diffusers

        cls = getattr(diffusers, str(self.transformer.get("_class_name")), object)
        rows = {model: family for family in known_families() for model in family.models}
        return next((rows[base.__name__] for base in cls.__mro__ if base.__name__ in rows), None)

    @property
    def transformer_class(self) -> str:
        return self.transformer.get("_class_name") or "its transformer"

    @property
    def is_video(self) -> bool:
        return "num_frames" in self.call_arguments

    @property
    def takes_image(self) -> bool:
        return "image" in self.call_arguments

    @property
    def fps(self) -> int:
        name = self.pipeline_class.__name__
        return self.defaults.get("fps") or next((fps for key, fps in _FPS.items() if name.startswith(key)), 16)

    def fingerprint(self) -> str:
        """:func:`fingerprint` of the pipeline, without the transformer for streams that may lie beside its parts."""
        return fingerprint(self.folder, leave=(CAUSAL,))


def fingerprint(folder: Path, leave: tuple[str, ...] = ()) -> str:
    """A digest that changes with the weights: configuration files whole, of each weight file size and both ends.

    ``leave``: names directly in ``folder`` that do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] in leave:
            continue
        if path.suffix == ".json":
            digest.update(name.as_posix().encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin") and path.name != PLAN:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(1 << 16)
                file.seek(max(size - (1 << 16), 0))
                digest.update(f"{name.as_posix()} {size}".encode() + head + file.read())
    return digest.hexdigest()[:16]


def inspect_model(model: str | None, *, image: bool = False) -> ModelInfo:
    """Read the configuration of ``model``: a folder, a hub id, or None for the bundled model.

    ``image``: an image will be given, so the image-to-video class is chosen where the family has one. Raises
    ``UsageError`` where there is no such pipeline and ``UnsupportedError`` where it cannot be served.
    """
    defaults: dict[str, Any] = {}
    if model is None or model == BUNDLED:
        model, (folder, defaults) = BUNDLED, _bundled()
        source, revision, defaults = str(folder), None, _beside(folder, defaults)
    elif Path(model).is_dir():
        folder, source, revision = Path(model), str(model), None
        # A mini model trained elsewhere brings its own.
        defaults = _beside(folder, _json(folder / "mini.json"))
    else:
        folder = _hub_configs(model)
        source = model
        revision = folder.name if folder.parent.name == "snapshots" else None
    index = _json(folder / "model_index.json")
    if not index:
        raise UsageError(
            f"{model} is not a diffusers pipeline: it has no model_index.json; give the folder that "
            "save_pretrained wrote, or a hub id like Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    cls = _pipeline_class(index.get("_class_name"), model)
    _check_denoiser(index, cls, model)
    transformer = _json(folder / "transformer" / "config.json") or _json(folder / "transformer_2" / "config.json")
    info = ModelInfo(model, folder, source, cls, _json(folder / "vae" / "config.json"), transformer, revision, defaults)
    return _for_image(info, index) if image else _without_image(info)


def _beside(folder: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """``defaults``, with what lies in the model's folder: a calibrated plan, a transformer for streams."""
    plan, causal = folder / PLAN, folder / CAUSAL
    if (causal / STREAM).is_file():
        defaults = {**defaults, "stream": {**_json(causal / STREAM), "transformer": str(causal)}}
    if not plan.is_file():
        return defaults
    methods = {**defaults.get("methods", {}), "paro": {"plan_file": str(plan)}}
    return {**defaults, "method": "paro", "methods": methods}


def _bundled() -> tuple[Path, dict[str, Any]]:
    try:
        from . import mini

        folder = Path(mini.path())
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(folder)
        # Its frames are small, at most 120 tokens: blocks of 128 would leave a method little to skip.
        return folder, {"methods": {"radial": {"block_size": 64}}, **mini.defaults()}
    except (ImportError, AttributeError, OSError) as error:
        raise UsageError(
            f"the bundled model is not installed ({type(error).__name__}: {error}); "
            "give --model with a folder or hub id"
        ) from None


def _hub_configs(model: str) -> Path:
    """The configuration files of a hub pipeline, downloaded or from the cache; no weights."""
    looks_local = model.startswith((".", "/", "~", "\\")) or model.count("/") != 1 or " " in model
    if looks_local or Path(model).exists():
        raise UsageError(
            f"no model folder at {model}; give a folder that holds model_index.json, or a hub id (owner/name)"
        )
    from huggingface_hub import errors, snapshot_download

    patterns = ["model_index.json", "*/config.json", "scheduler/*.json"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise UsageError(
            f"the hub has no pipeline {model!r} that this account may read, and there is no folder of that name "
            f"({type(error).__name__}); check the spelling, or log in with `hf auth login`"
        ) from None
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub did not answer"
        raise UsageError(
            f"{model!r} is neither a folder here nor in the local hub cache, and {why} ({type(error).__name__}); "
            "give an existing folder, or download it first with `hf download`"
        ) from None


def _pipeline_class(name: Any, model: str) -> type:
    import diffusers

    if isinstance(name, list):
        name = name[-1]
    cls = getattr(diffusers, str(name), None)
    if not inspect.isclass(cls) or not issubclass(cls, diffusers.DiffusionPipeline):
        raise UnsupportedError(
            f"{model} asks for the pipeline class {name!r}, which diffusers {diffusers.__version__} does not have; "
            "update diffusers, or give another model"
        )
    return cls


def _check_denoiser(index: dict[str, Any], cls: type, model: str) -> None:
    parts = {key for key, value in index.items() if isinstance(value, list) and value and value[0]}
    if not parts & {"transformer", "transformer_2"}:
        denoiser = next((p for p in ("unet", "prior", "decoder") if p in parts), "no transformer")
        raise UnsupportedError(
            f"{model} is a {cls.__name__} with {denoiser}; dit-accel serves diffusion transformers only "
            "(pipelines with a `transformer`, like Wan, HunyuanVideo, CogVideoX, LTX, Flux, SD3)"
        )


def _without_image(info: ModelInfo) -> ModelInfo:
    if info.takes_image and info.call_arguments["image"] in (None, inspect.Parameter.empty):
        name = info.pipeline_class.__name__
        if "ImageToVideo" in name or "Image2Video" in name or info.call_arguments["image"] is inspect.Parameter.empty:
            raise UsageError(f"{info.name} is image-to-video ({name}); give the first frame with --image FILE")
    return info


def _for_image(info: ModelInfo, index: dict[str, Any]) -> ModelInfo:
    """The same model seen as an image-to-video pipeline."""
    import dataclasses

    import diffusers

    if not info.is_video:
        raise UsageError(f"--image is for image-to-video, and {info.name} is an image model; leave it out")
    if info.takes_image:
        return info
    name = info.pipeline_class.__name__
    stem = name.removesuffix("Pipeline")
    cls = next((getattr(diffusers, f"{stem}{kind}Pipeline", None) for kind in ("ImageToVideo", "Image2Video")), None)
    if cls is None:
        raise UnsupportedError(f"{info.name} is a {name}, and diffusers has no image-to-video pipeline for it")
    accepts = info.transformer.get("in_channels", 0) != info.vae.get("z_dim", -1) or index.get("expand_timesteps")
    if stem == "Wan" and not accepts:
        raise UnsupportedError(
            f"{info.name} is text-to-video only: its transformer takes {info.transformer.get('in_channels')} latent "
            "channels and no image; leave out --image, or give an I2V or TI2V model"
        )
    return dataclasses.replace(info, pipeline_class=cls)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
