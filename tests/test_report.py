"""Reports: one self-contained file that shows everything it is given and trusts no name."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pcmecl_fast.evaluate.origin import Origin
from pcmecl_fast.evaluate.report import FaceGrid, Report, grid_image, save_grid_png, write_report
from pcmecl_fast.evaluate.results import Cell, Row, Table

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)> & {{ 7*7 }}'


def make_grid(rows: int = 2, columns: int = 3, size: int = 20, *, truth: bool = True) -> FaceGrid:
    generator = torch.Generator().manual_seed(0)
    emotions = ["neutral", "happy", "sad", "angry"]

    def frames(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, 3, size, size, generator=generator) * 2 - 1

    return FaceGrid(
        title="Held-out people",
        caption="Frames never trained on.",
        rows=[f"person-{i}" for i in range(rows)],
        columns=emotions[:columns],
        source=frames(rows),
        source_emotions=[emotions[i % 4] for i in range(rows)],
        edited=frames(rows, columns),
        truth=frames(rows, columns) if truth else None,
    )


def make_report() -> Report:
    return Report(
        title="A run",
        lead="What it is.",
        results=Table(
            ["edited", "unedited"],
            [
                Row("accuracy", [Cell.of(0.912345, [0.85, 0.96]), None], "0 to 1."),
                Row("frames", [Cell.of(12345), Cell.of("reference")]),
            ],
            "Over 7 edits.",
        ),
        prompts=Table(["right"], [Row("plain", [Cell.of(0.5, [0.25, 0.75], "%")])]),
        words=["They helped."],
        limits=["Not measured: taste."],
        curves={
            "stage 1/loss": [(s, 1 / (s + 1)) for s in range(400)],
            "stage 1/lr": [(0, 1e-4), (400, 1e-6)],
            "stage 2/loss": [(s, 2.0) for s in range(5)],
        },
        grids=[make_grid()],
        config={"data": {"path": Path("/some/where"), "sizes": (1, 2)}, "seed": 3},
        origin=Origin("2001-02-03 04:05:06", "pcmecl-fast train --out 'a b'", 12.3, {"torch": "9.9"}),
    )


class Page(HTMLParser):
    """A page as a browser sees it: elements with attributes, and text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(report: Report, folder: Path) -> Page:
    path = folder / "report.html"
    write_report(path, report)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


# ---- One file that needs nothing else --------------------------------------------------------------------------------


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    page = page_of(make_report(), tmp_path)
    assert "http://" not in page.html
    assert "https://" not in page.html
    assert "@import" not in page.html
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object"}
        assert (attributes.get("src") or "data:").startswith("data:"), tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    assert page.html.count("url(") == page.html.count("url(#")


def test_every_id_is_unique_and_every_reference_resolves(tmp_path: Path) -> None:
    page = page_of(make_report(), tmp_path)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for _, a in page.elements if "href" in a} <= set(ids)


def test_same_report_writes_the_same_bytes(tmp_path: Path) -> None:
    assert page_of(make_report(), tmp_path).html == page_of(make_report(), tmp_path).html


def test_eight_by_seven_faces_with_noise_stay_below_four_megabytes(tmp_path: Path) -> None:
    grid = make_grid(8, 4, 64)
    wide = replace(
        grid,
        columns=[f"emotion {i}" for i in range(7)],
        edited=torch.rand(8, 7, 3, 64, 64) * 2 - 1,
        truth=torch.rand(8, 7, 3, 64, 64) * 2 - 1,
    )
    page = page_of(replace(make_report(), curves={}, grids=[wide]), tmp_path)
    assert len(page.html) < 4e6


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = page_of(make_report(), tmp_path).html

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "report.html", replace(make_report(), title="new"))
    with pytest.raises(OSError, match="disk full"):
        save_grid_png(tmp_path / "grid.png", make_grid())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ---- Names are text --------------------------------------------------------------------------------------------------


def test_names_are_escaped_wherever_they_appear(tmp_path: Path) -> None:
    grid = replace(
        make_grid(1, 1), title=HOSTILE, caption=HOSTILE, rows=[HOSTILE], columns=[HOSTILE], source_emotions=[HOSTILE]
    )
    report = Report(
        title=HOSTILE,
        lead=HOSTILE,
        results=Table([HOSTILE], [Row(HOSTILE, [Cell(HOSTILE, HOSTILE)], HOSTILE)], HOSTILE),
        words=[HOSTILE],
        limits=[HOSTILE],
        origin=Origin(HOSTILE, HOSTILE, None, {HOSTILE: HOSTILE}),
        curves={f"{HOSTILE}/a": [(0, 1.0)], "a/$x^{": [(0, 1.0)], HOSTILE: []},
        grids=[grid],
        config={HOSTILE: HOSTILE},
    )
    page = page_of(report, tmp_path)
    assert page.all("script") == []
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    assert page.text.count(HOSTILE) >= 18
    assert "$x^{" in page.text


@pytest.mark.parametrize("name", ["", "two\nlines", "\udcff\x00\x1b", "名前 😀", "long" * 200])
def test_any_folder_name_can_be_shown(name: str, tmp_path: Path) -> None:
    grid = replace(make_grid(1, 1), title=name, caption=name, rows=[name], columns=[name], source_emotions=[name])
    assert (
        len(
            page_of(replace(make_report(), title=name, curves={}, grids=[grid], config={name: name}), tmp_path).all(
                "img"
            )
        )
        == 3
    )
    assert grid_image(grid).shape == grid_image(replace(grid, rows=["x"])).shape


# ---- Everything is shown ---------------------------------------------------------------------------------------------


def test_every_part_of_the_report_is_shown(tmp_path: Path) -> None:
    page = page_of(make_report(), tmp_path)
    for shown in (
        *("A run", "accuracy", "0.912", "0.850 to 0.960", "0 to 1.", "frames", "12,345", "reference", "Over 7 edits."),
        *("What it is.", "50.0 %", "25.0 to 75.0", "They helped.", "Not measured: taste."),
        *("2001-02-03 04:05:06", "pcmecl-fast train --out 'a b'", "12 s", "9.9"),
        *("stage 1", "stage 2", "loss", "lr", "Held-out people", "Frames never trained on.", "person-0", "happy"),
        *("path: /some/where", "seed: 3"),
    ):
        assert shown in page.text, shown
    assert len(page.all("svg")) == 3
    assert len(page.all("img")) == 2 * (1 + 3 + 3)


def test_faces_come_first_and_the_origin_last(tmp_path: Path) -> None:
    page = page_of(make_report(), tmp_path)
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == ["faces", "results", "prompts", "limits", "curves", "origin"]
    assert [a["href"] for a in page.all("a")] == [f"#{section}" for section in sections]


@pytest.mark.parametrize("truth", [True, False])
def test_the_layout_of_a_grid_is_told_on_the_page_and_fits_its_rows(truth: bool, tmp_path: Path) -> None:
    grid = make_grid(1, 1, truth=truth)
    assert ("Lower row: the true edit." in grid.layout) == truth
    assert ("Right: its edit to the emotion of each column." in grid.layout) != truth
    assert grid.layout in page_of(replace(make_report(), grids=[grid]), tmp_path).text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0.0, "0"), (0.0123456, "0.0123"), (-1.2345, "−1.23"), (12345.6, "12,346"), (1.2345e-7, "1.23e−07")),
        *((7, "7"), (-1234567, "−1,234,567"), (True, "yes"), ("12", "12"), ("none found", "none found")),
        *((math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "−∞"), (None, "none"), (torch.tensor(0.5), "0.500")),
    ],
)
def test_a_metric_reads_well(value: Any, shown: str, tmp_path: Path) -> None:
    table = Table(["value"], [Row("metric", [Cell.of(value)])])
    report = replace(make_report(), results=table, curves={}, grids=[])
    assert f">{shown}</td>" in page_of(report, tmp_path).html


def test_many_points_are_smoothed_and_few_are_not(tmp_path: Path) -> None:
    def colours(points: int) -> list[bool]:
        curve = [(s, math.sin(s)) for s in range(points)]
        html = page_of(replace(make_report(), curves={"a/b": curve}, grids=[]), tmp_path).html
        svg = html[html.index("<svg") : html.index("</svg>")]
        return [f"stroke: var(--{name})" in svg for name in ("raw", "accent")]

    assert colours(20) == [False, True]
    assert colours(200) == [True, True]


def test_a_long_curve_stays_small_and_keeps_its_peak(tmp_path: Path) -> None:
    curve = [(s, 1000.0 if s == 77_777 else math.sin(s)) for s in range(100_000)]
    page = page_of(replace(make_report(), curves={"a/b": curve}, grids=[]), tmp_path)
    assert len(page.html) < 120_000
    assert ">900<" in page.html  # the axis reaches up to the one peak of 1000


def test_frames_are_shown_pixel_for_pixel() -> None:
    grid = make_grid(1, 1)
    drawn = torch.round(grid_image(grid) * 255)
    face = torch.round((grid.edited[0, 0] + 1) * 127.5)
    scale = 128 // 20
    enlarged = face.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    inner = enlarged[:, scale:-scale, scale:-scale]  # its border marks the source's own emotion
    _, height, width = inner.shape
    corners = (drawn == inner[:, :1, :1]).all(dim=0).nonzero().tolist()
    assert any(torch.equal(drawn[:, y : y + height, x : x + width], inner) for y, x in corners)


# ---- What is missing -------------------------------------------------------------------------------------------------


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    assert "no results" in page_of(Report("Nothing"), tmp_path).text


def test_without_truth_only_source_and_edited_are_shown(tmp_path: Path) -> None:
    page = page_of(replace(make_report(), curves={}, grids=[make_grid(truth=False)]), tmp_path)
    assert len(page.all("img")) == 2 * (1 + 3)
    assert "row" not in page.text
    assert "truth" not in page.text
    assert "truth" not in " ".join(image["alt"] or "" for image in page.all("img"))


def test_an_absent_frame_leaves_its_place_and_a_broken_one_is_marked(tmp_path: Path) -> None:
    grid = make_grid()
    assert grid.truth is not None
    grid.truth[1, 2] = math.nan
    page = page_of(replace(make_report(), curves={}, grids=[grid]), tmp_path)
    assert len(page.all("img")) == 2 * (1 + 3 + 3) - 1
    assert "none" in page.text
    assert "not finite" not in page.text
    grid.edited[0, 1, 0, :4, :4] = math.inf
    assert "not finite" in page_of(replace(make_report(), curves={}, grids=[grid]), tmp_path).text
    magenta = (grid_image(grid) == torch.tensor([1.0, 0.0, 1.0])[:, None, None]).all(dim=0)
    assert magenta.sum() == (4 * 6) ** 2


@pytest.mark.parametrize(
    "values",
    [[], [math.nan], [math.inf, -math.inf], [1.0, math.nan, 2.0], [None, 1.0], [1e308, -1e308], [0.0] * 300],
)
def test_any_values_make_a_chart_or_say_why_not(values: list[float], tmp_path: Path) -> None:
    curve = [(10 * i, v) for i, v in enumerate(values)]
    page = page_of(replace(make_report(), curves={"a/b": curve}, grids=[]), tmp_path)
    finite = [v for v in values if v is not None and math.isfinite(v)]
    assert len(page.all("svg")) == bool(finite)
    assert ("not finite" in page.text) == (len(finite) < len(values))
    assert finite or "no finite value" in page.text or "no values" in page.text


def test_a_grid_without_rows_is_shown_as_such(tmp_path: Path) -> None:
    empty = make_grid(0, 3)
    assert "No faces." in page_of(replace(make_report(), curves={}, grids=[empty]), tmp_path).text
    assert grid_image(empty).ndim == 3


def test_configuration_of_any_type_is_written_as_yaml(tmp_path: Path) -> None:
    @dataclass
    class Options:
        rate: float
        device: torch.device

    config = {"options": Options(0.1, torch.device("cpu")), 3: {1}, "none": None, "nan": math.nan}
    text = page_of(replace(make_report(), config=config), tmp_path).text  # type: ignore[arg-type]
    for line in ("rate: 0.1", "device: cpu", "'3':", "none: null", "nan: .nan"):
        assert line in text, line


# ---- The grid as a picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "shown"), [(20, 120), (64, 128), (100, 100), (200, 200), (300, 256)])
def test_picture_grows_by_whole_cells(size: int, shown: int) -> None:
    narrow, wide = grid_image(make_grid(2, 3, size)), grid_image(make_grid(2, 4, size))
    assert wide.shape[2] - narrow.shape[2] == shown + 4
    assert grid_image(make_grid(3, 3, size)).shape[1] - narrow.shape[1] == 2 * (shown + 4) + 14


def test_saved_picture_is_the_tensor(tmp_path: Path) -> None:
    grid = make_grid()
    save_grid_png(tmp_path / "grid.png", grid)
    image = grid_image(grid)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    saved = Image.open(io.BytesIO((tmp_path / "grid.png").read_bytes()))
    assert saved.format == "PNG"
    assert saved.size == (image.shape[2], image.shape[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_float_type_and_gradients_are_accepted(dtype: torch.dtype) -> None:
    grid = make_grid()
    assert grid.truth is not None
    other = replace(
        grid,
        source=grid.source.to(dtype),
        edited=grid.edited.to(dtype).requires_grad_(),
        truth=grid.truth.to(dtype),
    )
    torch.testing.assert_close(grid_image(other), grid_image(grid), atol=0.01, rtol=0)


def test_mismatched_shapes_are_named() -> None:
    grid = make_grid()
    with pytest.raises(ValueError, match=r"edited: got shape \(2, 2, 3, 20, 20\), takes \(2, 3, 3, 20, 20\)"):
        replace(grid, edited=grid.edited[:, :2])
    with pytest.raises(ValueError, match="truth"):
        replace(grid, truth=grid.source)
    with pytest.raises(ValueError, match="source_emotions: got 1"):
        replace(grid, source_emotions=["happy"])
