"""The memory of a stream: keys and values of a window of latent frames, per layer, of constant size.

A chunk is a transaction. :meth:`StreamCache.begin` decides what leaves the window, every forward of the chunk writes
over the same slots behind the committed ones, :meth:`StreamCache.commit` makes the result the new memory and
:meth:`StreamCache.abort` leaves the old one as it was. Until then what leaves is only hidden, which is why a cache
holds one chunk more than its window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError
from .compression import most_watched
from .config import CacheConfig
from .rotation import Rotary, Tables, rotate

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Chunk:
    """The chunk being made. ``start``: its first latent frame. ``drop``: tokens that leave, right after the sinks.

    ``compress``: participative compression fires instead.
    """

    start: int
    frames: int
    tokens: int
    drop: int = 0
    compress: bool = False


class _Slots:
    """Where the token of each slot belongs: its latent frame and its cell of the frame's grid, int64 (B or 1, slots).

    One for all layers, or one per layer where layers keep different tokens. ``kept``: the history that a compression
    chose, (B, tokens), with the frames it now counts as.
    """

    def __init__(self, batch: int, slots: int, device: torch.device | str):
        self.frame = torch.zeros(batch, slots, dtype=torch.int64, device=device)
        self.cell = torch.zeros_like(self.frame)
        self.close()

    def close(self) -> None:
        self.kept: Tensor | None = None
        self.kept_frame: Tensor | None = None
        self.tables: dict[str, Tables] = {}


class _Layer:
    """Keys (unrotated unless stored roped) and values of one layer, (B, slots, H, D).

    ``past``: queries of the latest frames, which compression asks too. ``mean``: averaged sinks in full precision: at
    half precision an average that keeps 999 parts in 1000 would never move.
    """

    def __init__(self, config: CacheConfig, shape: tuple[int, int, int, int], frame: int, dtype, device):
        batch, _, heads, dim = shape
        self.key, self.value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.query: Tensor | None = None
        past = (config.pc_recent - config.chunk_frames) * frame if config.compresses else 0
        self.past = torch.zeros((batch, past, heads, dim), dtype=dtype, device=device)
        sinks = config.sink_frames * frame if config.policy == "ema_sink" else 0
        wide = torch.promote_types(dtype, torch.float32)
        self.mean = torch.zeros((2, batch, sinks, heads, dim), dtype=wide, device=device)


class StreamCache:
    """What one guidance branch of a stream remembers. See :class:`CacheConfig` for the policies.

    ``grid``: (rows, columns) of tokens in a latent frame. ``rotary``: the model's rotation. Tensors are
    (``batch``, tokens, ``heads``, ``head_dim``) in ``dtype``. All memory is allocated here, once.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        grid: tuple[int, int],
        rotary: Rotary,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if sum(rotary.dims) != head_dim:
            raise UsageError(f"the rotation covers {rotary.dims} channels, {sum(rotary.dims)}; heads have {head_dim}")
        self.config, self.rotary, self.grid = config, rotary, grid
        self.frame_tokens = grid[0] * grid[1]
        slots = config.capacity_frames * self.frame_tokens
        shape = (batch, slots, heads, head_dim)
        self._layers = [_Layer(config, shape, self.frame_tokens, dtype, device) for _ in range(layers)]
        own = (batch, layers) if config.compresses else (1, 1)
        self._slots = [_Slots(own[0], slots, device) for _ in range(own[1])]
        self.reset()

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self.chunk: Chunk | None = None
        self.valid = 0
        self.end = 0
        self._origin = 0
        self._averages = 0
        for tensor in self._tensors():
            tensor.zero_()
        for slots in self._slots:
            slots.close()

    @property
    def valid_frames(self) -> float:
        """Committed frames in the window; whole unless compression chose single tokens."""
        return self.valid / self.frame_tokens

    @property
    def visible(self) -> int:
        """Tokens that the chunk being made attends to, its own included."""
        chunk = self._open()
        return self._history_tokens(chunk) + chunk.tokens

    @property
    def tail_start(self) -> int:
        """The first latent frame after the sinks that is still remembered, compression aside."""
        tail = max(self.valid - self._sinks(), 0)
        return self.end - tail // self.frame_tokens

    def bytes(self) -> int:
        """Bytes allocated, the same at every length."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def begin(self, frames: int | None = None) -> Chunk:
        """Open the next chunk, of ``frames`` latent frames (default and most: ``chunk_frames``).

        Raises ``UsageError`` while another chunk is open, and for frames that the settings do not allow.
        """
        config, n = self.config, self.frame_tokens
        frames = config.chunk_frames if frames is None else frames
        if self.chunk is not None:
            raise UsageError(f"the chunk at latent frame {self.chunk.start} is still open; commit or abort it first")
        if not 1 <= frames <= config.chunk_frames:
            raise UsageError(f"a chunk has 1 to chunk_frames={config.chunk_frames} latent frames; got {frames}")
        if config.key_storage == "roped" and self.end + frames > config.max_frames:
            raise UsageError(
                f"roped keys end at max_frames={config.max_frames}: this chunk would reach latent frame "
                f"{self.end + frames}. Use key_storage='raw'"
            )
        tokens = frames * n
        excess = max(self.valid + tokens - config.window_frames * n, 0)
        compress = config.compresses and excess > 0
        if excess and config.policy == "ema_sink":
            excess = config.sink_frames * n
        if (config.policy == "ema_sink" or compress) and frames != config.chunk_frames:
            raise UsageError(
                f"policy {config.policy!r} takes whole chunks of {config.chunk_frames} latent frames here; got "
                f"{frames}. Give a prefix of whole chunks, or another policy"
            )
        chunk = Chunk(self.end, frames, tokens, 0 if compress else excess, compress)
        own = slice(self.valid, self.valid + tokens)
        places = torch.arange(tokens, device=self._slots[0].frame.device)
        for slots in self._slots:
            slots.frame[:, own], slots.cell[:, own] = self.end + places // n, places % n
        self.chunk = chunk
        return chunk

    def write(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Store one forward of the chunk: unrotated tensors (B, tokens, H, D). The first one makes room.

        Writing again replaces what was written; nothing leaves twice.
        """
        chunk, store, slots = self._open(), self._layers[layer], self._slots_of(layer)
        own = slice(self.valid, self.valid + chunk.tokens)
        if key.shape != store.key[:, own].shape:
            raise UsageError(
                f"the open chunk takes keys of shape {tuple(store.key[:, own].shape)} (batch, tokens, heads, "
                f"channels); got {tuple(key.shape)}"
            )
        if self.config.key_storage == "roped":
            key = rotate(key, self._tables(slots, "chunk"))
        store.key[:, own], store.value[:, own] = key, value
        if self.config.compresses:
            if chunk.compress and slots.kept is None:
                self._compress(store, slots, query)
            store.query = query

    def rotated(self, layer: int, query: Tensor) -> Tensor:
        """The chunk's queries (B, tokens, H, D) at their place in the window."""
        return rotate(query, self._tables(self._slots_of(layer), "chunk"))

    def own(self, layer: int) -> Pair:
        """Rotated keys and values of the chunk itself, as last written."""
        chunk, store = self._open(), self._layers[layer]
        span = slice(self.valid, self.valid + chunk.tokens)
        return self._turned(layer, store.key[:, span], "chunk"), store.value[:, span]

    def history(self, layer: int) -> Pair:
        """Rotated keys and values of what the chunk sees before itself: sinks, then the rest in order."""
        store, slots = self._layers[layer], self._slots_of(layer)
        key = self._remembered(store.key, slots, store.mean[0])
        return self._turned(layer, key, "history"), self._remembered(store.value, slots, store.mean[1])

    def window(self, layer: int) -> Pair:
        """Rotated keys and values of all that the chunk sees, the chunk last."""
        chunk, store, slots = self._open(), self._layers[layer], self._slots_of(layer)
        end = self.valid + chunk.tokens
        if slots.kept is None and not (chunk.drop and self._sinks()):  # one piece: nothing is copied but what turns
            span = slice(chunk.drop, end)
            return self._turned(layer, store.key[:, span], "window"), store.value[:, span]
        (key, value), (own_key, own_value) = self.history(layer), self.own(layer)
        return torch.cat([key, own_key], 1), torch.cat([value, own_value], 1)

    def commit(self) -> None:
        """Make the chunk part of the memory, as last written, and let go of what left."""
        chunk = self._open()
        end, drop = self.valid + chunk.tokens, chunk.drop
        for number, store in enumerate(self._layers):
            slots = self._slots_of(number)
            self._remember_queries(store)
            if drop and self.config.policy == "ema_sink":
                sinks = slice(0, drop)
                for buffer, mean in zip((store.key, store.value), store.mean, strict=True):
                    mean.copy_(self._averaged(buffer, mean))
                    buffer[:, sinks] = mean
            for buffer in (store.key, store.value):
                self._compact(buffer, slots, end)
        for slots in self._slots:
            frame = slots.kept_frame
            for table in (slots.frame, slots.cell):
                self._compact(table, slots, end)
            if frame is not None:
                slots.frame[:, : frame.shape[1]] = frame
            slots.close()
        self.valid = self.visible
        self.end += chunk.frames
        self._averages += bool(drop)
        self.chunk = None

    def abort(self) -> None:
        """Leave the memory exactly as it was before the chunk; without an open chunk nothing happens."""
        if self.chunk is None:
            return
        own = slice(self.valid, self.valid + self.chunk.tokens)
        self._clear(own)
        for store in self._layers:
            store.query = None
        self.chunk = None

    def rewind(self, frame: int, *, keep_sinks: bool = True) -> None:
        """Forget everything after the sinks; the next chunk starts at latent ``frame`` again.

        With a new prompt the latest clean frames are run through the model once more to refill the window
        (LongLive's re-caching, 2509.22622, section 3.1). ``keep_sinks=False``: those frames bring sinks of their own.
        Raises ``UsageError`` while a chunk is open and for a frame that was never made.
        """
        if self.chunk is not None:
            raise UsageError(f"the chunk at latent frame {self.chunk.start} is still open; commit or abort it first")
        if not self._origin <= frame <= self.end:
            raise UsageError(f"a stream can go back to latent frames {self._origin} to {self.end}; got {frame}")
        kept = min(self._sinks(), self.valid, (frame - self._origin) * self.frame_tokens) if keep_sinks else 0
        self._clear(slice(kept, self.valid))
        self.valid, self.end = kept, frame
        if not kept:
            self._origin, self._averages = frame, 0

    def _open(self) -> Chunk:
        if self.chunk is None:
            raise UsageError("no chunk is open; call begin() first")
        return self.chunk

    def _slots_of(self, layer: int) -> _Slots:
        return self._slots[layer if self.config.compresses else 0]

    def _sinks(self) -> int:
        return self.config.sink_frames * self.frame_tokens

    def _history_tokens(self, chunk: Chunk) -> int:
        if chunk.compress:
            return self.config.pc_budget * self.frame_tokens - chunk.tokens
        return self.valid - chunk.drop

    def _tensors(self) -> list[Tensor]:
        stores = [t for store in self._layers for t in (store.key, store.value, store.past, store.mean)]
        return stores + [table for slots in self._slots for table in (slots.frame, slots.cell)]

    def _clear(self, span: slice) -> None:
        for store in self._layers:
            store.key[:, span], store.value[:, span] = 0, 0
        for slots in self._slots:
            slots.frame[:, span], slots.cell[:, span] = 0, 0
            slots.close()

    def _remembered(self, buffer: Tensor, slots: _Slots, mean: Tensor | None = None) -> Tensor:
        """The visible history of a buffer (B, slots, ...), in order."""
        drop, sinks = self._open().drop, self._sinks()
        if slots.kept is not None:
            return _pick(buffer, slots.kept)
        if not drop:
            return buffer[:, : self.valid]
        if not sinks:
            return buffer[:, drop : self.valid]
        first = buffer[:, :sinks]
        if self.config.policy == "ema_sink" and mean is not None:
            first = self._averaged(buffer, mean).to(buffer.dtype)
        return torch.cat([first, buffer[:, sinks + drop : self.valid]], 1)

    def _averaged(self, buffer: Tensor, mean: Tensor) -> Tensor:
        """alpha x sinks + (1 - alpha) x what leaves, slot by slot (Reward Forcing), in ``mean``'s precision."""
        sinks, alpha = self._sinks(), self.config.ema_alpha
        old = mean if self._averages else buffer[:, :sinks].to(mean.dtype)
        return alpha * old + (1 - alpha) * buffer[:, sinks : 2 * sinks].to(mean.dtype)

    def _turned(self, layer: int, key: Tensor, part: str) -> Tensor:
        return key if self.config.key_storage == "roped" else rotate(key, self._tables(self._slots_of(layer), part))

    def _tables(self, slots: _Slots, part: str) -> Tables:
        """Rotations of the chunk, its history, or both. Constant within a chunk: all layers and forwards share them."""
        if part in slots.tables:
            return slots.tables[part]
        if part == "window":
            history, own = (self._tables(slots, name) for name in ("history", "chunk"))
            tables = tuple(torch.cat(pair, -2) for pair in zip(history, own, strict=True))
            return self._shared(slots, part, tables)
        chunk = self._open()
        if part == "chunk":
            own = slice(self.valid, self.valid + chunk.tokens)
            frame, cell = slots.frame[:, own], slots.cell[:, own]
        else:
            frame = self._remembered(slots.frame, slots) if slots.kept_frame is None else slots.kept_frame
            cell = self._remembered(slots.cell, slots)
        # Attention sees differences only. Counted from the chunk, a position never outgrows the window.
        if self.config.key_storage == "raw":
            frame = frame - chunk.start
            if part == "history":
                frame = self._follow(frame, chunk)
        return self._shared(slots, part, self._turn(frame, cell))

    def _shared(self, slots: _Slots, part: str, tables: Tables) -> Tables:
        # Where every layer has a window of its own, keeping their tables would cost a good part of the cache again.
        if part == "chunk" or not self.config.compresses:
            slots.tables[part] = tables
        return tables

    def _turn(self, frame: Tensor, cell: Tensor) -> Tables:
        dtype = torch.promote_types(self._layers[0].key.dtype, torch.float32)
        return self.rotary.tables(frame, cell // self.grid[1], cell % self.grid[1], dtype)

    def _follow(self, frame: Tensor, chunk: Chunk) -> Tensor:
        """Positions of the history with the sinks moved along, once frames between them and the window are gone."""
        sinks, n = self._sinks(), self.frame_tokens
        if not sinks or self.config.positions == "absolute" or frame.shape[1] < sinks:
            return frame
        tail = (frame.shape[1] - sinks + chunk.tokens) // n
        start = chunk.frames - tail
        if start == self._origin + self.config.sink_frames - chunk.start:
            return frame
        places = torch.arange(self.config.sink_frames, device=frame.device) + start - self.config.sink_gap
        moved = (places - self.config.sink_frames + 1).repeat_interleave(n).expand(frame.shape[0], -1)
        return torch.cat([moved, frame[:, sinks:]], 1)

    def _compress(self, store: _Layer, slots: _Slots, query: Tensor) -> None:
        """Choose the history that stays (Deep Forcing, section 4): sinks, the most watched, the recent."""
        chunk, config, n = self._open(), self.config, self.frame_tokens
        end, sinks = self.valid + chunk.tokens, self._sinks()
        recent = end - config.pc_recent * n
        count = (config.pc_budget - config.pc_recent - config.sink_frames) * n
        between = slice(sinks, recent)
        place = self._turn(slots.frame[:, between] - chunk.start, slots.cell[:, between])
        before = slice(recent, self.valid)
        past = rotate(store.past, self._turn(slots.frame[:, before] - chunk.start, slots.cell[:, before]))
        asking = torch.cat([past, rotate(query, self._tables(slots, "chunk"))], 1)
        chosen = sinks + most_watched(asking, rotate(store.key[:, between], place), count)
        every = torch.arange(end, device=query.device)
        batch = (query.shape[0], -1)
        slots.kept = torch.cat([every[:sinks].expand(batch), chosen, every[before].expand(batch)], 1)
        slots.kept_frame = slots.frame.gather(1, slots.kept)
        if config.pc_rope == "compact" and count:
            first = slots.frame[:, recent, None] - count // n
            slots.kept_frame[:, sinks : sinks + count] = first + torch.arange(count, device=query.device) // n

    def _compact(self, buffer: Tensor, slots: _Slots, end: int) -> None:
        """Close the gap that leaving tokens left in ``buffer`` (B, slots, ...) and clear what lies behind."""
        chunk, sinks = self._open(), self._sinks()
        if slots.kept is not None:
            kept = torch.cat([_pick(buffer, slots.kept), buffer[:, self.valid : end]], 1)
            first = 0
        elif chunk.drop:
            kept, first = buffer[:, sinks + chunk.drop : end].clone(), sinks
        else:
            return
        buffer[:, first : first + kept.shape[1]] = kept
        buffer[:, first + kept.shape[1] : end] = 0

    def _remember_queries(self, store: _Layer) -> None:
        size = store.past.shape[1]
        if size:
            store.past.copy_(torch.cat([store.past, store.query], 1)[:, -size:])
        store.query = None


def _pick(buffer: Tensor, index: Tensor) -> Tensor:
    """Slots ``index`` (B, k) of a buffer (B, slots, ...)."""
    index = index[(..., *(None,) * (buffer.ndim - 2))]
    return buffer.gather(1, index.expand(-1, -1, *buffer.shape[2:]))
