"""The README's tables and the plot say what the committed lines say, and nothing where there are none."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot, report

SVG = "{http://www.w3.org/2000/svg}"
MARKS = ("benchmark", "comfyui benchmark", "fp8 benchmark", "growth benchmark", "profile benchmark")
EMPTY = "\n\n".join(f"Words.\n\n<!-- {mark}:begin -->\n\n<!-- {mark}:end -->" for mark in MARKS) + "\nEnd.\n"
ABOUT = {"run": "r1", "gpu": "GPU X", "driver": "1.2", "versions": {"torch": "9.9", "tensorrt": "none"}}


def step(precision: str, px: int, ms: float, **changes: Any) -> dict[str, Any]:
    return {"kind": "step", "precision": precision, "height_px": px, "width_px": px, "text_tokens": 512, "batch": 1,
            "step_ms": ms, "bytes_above_weights": 2_500_000_000, **ABOUT, **changes}  # fmt: skip


def lora(precision: str, rank: int, ms: float, **changes: Any) -> dict[str, Any]:
    return {"kind": "lora", "precision": precision, "lora_rank": rank, "loras": 1, "lora_refit_ms": ms / 2,
            "lora_switch_ms": ms, **ABOUT, **changes}  # fmt: skip


PROFILE = {
    "precision": "fp8", "backend": "auto", "height_px": 1024, "text_tokens": 512, "batch": 1, "step_ms": 90.0,
    "idle_share": 0.021, "floor_ms": 60.0, "other": {}, **ABOUT,
    "classes": {"GEMM": {"ms": 50.0, "launches": 200.0, "share": 50 / 90, "floor_ms": 40.0},
                "copies, memsets": {"ms": 1.0, "launches": 9.0, "share": 1 / 90, "floor_ms": 0.0},
                "other": {"ms": 0.5, "launches": 3.0, "share": 0.5 / 90}},
}  # fmt: skip
GROWTH = [
    step("bf16", 1024, 99.0), step("bf16", 1024, 120.0), step("bf16", 2048, 800.25), step("fp8", 1024, 80.0),
    step("fp8", 1024, 640.0, batch=8), {**step("bf16", 1024, 0.0, batch=8), "skipped": "CUDA out of memory."},
    lora("bf16", 16, 30.0), lora("bf16", 128, 60.0), lora("bf16", 16, 90.0, loras=8),
]  # fmt: skip


def place(results: Path, **files: list[dict[str, Any]]) -> Path:
    for folder, lines in files.items():
        (results / folder).mkdir(parents=True)
        (results / folder / "gpu-x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results.mkdir(exist_ok=True)
    return results


def part(readme: str, mark: str) -> str:
    return readme.split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0].strip()


def test_the_committed_readme_and_plot_are_up_to_date() -> None:
    assert list(report.stale(report.ROOT / "README.md", report.RESULTS)) == []


def test_nothing_is_said_without_lines(tmp_path: Path) -> None:
    results = place(tmp_path / "results", growth=[{**GROWTH[0], "tiny": True}], profile=[])
    assert report.updated(EMPTY, results) == EMPTY
    assert report.growth_plot(report.lines_of(results / "growth")) == ""


def test_growth_tables_hold_the_last_line_of_each_case(tmp_path: Path) -> None:
    text = part(report.updated(EMPTY, place(tmp_path / "results", growth=GROWTH)), "growth benchmark")
    assert text.splitlines()[0] == "GPU X, driver 1.2, torch 9.9."
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]
    assert rows[0] == ["batch", "text tokens", "picture, px per side", "bf16, ms per step", "bf16, GB above weights",
                       "FP8, ms per step", "FP8, GB above weights", "run"]  # fmt: skip
    assert ["1", "512", "1024", "120.0", "2.5", "80.0", "2.5", "r1"] in rows
    assert ["1", "512", "2048", "800.2", "2.5", "", "", "r1"] in rows
    assert ["8", "512", "1024", "does not fit", "does not fit", "640.0", "2.5", "r1"] in rows
    assert ["8", "16", "90", "45", "r1"] in rows
    assert text.endswith("(benchmarks/results/growth.svg)")


def test_growth_says_what_a_size_costs_that_was_not_seen(tmp_path: Path) -> None:
    """Without the first point of a process, which compiles."""
    lines = [
        step("bf16", 1024, 100.0, first_call_seconds=40.0, first_of_process=True),
        step("bf16", 2048, 800.0, first_call_seconds=1.05), step("bf16", 512, 40.0, first_call_seconds=0.16),
        step("bf16", 1024, 90.0, first_call_seconds=9.09, text_tokens=256),
        step("bf16", 1024, 200.0, first_call_seconds=7.2, batch=2), step("fp8", 512, 30.0, first_call_seconds=0.08),
    ]  # fmt: skip
    text = part(report.updated(EMPTY, place(tmp_path / "results", growth=lines)), "growth benchmark")
    assert "A new resolution inside the profile costs once, above a step: bf16 0.12 to 0.25 s, FP8 0.05 s." in text
    assert "A new batch size costs once, above a step: bf16 7.00 s." in text


def measured(scenario: str, ms: float, **changes: Any) -> dict[str, Any]:
    sizes = {"height_px": 1024, "width_px": 1024, "text_tokens": 512}
    return {"scenario": scenario, "precision": "bf16", "batch": 1, "step_ms": ms, **sizes, **ABOUT, **changes}


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| ")]


def test_two_processes_make_one_table_in_the_order_of_a_run(tmp_path: Path) -> None:
    """Lines as two GPUs of one host wrote them: eager's after what is compared with it, an early one before a whole."""
    results = place(tmp_path / "results")
    torchao = measured("torchao", 80.0, precision="fp8", versions={**ABOUT["versions"], "torchao": "0.18.0"})
    lines = [
        measured("mttm", 150.0), {**torchao, "incomplete": True, "step_ms": 1.0}, measured("eager", 400.0, batch=2),
        measured("eager", 200.0), torchao, measured("eager", 50.0, run="r0"),
    ]  # fmt: skip
    (results / "gpu-x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [lines[-1], *lines[:-1]]))
    text = part(report.updated(EMPTY, results), "benchmark")
    assert text.splitlines()[0] == "GPU X, driver 1.2, torch 9.9, torchao 0.18.0."
    assert [row[:4] for row in rows_of(text)[2:]] == [
        ["diffusers, eager", "1", "200.0", "1.00"], ["diffusers, eager", "2", "400.0", "1.00"],
        ["diffusers, `compile_repeated_blocks`, torchao FP8 per row", "1", "80.0", "0.40"],
        ["Torch-TensorRT's mutable module", "1", "150.0", "0.75"],
    ]  # fmt: skip


def test_a_first_call_that_did_not_end_is_a_bound(tmp_path: Path) -> None:
    results = place(tmp_path / "results")
    line = {**measured("mttm", 1.0), "incomplete": True, "first_call_seconds_at_least": 523.7}
    del line["step_ms"]
    (results / "gpu-x.jsonl").write_text(json.dumps(line) + "\n")
    (row,) = rows_of(part(report.updated(EMPTY, results), "benchmark"))[2:]
    assert (row[0], row[2], row[4]) == ("Torch-TensorRT's mutable module", "", "over 524")


def test_a_run_that_was_cut_off_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    results = place(tmp_path / "results")
    whole = [
        measured("ours", 100.0, backend="auto", warm_first_call_seconds=3.0),
        measured("ours", 190.0, backend="auto", batch=2),
    ]
    cut = [measured("ours", 99.0, backend="auto", run="r2"), measured("ours", 189.0, backend="auto", batch=2, run="r2")]
    eager = [measured("eager", 200.0), measured("eager", 201.0, run="r2")]
    for lines, seen in (([*whole, *cut, *eager], ["201.0", "100.0", "190.0"]), ([*cut, *whole], ["100.0", "190.0"])):
        (results / "gpu-x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert [row[2] for row in rows_of(part(report.updated(EMPTY, results), "benchmark"))[2:]] == seen
    again = [{**line, "run": "r2", "step_ms": line["step_ms"] - 2} for line in whole]
    (results / "gpu-x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*whole, *again]))
    assert [row[2] for row in rows_of(part(report.updated(EMPTY, results), "benchmark"))[2:]] == ["98.0", "188.0"]


def test_every_gpu_has_a_section_the_newest_first(tmp_path: Path) -> None:
    """The one whose lines have no time is the oldest, whatever its run and its file are called."""
    results = place(tmp_path / "results")
    for gpu, changes in (("a", {"run": "r9"}), ("b", {"measured": "2026-11-24"}), ("c", {"measured": "2026-11-25"})):
        line = measured("eager", 200.0, **changes, gpu=f"GPU {gpu}")
        (results / f"gpu-{gpu}.jsonl").write_text(json.dumps(line) + "\n")
    text = part(report.updated(EMPTY, results), "benchmark")
    assert [line[:5] for line in text.splitlines() if line.startswith("GPU")] == ["GPU c", "GPU b", "GPU a"]


def test_the_profile_table(tmp_path: Path) -> None:
    text = part(report.updated(EMPTY, place(tmp_path / "results", profile=[PROFILE])), "profile benchmark")
    assert "90.0 ms per step, 1.50 times the floor; the GPU idles 2.1%. Run r1." in text
    assert "| GEMM | 50.00 | 55.6% | 40.00 | 1.25 | 200 |" in text
    assert "| copies, memsets | 1.00 | 1.1% | 0.00 |  | 9 |" in text
    assert "| other | 0.50 | 0.6% |  |  | 3 |" in text


def test_check_sees_a_stale_readme_and_a_stale_plot(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", place(tmp_path / "results", growth=GROWTH)
    readme.write_text(EMPTY)
    with pytest.raises(SystemExit, match=r"README.md, growth.svg: not up to date"):
        report.main(["--check"], readme, results)
    report.main([], readme, results)
    with pytest.raises(SystemExit) as done:
        report.main(["--check"], readme, results)
    assert done.value.code == 0
    image = results / "growth.svg"
    image.write_text(image.read_text().replace("LoRA rank", "Lora rank"))
    with pytest.raises(SystemExit, match=r"^growth.svg: not up to date"):
        report.main(["--check"], readme, results)
    (results / "growth/gpu-x.jsonl").unlink()
    report.main([], readme, results)
    assert readme.read_text() == EMPTY
    assert not image.exists()


# -- the plot ----------------------------------------------------------------------------------------------------------


def test_the_plot_holds_the_points_and_names_its_units() -> None:
    root = ElementTree.fromstring(report.growth_plot([GROWTH]))
    words = {element.text for element in root.iter(f"{SVG}text")}
    assert {"picture, megapixels", "step, ms", "LoRA rank", "switch, ms", "bf16", "FP8"} <= words
    titles = [element.text for element in root.iter(f"{SVG}title")][1:]
    assert titles == ["1024 x 1024 px: 120.0 ms", "2048 x 2048 px: 800.2 ms", "1024 x 1024 px: 80.0 ms",
                      "16: 30.0 ms", "128: 60.0 ms"]  # fmt: skip
    steps, _, loras = (element.get("points", "") for element in root.iter(f"{SVG}polyline"))
    (_, low), (_, high) = (map(float, point.split(",")) for point in steps.split())
    bottom = plot.HEIGHT - plot.BOTTOM
    assert (bottom - high) / (bottom - low) == pytest.approx(800.25 / 120, rel=1e-2), "from zero, in proportion"
    assert float(loras.split()[1].split(",")[0]) <= plot.WIDTH - plot.RIGHT


def test_the_plot_has_both_modes_in_one_file() -> None:
    text = report.growth_plot([GROWTH])
    assert text == report.growth_plot([GROWTH])
    light, dark = text.split("@media (prefers-color-scheme:dark)")
    for rule in (".page{fill:", "text{fill:", ".s0{stroke:", ".m1{fill:"):
        assert rule in light
        assert rule in dark


def test_two_gpus_share_the_plot_under_their_names() -> None:
    other = [{**line, "gpu": "GPU Y"} for line in GROWTH]
    words = {e.text for e in ElementTree.fromstring(report.growth_plot([GROWTH, other])).iter(f"{SVG}text")}
    assert {"GPU X, bf16", "GPU Y, FP8"} <= words


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(4.19, [0, 1, 2, 3, 4, 5]), (128, [0, 50, 100, 150]), (800.25, [0, 200, 400, 600, 800, 1000]), (0, [0, 1])],
)
def test_ticks_are_round_and_reach_the_largest(largest: float, expected: list[float]) -> None:
    assert plot.ticks(largest) == expected


FORWARD = {"kind": "forward", "weights": "plain", "fp8_attention": True, "error": 0.0187, "cosine": 0.99983,
           "ratio_to_recipe": 0.951, "eager_error": 0.014, "eager_cosine": 0.9999, **ABOUT}  # fmt: skip
BUDGET = {"kind": "budget", "budget_gb": 16.0, "peak_allocated_bytes": 12_574_805_504, "step_ms": 75.04,
          "lora_switch_ms": 626.0, **ABOUT}  # fmt: skip


def test_fp8_says_what_was_measured_and_no_more(tmp_path: Path) -> None:
    gain = {"kind": "lora_gain", "delta": 0.005, "gain": 1.01, "cosine": 0.2, "loras": 4, "gain_standard_error": 0.02}
    cut = {**BUDGET, "step_ms": 1.0, "incomplete": True, "run": "r2"}
    results = place(tmp_path / "results", fp8=[FORWARD, {**gain, **ABOUT}, BUDGET, cut])
    seen = part(report.updated(EMPTY, results), "fp8 benchmark")
    assert "| one call, plain weights, attention in FP8 | 0.0187 | 0.99983 | 0.95 | r1 |" in seen
    assert "| LoRA of 0.5% of the weights, mean of 4 LoRAs: 1.01 ± 0.02 of its change arrives |" in seen
    assert "| 16 | 12.6 | 75.0 |  |  | 626 |  | r1 |" in seen
    assert "r2" not in seen, "a line that was cut short"
