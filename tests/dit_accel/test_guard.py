import torch

from dit_accel.guard import Flags, Guard


def test_flags_name_the_layer_and_nothing_else():
    flags = Flags(4, torch.device("cpu"))
    clean, nan, inf = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4).half()
    nan[0, 1, 7, 3] = torch.nan
    inf[0, 0, 0, 0] = torch.inf
    for layer, out in enumerate((clean, nan, clean, inf)):
        flags.check(layer, out)
    assert flags.read() == [1, 3]
    flags.clear()
    assert flags.read() == []


def test_opposite_infinities_do_not_cancel():
    flags = Flags(1, torch.device("cpu"))
    flags.check(0, torch.tensor([torch.inf, -torch.inf]))
    assert flags.read() == [0]


def test_large_half_values_do_not_raise_a_flag():
    flags = Flags(1, torch.device("cpu"))
    flags.check(0, torch.full((4096,), 60000.0, dtype=torch.float16))
    assert flags.read() == []


def test_off_is_off():
    assert Guard().active
    assert not Guard(nonfinite=False).active
