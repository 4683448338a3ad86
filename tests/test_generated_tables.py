"""The tables that are generated into the prose pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hessnb.errors import InputError
from hessnb.pages import speed_tables
from hessnb.paper.tables import NOT_MEASURED, markdown

RATIO = {"median": 14.25, "min": 13.0, "max": 15.5}
PROVENANCE = {
    "device": "A processor",
    "threads": 1,
    "torch": "2.13.0",
    "date": "2026-11-23T10:00:00+00:00",
    "commit": "0123456789abcdef",
}


def row(name: str, **more: Any) -> dict[str, Any]:
    common = {"what": f"what {name} is", "our_seconds": 10.0, "rounds": 3, "notes": [], "provenance": PROVENANCE}
    return {"name": name, **common, **more}


def compared(name: str, **more: Any) -> dict[str, Any]:
    return row(name, peer="Peer 1.0", peer_seconds=142.5, ratio=RATIO, **more)


def written(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps({"rows": rows}))
    return speed_tables(path).replace("\u00a0", " ")


def test_comparison_shows_ratio_times_products_and_residuals(tmp_path: Path) -> None:
    products, residuals = {"ours": 73, "peer": 577}, {"ours": 6e-5, "peer": 1.2e-2}
    text = written(tmp_path, compared("pyhessian", products=products, residual_max=residuals))
    expected = "| Peer 1.0 | 14.2 (13 to 15.5) | 10 s | 142 s | 73 / 577 | 6e-05 / 1e-02 |"
    assert expected in text
    assert "A processor, 1 thread, torch 2.13.0, 2026-11-23, commit 0123456789ab." in text


def test_single_round_has_no_spread_and_a_bound_says_so(tmp_path: Path) -> None:
    text = written(tmp_path, {**compared("one", at_least=True), "rounds": 1})
    assert "| more than 14.2 |" in text


def test_products_become_one_table_by_batch_size(tmp_path: Path) -> None:
    def cost(ours: float, peer: float) -> dict[str, Any]:
        return {"ours": {"median": ours}, "ours, no graph kept": {"median": 3.0}, "peer": {"median": peer}}

    rows = [
        compared("product-500-peer", gradients=cost(1.9, 3.3)),
        compared("product-125-peer", gradients=cost(1.8, 3.5)),
    ]
    text = written(tmp_path, *rows)
    assert "| Batch | hessnb, graph kept | from scratch | Peer 1.0 |" in text
    assert text.index("| 125 | 1.80 | 3.00 | 3.50 |") < text.index("| 500 | 1.90 | 3.00 | 3.30 |")


def test_memory_is_a_sentence_with_the_budget(tmp_path: Path) -> None:
    text = written(
        tmp_path,
        row(
            "memory",
            peak_gib=1.9,
            graph_memory_gib=1.0,
            basis_rows=60,
            basis_gib=0.78,
            products={"ours": 90},
            residual_max={"ours": 9e-5},
        ),
    )
    assert "1.9 GiB, with 1 GiB allowed for graphs, 0.78 GiB for 60 rows of the basis, and room for" in text
    assert "; 90 products" in text


def test_without_measurements_it_says_so(tmp_path: Path) -> None:
    assert speed_tables(tmp_path / "absent.json").lower().startswith(NOT_MEASURED)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"name": "x", "ratio": {}}]}'])
def test_damaged_file_is_an_input_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "benchmarks.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"benchmarks\.json.*make bench"):
        speed_tables(path)


def test_recorded_benchmarks_can_be_shown() -> None:
    path = Path(__file__).parents[1] / "book" / "record" / "benchmarks.json"
    assert "Measured on:" in speed_tables(path)


@pytest.mark.parametrize(
    ("column", "rule"),
    [
        (["live", "record (paper)"], ":---"),
        (["✓ holds", f"· {NOT_MEASURED}"], ":---"),
        (["0.49 (2.96)", NOT_MEASURED, "–"], "---:"),
        (["× 14.7 (8.65 to 24.9)", "−0.05"], "---:"),
        ([NOT_MEASURED, "–"], "---:"),
        ([f"{NOT_MEASURED} (31.4)", NOT_MEASURED, "too few"], "---:"),
        (["12 words that are too many for a cell of one line"], ":---"),
    ],
)
def test_columns_of_text_stand_on_the_left_and_numbers_on_the_right(column: list[str], rule: str) -> None:
    lines = markdown(["first", "second"], [["7", cell] for cell in column]).splitlines()
    assert lines[1] == f"| :--- | {rule} |"


def test_numbers_are_parted_before_a_bracket_alone_and_with_a_deviation_they_are_numbers_however_long() -> None:
    rows = [["64", "99.99 ± 0.00 (99.19 ± 0.06)"], ["128", "63.9 ± 0.4 (60.4; +3.6)"], ["256", "not measured"]]
    (_, rule, *shown) = markdown(["Batch", "ours"], rows).splitlines()
    assert rule == "| :--- | ---: |"
    assert shown == [
        "| 64 | 99.99\u00a0±\u00a00.00 (99.19\u00a0±\u00a00.06) |",
        "| 128 | 63.9\u00a0±\u00a00.4 (60.4;\u00a0+3.6) |",
        "| 256 | not\u00a0measured |",
    ]
