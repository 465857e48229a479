"""The reader of compiled kernels, on snippets counted by hand; occupancy, worked out by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fastdpo.gpu.machine_code import read_amd, read_nvidia
from fastdpo.gpu.occupancy import resident

# Two loops: one loads 16 bytes, may jump over what the target's block does, has one exp2; one loads and stores 2 bytes
SASS = """
 Function kernel:
  REG:40 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:416 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x0000000402047981 */
        /*0020*/                   FFMA R4, R4, R9, -R8 ;                    /* 0x0000000402047981 */
        /*0030*/              @!P1 BRA 0x60 ;                                /* 0x0000000402047981 */
        /*0040*/                   FSEL R4, R4, R7, P2 ;                     /* 0x0000000402047981 */
        /*0050*/                   FSEL R5, R5, R7, P2 ;                     /* 0x0000000402047981 */
        /*0060*/                   MUFU.EX2 R4, R4 ;                         /* 0x0000000402047981 */
        /*0070*/               @P0 BRA 0x10 ;                                /* 0x0000000402047981 */
        /*0080*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;          /* 0x0000000402047981 */
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R4 ;          /* 0x0000000402047981 */
        /*00a0*/               @P0 BRA 0x80 ;                                /* 0x0000000402047981 */
        /*00b0*/                   EXIT ;                                    /* 0x0000000402047981 */
        /*00c0*/                   BRA 0xc0;                                 /* 0xfffffffc00fc7947 */
        /*00d0*/                   NOP;                                      /* 0x0000000000007918 */
"""


def test_nvidia_main_loop() -> None:
    """LDG, FFMA, BRA, MUFU, BRA: 5 instructions, of which one is special; what the branch skips does not count."""
    assert read_nvidia(SASS, logits=2) == {
        "registers": 40,
        "spills": 0,
        "load_bits": 128,
        "store_bits": 0,
        "instructions_per_logit": 2.5,
        "special_per_logit": 0.5,
    }
    assert read_nvidia(SASS, logits=2, stores=False) == read_nvidia(SASS, logits=2)
    stores = read_nvidia(SASS, logits=1, stores=True)
    assert (stores["load_bits"], stores["store_bits"], stores["instructions_per_logit"]) == (16, 16, 3)
    assert read_nvidia(SASS) == {"registers": 40, "spills": 0}


def test_nvidia_without_a_loop() -> None:
    """All up to the last exit; the branch to itself that follows is padding."""
    lines = [line.replace("@P0 BRA 0x10", "NOP").replace("@P0 BRA 0x80", "NOP") for line in SASS.splitlines()]
    found = read_nvidia("\n".join(lines), logits=1)
    assert (found["instructions_per_logit"], found["load_bits"], found["store_bits"]) == (11, 128, 16)


def test_nvidia_spills() -> None:
    assert read_nvidia(SASS.replace("STACK:0", "STACK:24"))["spills"] == 24
    assert read_nvidia(SASS.replace("FSEL R5, R5, R7, P2", "STL [R1], R5"))["spills"] == 1


AMDGCN = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; %loop
	s_and_saveexec_b64 s[2:3], vcc
	s_cbranch_execz .LBB0_3
	global_load_dwordx4 v[0:3], v[4:5], off
.LBB0_3:                                ; the masked load's end
	s_or_b64 exec, exec, s[2:3]
	v_pk_fma_f32 v[0:1], v[0:1], v[6:7], v[8:9]
	s_cbranch_scc1 .LBB0_5
	v_cndmask_b32_e32 v0, v0, v1, vcc   ; the target's block alone
.LBB0_5:
	v_exp_f32_e32 v0, v0
	s_cmp_lt_i32 s6, s7
	s_cbranch_scc1 .LBB0_1
	global_store_dwordx2 v[4:5], v[0:1], off
	s_endpgm
    .vgpr_count:     36
    .vgpr_spill_count: 2
    .sgpr_spill_count: 1
"""


def test_amd_main_loop() -> None:
    """Vector instructions alone: fma and exp. The masked load is run, the target's select is not."""
    assert read_amd(AMDGCN, logits=2) == {
        "registers": 36,
        "spills": 3,
        "load_bits": 128,
        "store_bits": 0,
        "instructions_per_logit": 1,
        "special_per_logit": 0.5,
    }
    straight = read_amd(AMDGCN.replace("s_cbranch_scc1 .LBB0_1", "s_nop 0"), logits=1)
    assert (straight["store_bits"], straight["instructions_per_logit"]) == (64, 3)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs", "share"),
    [
        (90, 32, 0, 4, 16, 1.0),  # 512 / 32 = 16 warps a scheduler: all
        (90, 33, 0, 4, 12, 0.75),  # 40 registers: 12 warps
        (90, 255, 0, 4, 2, 0.125),  # 256: 2 warps
        (90, 32, 0, 1, 32, 0.5),  # no more than 32 programs
        (90, 32, 100 * 1024, 4, 2, 0.125),  # twice 101 KiB in 228
        (80, 32, 100 * 1024, 4, 1, 0.0625),  # once in 164
        (100, 64, 0, 32, 1, 0.5),  # 8 warps a scheduler: one program of 32
        (100, 65, 0, 32, 0, 0.0),  # 7: none, it cannot be launched
        ("gfx942", 128, 0, 4, 4, 0.5),  # 4 of 8 waves a SIMD
        ("gfx942", 129, 40 * 1024, 4, 1, 0.125),  # once 40 KiB in 64
    ],
)
def test_occupancy(arch: int | str, registers: int, shared: int, warps: int, programs: int, share: float) -> None:
    assert resident(arch, registers, shared, warps) == (programs, share)


def test_occupancy_of_an_unknown_target() -> None:
    with pytest.raises(KeyError, match="70"):
        resident(70, 32, 0, 4)
