"""What `python -m bench.kernels` reads from SASS, on a few lines of it, and what it predicts, against published measurements."""

import dataclasses
import json

import pytest

from bench import compiled, kernels, loops, model, predictions, sass, warp
from bench.compiled import Kernel

# Two operands of 16 bytes, a branch by their type, a slow path, a loop.
LOOP = """
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR8][R20.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR8][R22.64] ;
        /*0030*/               @P3 BRA `(.L_x_2) ;
        /*0040*/                   HADD2.F32 R4, -RZ, R4.H0_H0 ;
.L_x_2:
        /*0050*/                   FMUL R30, R4, R8 ;
        /*0060*/                   FADD R31, R31, R30 ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
        /*0080*/                   CALL.REL.NOINC `($__internal_sqrt_slowpath) ;
.L_x_3:
        /*0090*/                   VIADD R3, R3, 0x400 ;
        /*00a0*/                   ISETP.GT.AND P0, PT, R2, R3, PT ;
        /*00b0*/               LATCH
        /*00d0*/                   EXIT ;
"""
NEAR_JUMP = "@P0 BRA `(.L_x_1) ;"
FAR_JUMP = "@!P0 CALL.REL.NOINC `(.L_x_4) ;\n        /*00c0*/                   BRA `(.L_x_1) ;\n.L_x_4:"  # as for sm_80


def ways(source, accepts=lambda counts: True):
    blocks = sass.blocks_of(source)
    count = lambda block: (sum(x.is_access("LDG", 16) for x in block.instructions), sass.conversions(block))  # noqa: E731
    found = (
        sass.path_through(blocks, loop, lambda block: (len(block.instructions),), count, accepts) for loop in sass.loops_of(blocks)
    )
    return [path for path in found if path is not None]


def loop_of(path, loads=32, elements=4):
    return warp.Loop(((1.0, tuple(path)),), elements, loads)


@pytest.mark.parametrize("latch", [NEAR_JUMP, FAR_JUMP], ids=["BRA", "CALL of a label"])
def test_a_path_through_a_loop(latch):
    (short,) = ways(LOOP.replace("LATCH", latch))
    names = [x.opcode for x in short]
    assert names[:5] == ["LDG", "LDG", "BRA", "FMUL", "FADD"]
    assert not [x for x in short if x.name.startswith("CALL") and not x.jumps], "the slow path"
    (long,) = ways(LOOP.replace("LATCH", latch), accepts=lambda counts: counts == (2, 1))
    assert len(long) == len(short) + 1
    assert not ways(LOOP.replace("LATCH", latch), accepts=lambda counts: counts[0] == 3)


def test_a_warp_waits_for_its_loads_and_then_computes():
    (path,) = ways(LOOP.replace("LATCH", NEAR_JUMP))
    loop = loop_of(path)
    assert loop.instructions == len(path) / 4
    assert loop.bytes_in_flight == pytest.approx(32, rel=1e-3)
    assert loop.period(2000) - loop.period(1000) == 1000
    assert 1000 < loop.period(1000) < 1000 + 3 * len(path)


def test_loads_of_the_next_group_hide_the_arithmetic_on_this_one():
    load = sass.Instruction("", "LDG.E.128", ("R8", "desc[UR8][R20.64]"))
    arithmetic = [sass.Instruction("", "FMUL", ("R4", "R4", "R4"))] * 100  # each waits for the one before it
    at_once = loop_of([load._replace(operands=("R4", "desc[UR8][R20.64]")), *arithmetic])
    early = loop_of([load, *arithmetic, sass.Instruction("", "MOV", ("R4", "R8"))])
    for memory in (1_000, 2_000):
        assert at_once.period(memory) == pytest.approx(memory + 400, rel=0.01)
        assert early.period(memory) == pytest.approx(memory, rel=0.01)
    assert early.period(100) == pytest.approx(400, rel=0.01)


def test_units_of_a_scheduler():
    path = tuple(sass.Instruction("", name, ()) for name in ("FMUL", "IMAD.MOV.U32", "MUFU.RSQ", "LOP3.LUT", "LDG.E.128", "FMUL2"))
    assert warp.cycles_held(path, "9.0") == {"issue": 6, "integer": 2, "special": 8, "float": 4}
    assert warp.cycles_held(path, "8.0")["float"] == 8


# ------------------------------------------------------------------------------------------------------------------ the model


def test_blocks_of_a_multiprocessor():
    h100 = next(gpu for gpu in model.GPUS if gpu.name == "H100 SXM")
    for threads, registers, shared, blocks in (
        (256, 80, 720, 3), (256, 81, 720, 2), (256, 64, 720, 4), (256, 128, 720, 2), (128, 112, 2_048, 4), (128, 48, 64, 10),
        (1_024, 32, 0, 2), (128, 32, 60_000, 3), (32, 16, 0, 32),
    ):  # fmt: skip
        assert model.Resources(threads, registers, shared).resident(h100) == blocks


# github.com/RRZE-HPC/gpu-benches at 1038c5d, gpu-stream: GB/s of one element a thread with 256, 512, 1024 and 2048 threads on each
# multiprocessor. The triads of the A100 40GB and the H100 PCIe are an older version's, of two loads.
STREAM = {
    "A100 40GB": (108, 1.555e12, 552 / 1.41e9, 1.41e9, 0.88, {
        (8, 0): (310, 592, 1064, 1500), (8, 8): (548, 956, 1338, 1382), (16, 8): (743, 1232, 1360, 1358)}),
    "A100 80GB": (108, 2.039e12, 552 / 1.41e9, 1.41e9, 0.88, {
        (8, 0): (323, 615, 1119, 1776), (8, 8): (579, 1025, 1577, 1737), (24, 8): (993, 1571, 1697, 1794)}),
    "H100 PCIe": (114, 2.039e12, 688 / 1.755e9, 1.755e9, 0.90, {
        (8, 0): (368, 702, 1261, 1942), (8, 8): (607, 1037, 1583, 1704), (16, 8): (821, 1399, 1675, 1832)}),
    "GH200": (132, 4.023e12, 688 / 1.98e9, 1.98e9, 0.94, {
        (8, 0): (486, 935, 1715, 2775), (8, 8): (854, 1397, 2269, 3174), (24, 8): (1408, 2367, 3338, 3783)}),
}  # fmt: skip


def streaming(loaded, stored, threads):
    """A kernel whose threads load one element of each operand and store one."""
    load = sass.Instruction("", "LDG.E.64", ("R4", "[R2.64]"))
    path = (load, sass.Instruction("", "DMUL", ("R4", "R4", "R6")), sass.Instruction("", "STG.E.64", ("[R8.64]", "R4")))
    loop = warp.Loop(((1.0, path),), 1, loaded)
    return model.Work(loop, model.Resources(threads, 16, 0), loaded, stored, loops.BLOCK_START)


def test_bandwidths_that_were_measured():
    errors = []
    for name, (multiprocessors, bandwidth, latency, clock, ceiling, kernels_measured) in STREAM.items():
        gpu = dataclasses.replace(
            model.GPUS[0],
            name=name,
            multiprocessors=multiprocessors,
            bandwidth=bandwidth,
            idle_latency=latency,
            clock=clock,
            ceiling=ceiling,
        )
        for (loaded, stored), measured in kernels_measured.items():
            for threads, figure in zip((256, 512, 1024, 2048), measured, strict=True):
                share = streaming(loaded, stored, threads).share(gpu, 1, multiprocessors, threads)
                errors.append(abs(share * bandwidth / (figure * 1e9) - 1))
    assert max(errors) < 0.2
    assert sum(errors) / len(errors) < 0.05


@pytest.mark.parametrize("gpu", model.GPUS, ids=lambda gpu: gpu.name)
def test_a_copy_is_saturated_where_cub_says(gpu):
    """With CUB's bytes in flight the model gives a copy its ceiling or nearly; with a quarter of them much less."""

    def copy(bytes_in_flight):
        """Seconds that bytes of loads take: half of what moves."""
        low, high = 0.0, gpu.ceiling
        for _ in range(40):
            share = (low + high) / 2
            waiting = share * gpu.bandwidth / 2 * model.loaded_latency(gpu, share, 0.5) / gpu.multiprocessors
            low, high = (share, high) if waiting < bytes_in_flight else (low, share)
        return low

    assert copy(gpu.saturating) > 0.94 * gpu.ceiling
    assert copy(gpu.saturating / 4) < 0.8 * gpu.ceiling


def test_the_busiest_unit_is_a_limit_and_so_is_latency():
    for warps in (1, 2, 8, 16):
        rate = model.rounds_per_cycle(warps, held=100, alone=1_000)
        assert rate <= min(1 / 100, warps / 1_000)
        assert rate >= 0.6 * min(1 / 100, warps / 1_000)
    assert model.rounds_per_cycle(1, 100, 1_000) == pytest.approx(1 / 1_000)


def test_whole_launches():
    gpu = model.GPUS[2]
    work = streaming(24, 8, 1024)
    resident = work.resources.resident(gpu) * gpu.multiprocessors
    one = work.seconds(gpu, resident, resident * 1024)
    assert work.seconds(gpu, 10 * resident, 10 * resident * 1024) == pytest.approx(10 * one)
    assert one < work.seconds(gpu, resident + 1, (resident + 1) * 1024) < 2 * one  # a second wave of one block
    assert work.seconds(gpu, 1, 1024) > gpu.idle_latency
    many = work.seconds(gpu, 1_000 * resident, 1_000 * resident * 1024)
    assert many > 1_000 * resident * 1024 * work.bytes / gpu.bandwidth


def test_launches_of_torch():
    assert model.torch_launches([1]) == 2
    assert model.torch_launches([768] * 252) == 2
    assert model.torch_launches([768] * 253) == 3
    assert model.torch_launches([65_536 * 2_240]) == 2
    assert model.torch_launches([65_536 * 2_240 + 1]) == 3
    assert model.torch_launches([1] * 771) == 4 + 2


# ------------------------------------------------------------------------------------------------------ changed sources


def test_a_kernel_that_was_renamed_or_changed_is_an_error():
    others = {"update_kernel<AdamW, false, false, true>": 1, "update_kernel<AdamW, true, false>": 2, "sums_kernel": 3}
    assert kernels.find_kernel(others, "update_kernel<AdamW, false, false>") == 1
    with pytest.raises(loops.LoopNotFoundError, match=r"0 kernels measure_kernel<false>.* has .*sums_kernel"):
        kernels.find_kernel(others, "measure_kernel<false>")
    with pytest.raises(loops.LoopNotFoundError, match="2 kernels"):
        kernels.find_kernel({"k<false, 1>": 1, "k<false, 2>": 2}, "k<false>")
    case = loops.cases()[0]
    with pytest.raises(loops.LoopNotFoundError, match=r"statistics of g, m; fp32: 0 loops"):
        loops.cuda_loop(Kernel("", LOOP.replace("LATCH", NEAR_JUMP), ""), case)
    with pytest.raises(ValueError, match="Used"):
        _ = Kernel("", "", "nothing").registers


def test_the_chunk_of_the_sources(tmp_path):
    (tmp_path / "chunks.h").write_text("constexpr int64_t kChunk = 32768;\n")
    assert kernels.chunk_of(tmp_path) == 32_768
    (tmp_path / "mapping.h").write_text("constexpr int64_t kGpuChunk = 8192;\n")
    assert kernels.chunk_of(tmp_path) == 8_192
    (tmp_path / "mapping.h").write_text("constexpr int64_t kSmallChunk = 8192;\n")
    with pytest.raises(SystemExit, match="--chunk"):
        kernels.chunk_of(tmp_path)


def test_changes_between_two_files():
    def found(registers, milliseconds):
        row = {
            "backend": "cpp", "case": "update; fp32", "architecture": "9.0", "registers": registers, "spill_bytes": 0,
            "blocks_per_multiprocessor": 3, "instructions_per_element": 72, "bytes_in_flight": 49_152,
            "share_of_peak": {"H100": 0.9},
        }  # fmt: skip
        step = {
            "gpu": "H100",
            "model": "m",
            "dtype": "float32",
            "seconds": {"torch fused": 1e-3, "MetaAdamW cpp": milliseconds * 1e-3},
        }
        return {"rows": [row], "steps": [step]}

    text = predictions.changes(found(80, 1.5), found(64, 1.2))
    assert "80 → **64**" in text
    assert "| MetaAdamW cpp | 1.500 → **1.200** | -20% |" in text
    assert "torch fused" not in text
    assert "No kernel has changed" in predictions.changes(found(80, 1.5), found(80, 1.5))


def test_predictions_for_a_gpu(tmp_path):
    file = tmp_path / "predictions.json"
    step = {"gpu": "H200", "device": "NVIDIA H200", "model": "m", "dtype": "float32", "seconds": {"torch fused": 1.0}}
    file.write_text(json.dumps({"steps": [step], "sources": compiled.sources_hash()}))
    assert predictions.are_current(file)
    assert predictions.predicted("NVIDIA H200", "m", "float32", file) == {"torch fused": 1.0}
    assert predictions.predicted("NVIDIA H100 PCIe", "m", "float32", file) == {}
    assert predictions.predicted("NVIDIA H200", "m", "bfloat16", file) == {}
    assert predictions.predicted("NVIDIA H200", "m", "float32", tmp_path / "none.json") == {}
    file.write_text(json.dumps({"steps": [], "sources": "others"}))
    assert not predictions.are_current(file)
    assert not predictions.are_current(tmp_path / "none.json")
