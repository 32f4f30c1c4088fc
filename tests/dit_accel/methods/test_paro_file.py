"""The plan file: bits, laziness, size, and refusal of everything that is not an intact plan."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from paro_plans import header, observed, plan_file
from safetensors.torch import save_file

from dit_accel import __version__
from dit_accel.errors import UsageError
from dit_accel.layout import Layout
from dit_accel.methods import paro_file as module
from dit_accel.methods.paro_calibration import calibrate
from dit_accel.methods.paro_file import PlanFile, describe_layout, pack, unpack, write

LAYOUT = Layout((3, 4, 5), text=6)


@pytest.fixture
def made(tmp_path):
    return plan_file(tmp_path / "plan.safetensors", LAYOUT, layers=3)


@pytest.mark.parametrize("blocks", [1, 3, 8, 17])
def test_bits_round_trip_and_agree_with_numpy(blocks):
    mask = torch.rand((2, 3, blocks, blocks), generator=torch.Generator().manual_seed(blocks)) < 0.5
    packed = pack(mask)
    assert packed.shape == (2, 3, -(-(blocks**2) // 8))
    assert np.array_equal(packed.numpy(), np.packbits(mask.flatten(-2).numpy(), axis=-1))
    assert torch.equal(unpack(packed, blocks), mask)


def test_what_was_written_is_read(made):
    path, plans = made
    file = PlanFile.open(path)
    for layer, plan in plans.items():
        assert torch.equal(file.orders[layer], plan.orders)
        for where in range(2):
            assert torch.equal(file.map(layer, where), plan.maps[where])


def test_the_file_describes_itself(made):
    path, plans = made
    found = PlanFile.open(path).header
    assert found.layout == LAYOUT
    assert (found.layers, found.heads, found.bins, found.block_size, found.blocks) == ((0, 1, 2), 3, 2, 8, 9)
    assert (found.model, found.config, found.library) == ("Tiny", {"num_layers": 2}, __version__)
    assert found.reached == pytest.approx(np.mean([plan.density for plan in plans.values()]))
    assert 0.5 < found.recall <= 1
    assert len(found.fingerprint) == 16
    assert not list(path.parent.glob("*.partial"))
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_writing_the_same_plan_twice_gives_the_same_bytes(tmp_path):
    one, two = (plan_file(tmp_path / name, LAYOUT)[0].read_bytes() for name in "ab")
    assert one == two


def test_another_configuration_has_another_fingerprint(tmp_path):
    prints = set()
    for i, config in enumerate(({"num_layers": 2}, {"num_layers": 3})):
        path, _ = plan_file(tmp_path / str(i), LAYOUT, config=config)
        prints.add(PlanFile.open(path).header.fingerprint)
    assert len(prints) == 2


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def offsets(path):
    """Where each tensor's bytes lie in the file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return {k: 8 + size + v["data_offsets"][0] for k, v in json.loads(data[8 : 8 + size]).items() if k[0] != "_"}


def test_a_flipped_bit_in_a_map_is_found_when_that_map_is_read(made):
    path, plans = made
    flip(path, offsets(path)["maps.1"])
    file = PlanFile.open(path)
    assert torch.equal(file.map(0, 0), plans[0].maps[0])
    assert torch.equal(file.map(1, 1), plans[1].maps[1])
    with pytest.raises(UsageError, match=r"damaged: maps\.1\.0 does not match its recorded digest; copy"):
        file.map(1, 0)


def test_a_flipped_bit_in_the_orders_is_found(made):
    flip(made[0], offsets(made[0])["orders"])
    with pytest.raises(UsageError, match="damaged: orders"):
        PlanFile.open(made[0]).orders  # noqa: B018


def test_changed_metadata_is_found_at_once(made):
    path, _ = made
    data = path.read_bytes()
    path.write_bytes(data.replace(rb"\\\"density\\\": 0.5", rb"\\\"density\\\": 0.3"))
    assert path.read_bytes() != data
    with pytest.raises(UsageError, match="metadata does not match its own digest"):
        PlanFile.open(path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(made, keep):
    path, _ = made
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="is not a readable PARO plan"):
        PlanFile.open(path)


def test_other_files_are_refused_with_what_to_type(tmp_path):
    with pytest.raises(UsageError, match=r"no PARO plan at .*gone; make one with `dit-accel calibrate paro"):
        PlanFile.open(tmp_path / "gone")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="no PARO plan; make one with"):
        PlanFile.open(tmp_path / "other.safetensors")


def test_another_version_names_both(made, monkeypatch):
    statistics = observed(LAYOUT)
    monkeypatch.setattr(module, "VERSION", 2)
    path = made[0]
    write_again = header(LAYOUT)
    write(path, write_again, calibrate(statistics, density=0.5))
    monkeypatch.setattr(module, "VERSION", 1)
    with pytest.raises(UsageError, match=rf"version 2 .*dit-accel {__version__}; this library reads version 1"):
        PlanFile.open(path)


def test_a_folder_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(UsageError, match="cannot write the plan"):
        plan_file(tmp_path / "gone" / "plan.safetensors", LAYOUT)


def wan_720p(path):
    """A plan of Wan's 720p size whose maps are holes in the file: 1.1 GB long, almost nothing on the disk."""
    layout, bins, layers, heads = Layout((21, 45, 80)), 4, 40, 40
    size = -(-(1182**2) // 8)
    empty = hashlib.sha256(bytes(heads * size)).hexdigest()
    orders = torch.zeros((layers, heads), dtype=torch.int8)
    digests = {f"maps.{i}.{b}": empty for i in range(layers) for b in range(bins)}
    digests["orders"] = hashlib.sha256(orders.numpy().tobytes()).hexdigest()
    values = dict(vars(header(layout, bins=bins, block=64)))
    values |= {"layers": list(range(layers)), "heads": heads, "digests": digests}
    values["segments"] = describe_layout(layout)
    entries = {"__metadata__": {module.KEY: module._encode(values)}}
    start = 0
    for name, shape, kind in [
        ("orders", [layers, heads], "I8"),
        *((f"maps.{i}", [bins, heads, size], "U8") for i in range(layers)),
    ]:
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + int(np.prod(shape))]}
        start += int(np.prod(shape))
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    return layout


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc to see the memory of the process")
def test_p3_wan_720p_takes_less_than_1200_megabytes_and_is_read_map_by_map(tmp_path):
    path = tmp_path / "plan.safetensors"
    layout = wan_720p(path)
    assert 1.0e9 < os.path.getsize(path) < 1.2e9
    file = PlanFile.open(path)
    assert (file.header.blocks, file.header.layout) == (1182, layout)
    before = resident()
    assert file.map(17, 3).shape == (40, 1182, 1182)
    assert not file.orders.any()
    assert resident() - before < 150e6


def resident():
    """Bytes of this process in memory: what a whole file of 1.1 GB would show up in."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
