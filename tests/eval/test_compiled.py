"""The table of compiled kernels: how machine code is read, and what the stored table says."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from dit_accel.eval import compiled

CODE = """
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ;  /* 0x01 */
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   FFMA R2, R3, R4, R5 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12] ;
        /*0040*/                   LDL R2, [R1] ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/                   BRA 0x0 ;
        /*0080*/                   FADD R2, R3, R4 ;
        /*0090*/               @P1 BRA 0x80 ;
        /*00a0*/                   BRA 0xb0 ;
"""


def test_the_innermost_loop_with_a_matrix_instruction_is_found():
    (loop,) = compiled._matrix_loops(CODE)
    assert [line.split()[0] for line in loop] == ["FFMA", "HGMMA.64x128x16.F32.BF16", "LDL", "@!P0"]


def test_arguments_are_signed_as_a_launch_would():
    class Tile:
        base, block_shape = torch.zeros(1, dtype=torch.bfloat16), [1, 1, 64, 32]

    values = (torch.zeros(1, dtype=torch.int64), None, 1, 48, 7, 0.5, (torch.zeros(1, dtype=torch.uint8), 1), Tile())
    signature, constants, attributes = compiled.signed(values)
    assert signature == [
        "*i64", "constexpr", "constexpr", "i32", "i32", "fp32", ("*u8", "constexpr"), "tensordesc<bf16[1,1,64,32]>",
    ]  # fmt: skip
    assert constants == {(1,): None, (2,): 1, (6, 1): 1}
    assert set(attributes) == {(0,), (3,), (6, 0)}


def test_the_stored_table_is_whole_and_its_main_loops_spill_nothing():
    table = json.loads((Path(compiled.__file__).parent / "results/compiled.json").read_text())
    keys = {(row["arch"], row["head_dim"], row["variant"]) for row in table["rows"]}
    every = itertools.product(compiled.ARCHITECTURES, (64, 128), compiled.VARIANTS)
    assert keys == {(f"sm{arch}", dim, name) for arch, dim, name in every}
    for row in table["rows"]:
        assert row["shared_kib"] <= compiled.SHARED_LIMIT[int(row["arch"][2:])]
        assert row["matrix"]
        if row["variant"] == "full":
            assert row["loop_spills"] == 0


def test_an_unknown_variant_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        compiled.main(["--variant", "fastest"])
    assert "invalid choice" in capsys.readouterr().err
