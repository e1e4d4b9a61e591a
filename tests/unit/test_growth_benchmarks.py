"""Classes and floors of kernels, the profile of a step, and the points of the growth measurement."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import fp8_lines, growth, kernels, model, profile
from benchmarks.growth import POINTS, Grown, Step, Switch
from benchmarks.kernels import Call, Kind, kind_of
from benchmarks.profile import Kernel
from benchmarks.run import RESULTS
from trt_core.flux.architecture import FluxArchitecture
from trt_core.host import Silent

CPU = torch.device("cpu")
FLUX = FluxArchitecture(
    hidden=3072, heads=24, double_depth=19, single_depth=38, in_channels=64, out_channels=64, context_dim=4096,
    vec_dim=768, mlp_hidden=12288, guidance=True,
)  # fmt: skip
AT_1024 = Call(1, 4096, 512)
OPTIONS: dict[str, Any] = {"backend": "eager", "progress": Silent()}

# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNN", Kind.GEMM),
        ("nvjet_qqtst_128x256_128x6_2x1_2cta_v_bz_TNT", Kind.GEMM),
        ("nvjet_tst_64x64_64x8_2x1_v_bz_splitK_TNT", Kind.GEMM),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_kernel__5x_cublas", Kind.GEMM),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal",
         Kind.GEMM),
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_gelubias_coopB_TNN", Kind.GEMM),
        ("void cutlass::Kernel2<cutlass_75_tensorop_f16_s1688gemm_gelu_f16_128x128_tn_align8>", Kind.GEMM),
        ("triton_tem_fused_addmm_gelu_3", Kind.GEMM),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT", Kind.MODULATION),
        ("nvjet_tst_128x16_64x11_2x1_v_bz_TNT", Kind.MODULATION),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
         Kind.MODULATION),
        ("_row_sums_kernel", Kind.MODULATION),
        ("_modulations_kernel", Kind.MODULATION),
        ("_compare_kernel", Kind.MODULATION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
         Kind.ATTENTION),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4>>",
         Kind.ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", Kind.ATTENTION),
        ("_gemm_mha_v2", Kind.ATTENTION),
        ("_norm_rope_kernel", Kind.QK),
        ("_modulated_norm_kernel_0", Kind.NORM),
        ("_join_gelu_kernel_1", Kind.GELU),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(TensorIteratorBase&)>",
         Kind.GELU),
        ("_quantize_kernel", Kind.QUANTIZE),
        ("triton_poi_fused_gelu_view_2", Kind.GELU),
        ("triton_red_fused_add_addmm_mul_native_layer_norm_1", Kind.NORM),
        ("triton_poi_fused_add_addmm_mul_select_unsqueeze_3", Kind.GATE),
        ("triton_poi_fused_addmm_mul_view_3", Kind.OTHER),
        ("triton_poi_fused__scaled_mm_clone_expand_4", Kind.COPY),
        ("triton_poi_fused_cat_5", Kind.COPY),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<OpaqueType<2u>, unsigned int, 3>",
         Kind.COPY),
        ("Memcpy DtoD (Device -> Device)", Kind.COPY),
        ("Memset (Device)", Kind.COPY),
        ("void at::native::elementwise_kernel<128, 4, silu_kernel>", Kind.OTHER),
    ],
)  # fmt: skip
def test_kernels_are_known_by_name(name: str, kind: Kind) -> None:
    assert kind_of(name) is kind


def test_our_triton_kernels_have_classes() -> None:
    names = "\n".join(
        path.read_text() for path in (Path(kernels.__file__).parents[1] / "trt_core/flux").glob("triton_*")
    )
    ours = {line.split("(")[0].removeprefix("def ") for line in names.splitlines() if line.startswith("def _")}
    found = {name: kind_of(name) for name in ours if name.endswith("_kernel") and name != "_merge_kernel"}
    assert found
    assert {name for name, kind in found.items() if kind is Kind.OTHER} == set()


def test_the_second_half_of_a_product_belongs_to_the_first() -> None:
    second = "void cublasLt::splitKreduce_kernel<32, 16, int, float>"
    small, large = "nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT", "nvjet_tst_128x64_64x8_2x1_v_bz_splitK_TNT"
    found, others = kernels.totals([(small, 1.0), (second, 2.0), (large, 4.0), (second, 8.0), ("mystery", 16.0)])
    assert (found[Kind.MODULATION].ms, found[Kind.MODULATION].launches) == (3.0, 2)
    assert found[Kind.GEMM].ms == 12.0
    assert others == {"mystery": 16.0}


# -- floors ------------------------------------------------------------------------------------------------------------


def test_flops_are_those_that_pytorch_counts() -> None:
    """diffusers' own forward under PyTorch's counter: products of tokens, attention, and those of one row."""
    transformer = model.full_size_transformer(CPU, **fp8_lines.TINY)
    arguments = model.inputs(transformer, 2, 64, 96, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        transformer(**arguments)
    arch, call = FluxArchitecture.from_diffusers_config(transformer.config), Call(2, 24, 8)
    one_row = 2 * call.batch * kernels.modulation_bytes(arch, call) / 2
    attention = kernels.attention_flops(arch, call) * (arch.double_depth + arch.single_depth)
    assert kernels.gemm_work(arch, call).bf16_flops + attention + one_row == counter.get_total_flops()


def test_fp8_moves_blocks_to_the_other_peak() -> None:
    plain, fp8 = (kernels.gemm_work(FLUX, Call(1, 4096, 512, fp8)) for fp8 in (False, True))
    assert plain.fp8_flops == 0
    assert fp8.fp8_flops + fp8.bf16_flops == plain.bf16_flops
    around = 2 * (4096 * 64 * 3072 + 512 * 4096 * 3072 + 4096 * 3072 * 64)
    assert fp8.bf16_flops == around


def test_floors_of_a_step_on_an_h200() -> None:
    """By hand, at 4608 tokens of 3072: a row of q and k is read and written once, modulations are read once."""
    floor = kernels.floors(FLUX, AT_1024, "NVIDIA H200")
    assert floor[Kind.QK] == pytest.approx(57 * (4 * 4608 * 3072 * 2 + 4608 * 128 * 4) / 4.8e12 * 1e3)
    assert floor[Kind.ATTENTION] == pytest.approx(57 * 4 * 4608**2 * 3072 / 989e12 * 1e3)
    final = 4096 * 3072 * 2 * 2
    assert floor[Kind.NORM] == pytest.approx(((2 * 19 + 38) * 4 * 4608 * 3072 * 2 + final) / 4.8e12 * 1e3)
    assert floor[Kind.GATE] == 0, "a sum and the norm after it are one pass"
    assert floor[Kind.GELU] == pytest.approx((19 * 12288 + 38 * 15360) * 4608 * 4 / 4.8e12 * 1e3)
    one_row = (19 * 2 * 6 + 38 * 3 + 2 + 3) * 3072**2 + (256 + 256 + 768) * 3072
    assert floor[Kind.MODULATION] == pytest.approx(one_row * 2 / 4.8e12 * 1e3)
    assert (floor[Kind.QUANTIZE], floor[Kind.COPY]) == (0, 0)
    fp8 = kernels.floors(FLUX, Call(1, 4096, 512, True), "NVIDIA H200")
    assert fp8[Kind.QUANTIZE] == pytest.approx(19 * 4608 * 3072 * 3 / 4.8e12 * 1e3)
    assert fp8[Kind.GEMM] == pytest.approx(floor[Kind.GEMM] / 2, rel=0.01)


def test_no_floor_without_a_known_gpu() -> None:
    assert kernels.floors(FLUX, AT_1024, "Some GPU") == {}


# -- the profile -------------------------------------------------------------------------------------------------------


def test_overlapping_kernels_are_busy_once() -> None:
    ran = [Kernel("a", 0, 10, 10), Kernel("b", 5, 7, 2), Kernel("c", 8, 14, 6), Kernel("d", 20, 21, 1)]
    assert profile.busy_us(reversed(ran)) == 15


def test_a_profile_in_numbers() -> None:
    ran = [Kernel("nvjet_tst_192x192_64x4_TNN", 0, 6000, 6000), Kernel("strange", 8000, 10000, 2000)]
    line = profile.summary(ran, 2, 5.0, {Kind.GEMM: 1.5, Kind.OTHER: 0.0})
    assert line["classes"]["GEMM"] == {"ms": 3.0, "launches": 0.5, "share": 0.6, "floor_ms": 1.5}
    assert (line["kernel_ms"], line["busy_ms"], line["profiled_step_ms"]) == (4.0, 4.0, 5.0)
    assert (line["idle_share"], line["floor_ms"]) == (pytest.approx(0.2), 1.5)
    assert line["other"] == {"strange": 1.0}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_step_is_profiled(precision: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "cache_folder": str(tmp_path)}
    line = profile.measure(CPU, precision, (64, 8, 1), options, fp8_lines.TINY, "NVIDIA H200")
    classes = line["classes"]
    assert {"GEMM", "attention", "GELU, join", "q/k norm + RoPE", "norm + modulation"} <= set(classes)
    assert classes["attention"]["launches"] >= 4
    assert sum(seen["ms"] for seen in classes.values()) == pytest.approx(line["kernel_ms"])
    assert sum(line["other"].values()) == pytest.approx(classes["other"]["ms"])
    assert 0 < classes["GEMM"]["floor_ms"] < classes["GEMM"]["ms"]
    assert json.loads(json.dumps(line)) == line
    table = profile.shown({**line, "precision": precision, "backend": "eager", "height_px": 64, "text_tokens": 8,
                           "batch": 1})  # fmt: skip
    assert all(f"\n{name} " in table for name in classes)


# -- growth ------------------------------------------------------------------------------------------------------------


def test_the_points_are_those_of_the_issue() -> None:
    assert len(set(POINTS)) == len(POINTS)
    steps, loras = ({point for point in POINTS if isinstance(point, kind)} for kind in (Step, Switch))
    sizes = {Step(px, text) for px in (512, 768, 1024, 1536, 2048) for text in (256, 512)}
    assert steps == sizes | {Step(batch=batch) for batch in (1, 2, 4, 8)}
    assert loras == {Switch(rank) for rank in (4, 16, 32, 64, 128)} | {Switch(16, n) for n in (1, 2, 4, 8)}
    assert all(growth.shapes().holds(s.batch, (s.height_px // 16) ** 2, s.text_tokens) for s in steps)


def test_a_run_that_is_cut_has_the_ends_of_each_kind() -> None:
    begun = POINTS[:8]
    sizes = {point.height_px for point in begun if isinstance(point, Step)}
    ranks = {point.lora_rank for point in begun if isinstance(point, Switch) and point.loras == 1}
    assert sizes == {512, 1024, 2048}
    assert ranks == {4, 16, 128}
    assert Switch(16, 8) in begun


def test_what_does_not_fit_is_skipped_with_its_reason() -> None:
    def too_large() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    assert growth.fitting(too_large) == {"skipped": "CUDA out of memory. Tried to allocate 9 GiB."}
    with pytest.raises(RuntimeError, match="another"):
        growth.fitting(lambda: (_ for _ in ()).throw(RuntimeError("another")))


@pytest.fixture
def grown(tmp_path: Path) -> Grown:
    import trt_core

    transformer = model.full_size_transformer(CPU, **fp8_lines.TINY)
    ours = trt_core.compile_transformer(transformer, base_weights="gpu", cache_folder=str(tmp_path), **OPTIONS)
    return Grown(ours, CPU, growth.BASE.tiny())


def test_loras_come_and_go_between_points(grown: Grown) -> None:
    ours = grown._ours
    plain = grown._run(growth.BASE.tiny())().clone()
    one, two = grown.measure(Switch(4)), grown.measure(Switch(4, 2))
    assert (one["lora_layers"], one["merged"], two["merged"]) == (40, 26, 26)
    assert set(ours.peft_config) == {"lora_0", "lora_1", "lora_2"}
    assert not torch.equal(grown._run(growth.BASE.tiny())(), plain)
    other = grown.measure(Switch(8))
    assert set(ours.peft_config) == {"lora_0", "lora_1"}
    assert min(other["lora_refit_ms"], two["lora_refit_ms"]) > 0
    step = grown.measure(Step(32, 8, 2))
    assert (step["batch"], step["height_px"], step["width_px"]) == (2, 32, 32)
    assert step["step_ms"] > 0
    assert torch.equal(grown._run(growth.BASE.tiny())(), plain), "LoRAs are gone before a step is measured"


def test_a_run_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(growth, "POINTS", (growth.BASE, Switch(16), Step(512)))
    monkeypatch.setattr(growth, "machine", lambda: {"gpu": "Some GPU", "driver": "1", "versions": {}})
    arguments = ["--tiny", "--run", "a", "--results", str(tmp_path), "--backend", "eager", "--cache", str(tmp_path)]
    path = tmp_path / "some-gpu.jsonl"
    growth.main([*arguments, "--precision", "bf16", "--limit", "0"])
    assert not path.exists()
    assert "3 points of bf16 are left" in capsys.readouterr().err
    growth.main([*arguments, "--precision", "bf16"])
    before = path.read_text()
    growth.main([*arguments, "--precision", "bf16", "fp8"])
    assert path.read_text().startswith(before)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(line["precision"], line["kind"]) for line in lines] == [
        (precision, kind) for precision in ("bf16", "fp8") for kind in ("step", "lora", "step")
    ]
    assert all(line["tiny"] for line in lines)
    assert [line.get("first_of_process") for line in lines] == [True, None, None] * 2
    assert all(line["point_seconds"] > line.get("first_call_seconds", 0) for line in lines)


def test_points_are_known_by_run_precision_and_gpu() -> None:
    line = {"run": "a", "precision": "bf16", "gpu": "x", **Step().fields(), "step_ms": 1.0}
    points = [Step(), Step(batch=2)]
    same = {"run": "a", "precision": "bf16", "gpu": "x"}
    assert growth.missing(points, [line], **same) == [Step(batch=2)]
    for other in ({"run": "b"}, {"precision": "fp8"}, {"gpu": "y"}):
        assert growth.missing(points, [line], **{**same, **other}) == points


def test_small_models_write_nothing_by_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(growth, "POINTS", (growth.BASE,))
    monkeypatch.setattr(growth, "machine", lambda: {"gpu": "Some GPU", "driver": "1", "versions": {}})
    growth.main(["--tiny", "--precision", "bf16", "--backend", "eager", "--cache", str(tmp_path),
                 "--limit", str(time.perf_counter() + 60)])  # fmt: skip
    assert not (RESULTS / "growth" / "some-gpu.jsonl").exists()
