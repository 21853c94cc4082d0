"""bench_gpu.py at toy sizes: every part gives its figures, and the table holds them."""

import json

import bench_gpu
import pytest

FIGURES = {
    "correct": {"tests", "exit code", "mask tokens other than the CPU's", "masks that differ"},
    "decode-b": {"copy bandwidth GB/s", "ms per pass", "share of bandwidth", "first call s", "masks/s"},
    "train-b": {"samples/s", "samples/s, encoded too", "MFU", "measured GB", "estimate GB", "matrix product TFLOP/s"},
    "loader": {"drawn pictures/s at 256 px", "train-b samples/s"},
    "learn": {"exit code", "steps", "samples/s", "drawing alone, samples/s", "cIoU"},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("part", FIGURES)
def test_a_rehearsed_part_gives_its_figures(out, part):
    bench_gpu.main([part, str(out), "--rehearse", "--device", "cpu"])
    result = json.loads((out / f"{part}.json").read_text())
    assert result["rehearsal"] and result["device"] == "CPU" and result.get("exit code", 0) == 0
    for row in [result, *result.get("rows", [])]:
        result = row | result
        assert "error" not in row
    assert {name for name in FIGURES[part] if result.get(name) is not None} == FIGURES[part]
    assert part != "correct" or "1 passed" in result["tests"] and result["mask tokens other than the CPU's"] == 0


def test_the_table_holds_what_was_run(out, capsys):
    (out / "train-l.json").write_text(json.dumps({"dtype": "bfloat16", "rows": [{"MFU": 0.51234}, {"MFU": None}]}))
    bench_gpu.main(["table", str(out)])
    table = (out / "gpu.md").read_text()
    assert "### train-l\n\ndtype bfloat16\n\n| MFU |\n|---|\n| 0.512 |\n| not run |\n" in table
    assert table.strip() in capsys.readouterr().out
    assert json.loads((out / "gpu.json").read_text())["train-l"]["dtype"] == "bfloat16"
