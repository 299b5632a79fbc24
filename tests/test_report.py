"""The report page opens alone, shows what it was given and nothing else, and is never half-written."""

import base64
import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pypdfium2
import pytest
import soundfile
from pages import CHROMIUM, Page, needs_chromium, open_in_chromium, requested
from PIL import Image, ImageDraw
from rich.console import Console

from datamodules.sample import Item, Part, media_item, text_item
from lightning_modules import charts
from lightning_modules.report import Neighbours, results_table, write_report
from lightning_modules.report_bytes import Point, bytes_section, front_of
from lightning_modules.report_scores import cell_of
from lightning_modules.results import Number, scores_of

PREFIXES = (64, 128, 256, 512, 768)
HOSTILE = "<script>document.title='it ran'</script><img src=x onerror=\"document.title='it ran'\">"
CODE = "def first(words: list[str]) -> str:\n\treturn words[0] if len(words) > 0 & True else '<none>'\n"


@pytest.fixture
def sample(tmp_path: Path) -> dict[str, Any]:
    return make_sample(tmp_path)


@pytest.fixture
def page(sample: dict[str, Any], tmp_path: Path) -> Path:
    write_report(tmp_path / "report.html", **sample)
    return tmp_path / "report.html"


@needs_chromium
def test_page_opens_with_its_table_and_texts_and_no_console_message(page: Path, tmp_path: Path) -> None:
    dom, log = open_in_chromium(page.as_uri(), tmp_path)
    assert "CONSOLE" not in log
    assert dom.count("<table") == 4
    for text in ("world/text-image", "0.905", "accuracy_<wbr>probe", "a red circle on grey", "return words[0]", "20,000"):
        assert text in dom


@needs_chromium
def test_page_asks_nothing_of_the_network(page: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary.html"
    canary.write_text('<img src="http://127.0.0.1:45678/seen.png">')
    open_in_chromium(canary.as_uri(), tmp_path / "canary")
    assert requested(tmp_path / "canary") == ["http://127.0.0.1:45678/seen.png"], "the witness itself does not see requests"
    open_in_chromium(page.as_uri(), tmp_path / "page")
    assert requested(tmp_path / "page") == []


def test_every_address_in_the_page_is_a_data_uri(page: Path) -> None:
    text = page.read_text()
    assert all(address.startswith("data:") for _, address in Page(text).addresses)
    assert "url(" not in text
    assert "@import" not in text


def test_script_in_a_caption_is_shown_not_run(page: Path, tmp_path: Path) -> None:
    parsed = Page(page.read_text())
    assert "script" not in parsed.tags
    assert not any(name.startswith("on") for name in parsed.attributes)
    assert HOSTILE in parsed.text
    if CHROMIUM:
        dom, _ = open_in_chromium(page.as_uri(), tmp_path)
        assert "<title>Polyphony &lt;b&gt; run" in dom
        assert "&lt;script&gt;document.title" in dom


def test_every_picture_and_player_is_embedded_and_decodes(page: Path, sample: dict[str, Any]) -> None:
    items = [item for row in sample["neighbours"] for item in (row.query, *(found for found, _, _ in row.found))]
    wanted = sorted((part.format, part.data) for item in items for part in item.parts if isinstance(part.data, bytes))
    got = []
    for tag, address in Page(page.read_text()).addresses:
        head, _, payload = address.partition(";base64,")
        if tag == "link":
            continue
        data = base64.b64decode(payload, validate=True)
        mime = head.removeprefix("data:")
        assert tag == {"image": "img", "application": "a"}.get(mime.split("/")[0], mime.split("/")[0])
        got.append((decoded_format(mime, data), data))
    assert sorted(got) == wanted
    assert {extension for extension, _ in got} == {"jpg", "png", "webp", "flac", "ogg", "wav", "mp4", "webm", "pdf"}


def test_nothing_half_written_stays_when_writing_fails(
    sample: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    target = folder / "report.html"
    target.write_text("what was there before")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(PermissionError):
            write_report(target, **sample)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("report.html", "what was there before")]
    with pytest.raises(IsADirectoryError):
        write_report(folder, **sample)
    assert not list(tmp_path.glob(".*.part"))


def test_table_numbers_equal_the_rows(page: Path, sample: dict[str, Any]) -> None:
    cells = re.findall(
        r'<th scope="row">([^<]+).*?<td class="metric">(.*?)</td><td>(.*?)</td>(.*?)</tr>', page.read_text(), flags=re.DOTALL
    )
    shown = {}
    for benchmark, metric, chance, values in cells:
        numbers = re.findall(r"--share: [\d.]+\">(-?[\d.]+) <small>(.*?)</small>", values)
        for prefix, (value, ratio) in zip(PREFIXES, numbers, strict=True):
            shown[benchmark, metric.replace("<wbr>", ""), prefix] = (chance, value, ratio)
    assert len(shown) == len(sample["rows"])
    for row in sample["rows"]:
        metric = row["metric"] if row["dtype"] == "float32" else f"{row['metric']} · {row['dtype']}"
        chance, value, ratio = shown[row["benchmark"], metric, row["prefix"]]
        assert (chance, value) == (f"{row['chance']:.3f}", f"{row['value']:.3f}")
        if row["chance"]:
            assert float(ratio.removesuffix("×")) == pytest.approx(
                row["value"] / row["chance"], rel=0.05
            )  # 10 becomes 10, 0.1 has two digits
        else:
            assert ratio == ""


def test_colour_of_a_cell_runs_from_chance_to_one() -> None:
    assert "--share: 0.000" in cell_of(Number(0.2), 0.2)
    assert "--share: 0.500" in cell_of(Number(0.6), 0.2)
    assert "--share: 1.000" in cell_of(Number(1.0), 0.2)
    assert "below" in cell_of(Number(0.1), 0.2)
    assert "--share: 0.600" in cell_of(Number(0.6), None)


def test_curves_are_drawn_for_each_task_and_run(page: Path) -> None:
    section = page.read_text().split('<section id="curves">')[1].split("</section>")[0]
    figures = section.split("<figure>")[1:]
    assert [figure.split("<b>")[1].split("</b>")[0] for figure in figures] == [
        "world/text-image",
        "code/text-code",
        "sound/text-audio",
    ]
    for figure in figures:
        loss, cosine = figure.split("<svg ")[1:]
        assert loss.count('class="line faint"') == loss.count('class="line "') == 2
        assert cosine.count('class="line dashed"') == cosine.count('class="line "') == 2
        assert "step</text>" in loss
        assert ">loss</text>" in loss
    for points in re.findall(r'points="(.*?)"', section):
        places = [tuple(map(float, place.split(","))) for place in points.split()]
        assert 10 < len(places) <= charts.MAX_POINTS
        assert all(48 <= x <= 340 and 26 <= y <= 146 for x, y in places)


def test_smoothing_keeps_a_straight_line_and_the_first_and_last_step() -> None:
    raw, mean = charts.smoothed([(step, 3.0) for step in range(1000)], 0, "")
    assert [raw.points[0][0], raw.points[-1][0]] == [0, 999]
    assert np.allclose([value for _, value in mean.points], 3.0, rtol=1e-12)


def test_losses_that_are_not_finite_are_said(sample: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "diverged.csv"
    log.write_text("step,train/a/b/loss\n0,1.5\n1,nan\n2,inf\n")
    write_report(tmp_path / "report.html", **dict(sample, curves={"diverged": log}))
    text = (tmp_path / "report.html").read_text()
    assert "diverged: 2 losses are not finite" in text
    assert not re.search(r"\b(nan|inf)\b", text.split("</style>")[1])


def test_empty_curves_and_neighbours_drop_their_sections(sample: dict[str, Any], tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", **dict(sample, curves={}, neighbours=[]))
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)"', text) == ["scores", "prefixes", "bytes"]


def test_only_so_many_queries_and_found_items_are_shown(sample: dict[str, Any], tmp_path: Path) -> None:
    found = tuple((text_item(f"found {rank}"), 0.5, False) for rank in range(9))
    many = [Neighbours("world/text-text", text_item(f"asked {number}"), found) for number in range(12)]
    write_report(tmp_path / "report.html", **dict(sample, neighbours=many))
    text = (tmp_path / "report.html").read_text()
    assert len(re.findall(r"asked \d", text)) == 8
    assert len(re.findall(r"found \d", text)) == 8 * 5
    assert "8 of 12 queries" in text


def test_media_too_large_for_a_page_are_named(sample: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_modules.page.MAX_MEDIA_BYTES", 0)
    write_report(tmp_path / "report.html", **sample)
    text = (tmp_path / "report.html").read_text()
    assert "base64" not in text
    assert re.search(r"video, webm, \d+ KiB: too large for this page", text)


def test_a_log_without_steps_is_refused(sample: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "other.csv"
    log.write_text("epoch,train/a/b/loss\n0,1.5\n")
    with pytest.raises(ValueError, match="has no column `step`"):
        write_report(tmp_path / "report.html", **dict(sample, curves={"other": log}))


def test_relevant_items_are_outlined_and_marked_with_a_word(sample: dict[str, Any], page: Path) -> None:
    num_relevant = sum(is_relevant for row in sample["neighbours"] for _, _, is_relevant in row.found)
    text = page.read_text()
    assert text.count('class="item relevant"') == text.count("<b>relevant</b>") == num_relevant


def test_terminal_table_shows_headlines_or_all_metrics(sample: dict[str, Any]) -> None:
    assert [column.header for column in results_table(sample["rows"]).columns] == [
        "task",
        "metric",
        "chance",
        *map(str, PREFIXES),
    ]
    headlines, everything = (printed(results_table(sample["rows"], all_metrics=flag)) for flag in (False, True))
    assert "recall@1 " in headlines
    assert "ndcg@10" not in headlines
    assert "0.905" in headlines
    assert "ndcg@10" in everything


def test_no_rows_and_repeated_rows_are_refused(sample: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results to report"):
        write_report(tmp_path / "report.html", **dict(sample, rows=[]))
    with pytest.raises(ValueError, match="no results to report"):
        results_table([])
    with pytest.raises(ValueError, match="two rows give recall@1"):
        results_table([sample["rows"][0]] * 2)
    assert not (tmp_path / "report.html").exists()


def test_an_interval_stands_in_its_cell_and_as_a_band(tmp_path: Path) -> None:
    rows = [
        row | {"low": row["value"] - 0.02, "high": row["value"] + 0.03} for row in make_curve("a/text-text", "m@1", 0.8, 0.1)
    ]
    text = written(tmp_path, rows)
    for row in rows:
        assert f'<small class="interval">{row["low"]:.3f}–{row["high"]:.3f}</small>' in text
    assert len(re.findall(r'<polygon class="band" points="[^"]+"', text)) == 1
    assert "polygon" not in written(tmp_path, make_curve("a/text-text", "m@1", 0.8, 0.1)).split("</style>")[1]


def test_a_row_without_a_number_says_why_and_is_in_no_chart(tmp_path: Path) -> None:
    said = "not supported: the encoder takes no <audio>"
    missing = {"benchmark": "b/text-audio", "metric": "m@1", "prefix": 64, "dtype": "float32", "value": None, "note": said}
    rows = [*make_curve("a/text-text", "m@1", 0.8, 0.1), missing]
    text = written(tmp_path, rows)
    assert Page(text).text.count(said) == 1
    assert len(re.findall("<figure>", text)) == 1
    row = re.search(r'<th scope="row">b/text-audio.*?</tr>', text)
    assert row is not None
    assert not re.search(r"\d\.\d", row[0])
    table = printed(results_table(rows))
    assert said in table
    assert "nan" not in table.lower()


def test_a_value_that_is_not_finite_is_a_note_not_a_number(tmp_path: Path) -> None:
    rows = make_curve("a/text-text", "m@1", 0.8, 0.1)
    rows[0]["value"] = float("nan")
    text = written(tmp_path, rows).split("</style>")[1]
    assert "the value is nan" in text
    assert ">nan " not in text


def test_the_front_is_what_nothing_smaller_beats() -> None:
    points = [Point(*values) for values in ((8, 0.5, "b", 64), (8, 0.4, "c", 64), (16, 0.5, "b", 128), (32, 0.7, "c", 32))]
    points += [Point(64, 0.6, "a", 16), Point(128, 0.8, "a", 32)]
    assert [(point.num_bytes, point.value) for point in front_of(points)] == [(8, 0.5), (32, 0.7), (128, 0.8)]


def test_the_mean_over_bytes_is_of_benchmarks_that_have_every_dtype() -> None:
    stored = {"float32": 4.0, "int8": 1.0, "binary": 0.125}
    rows = [row for name in ("a", "b") for dtype in stored for row in make_curve(f"{name}/text-text", "m@1", 0.8, 0.1, dtype)]
    rows += make_curve("sts/text-text", "spearman", 0.8, 0.0) + make_curve("sts/text-text", "spearman", 0.8, 0.0, "int8")
    rows += make_curve("c/text-text", "m@1", 0.1, 0.1) + make_curve("c/text-text", "m@1", 0.1, 0.1, "int8")
    for row in rows:
        row["value"] *= {"float32": 1, "int8": 0.999, "binary": 0.5}[row["dtype"]]
    section = bytes_section(scores_of(rows))
    assert "mean of 2 retrieval benchmarks" in section
    found = re.findall(r"</span> (\w+)</th><td>(\d+)</td><td>([\d,]+)</td><td>[\d.,]+×</td><td>([\d.]+)</td>", section)
    assert found[0] == ("float32", "768", "3,072", f"{0.8 * (1 - 6 / 768):.3f}")
    assert [int(size.replace(",", "")) for _, _, size, _ in found] == sorted(
        (int(size.replace(",", "")) for _, _, size, _ in found), reverse=True
    )
    assert found[-1][:3] == ("binary", "64", "8")
    assert f"The best mean, {0.8 * (1 - 6 / 768):.3f}, takes 3,072 bytes" in section
    assert len(re.findall("<figcaption><b>", section)) == 1 + 4


def test_other_dtypes_and_missing_prompts_stay_out_of_the_scores(tmp_path: Path) -> None:
    rows = make_curve("a/text-text", "m@1", 0.8, 0.1)
    rows += make_curve("a/text-text", "m@1", 0.7, 0.1, "int8")
    rows += [row | {"prompts": False} for row in make_curve("a/text-text", "m@1", 0.6, 0.1)]
    text = written(tmp_path, rows)
    scores = section_of(text, "scores")
    assert scores.count('<th scope="row">') == 1
    assert "int8" not in scores
    assert "int8" in section_of(text, "bytes")
    assert section_of(text, "prefixes").count("<polyline") == 1
    table = printed(results_table(rows))
    assert table.count("a/text-text") == 1
    assert f"{0.8 * (1 - 6 / 768):.3f}" in table


def test_the_terminal_table_fits_120_columns() -> None:
    rows = [
        r for n in range(4) for r in make_curve(f"mteb.{'VeryLongRetrieval' * 3}{n}/text-text", "accuracy_zero_shot", 0.8, 0.1)
    ]
    console = Console(width=120, file=io.StringIO())
    console.print(results_table(rows))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 120
    assert f"{0.8 * (1 - 6 / 768):.3f}" in shown


def test_prompts_are_sorted_by_what_leaving_them_out_loses(tmp_path: Path) -> None:
    rows = []
    for name, loss in (("a", 0.01), ("b", 0.2), ("c", -0.1)):
        rows += make_curve(f"{name}/text-text", "m@1", 0.5, 0.1)
        rows += [row | {"prompts": False} for row in make_curve(f"{name}/text-text", "m@1", 0.5 - loss, 0.1)]
    section = section_of(written(tmp_path, rows), "prompts").split("<details>")[0]
    found = re.findall(r'<th scope="row">(.*?)</th>.*?<td[^>]*>([−+]?[\d.]+)(?:<i[^>]*></i>)?</td></tr>', section)
    share = 1 - 6 / 768
    wanted = [("b/text-text", -0.2), ("a/text-text", -0.01), ("c/text-text", 0.1), ("mean of 3", -0.11 / 3)]
    assert found == [(name, f"{value * share:+.3f}".replace("-", "−")) for name, value in wanted]


def test_languages_of_groups_lie_beside_each_other_with_best_and_worst_marked(tmp_path: Path) -> None:
    rows = []
    for group, ceilings in (
        ("g", {"de": 0.9, "sw": 0.3, "hi": 0.6}),
        ("h", {"de": 0.5, "sw": 0.7, "hi": 0.6}),
        ("i", {"de": 0.5}),
    ):
        for language, ceiling in ceilings.items():
            curve = make_curve(f"{group}_{language}/text-text", "m@1", ceiling, 0.1)
            rows += [row | {"group": group, "language": language} for row in curve]
    section = section_of(written(tmp_path, rows), "languages")
    assert section.count("<table") == 1
    found = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', section)
    shown = {name: re.findall(r">([\d.]+) <small>(.?)</small>", cells) for name, cells in found}
    share = 1 - 6 / 768
    assert list(shown) == ["de", "hi", "sw", "mean"]
    assert shown["de"] == [(f"{0.9 * share:.3f}", "▲"), (f"{0.5 * share:.3f}", "▼")]
    assert shown["sw"] == [(f"{0.3 * share:.3f}", "▼"), (f"{0.7 * share:.3f}", "▲")]
    assert [value for value, _ in shown["mean"]] == [f"{0.6 * share:.3f}"] * 2


def test_the_vector_space_is_drawn_with_its_reference_and_how_to_read_it(tmp_path: Path) -> None:
    space = [
        {"benchmark": f"{b}/text-image", "prefix": p, "side": side, "measure": m, "value": v, "reference": r, "note": None}
        for b in ("a", "b")
        for p in PREFIXES
        for side, m, v, r in (("queries", "spread", 3 / p, 1 / p), ("both", "modality_gap", 0.4, 0.01))
    ]
    space.append(space[0] | {"benchmark": HOSTILE, "value": None, "note": HOSTILE})
    write_report(tmp_path / "r.html", title="t", rows=make_rows(), curves={}, neighbours=[], facts={}, space=space)
    section = section_of((tmp_path / "r.html").read_text(), "space")
    assert section.count("<figure>") == 2
    assert "spread ÷ reference" in section
    assert "Mean squared cosine of pairs" in section
    assert "Distance between the mean query" in section
    spread = section.split("<figure>")[1]
    ys = [float(place.split(",")[1]) for place in re.findall(r'<polyline class="line " points="([^"]+)"', spread)[0].split()]
    assert len(ys) == len(PREFIXES)
    assert max(ys) - min(ys) < 0.11  # three times the reference everywhere
    assert Page(section).text.count(HOSTILE) == 2
    assert "script" not in Page(section).tags


def test_many_benchmarks_are_shown_by_group_and_every_number_is_still_there(tmp_path: Path) -> None:
    rows = [row for n in range(40) for row in make_curve(f"s{n}/text-text", "m@1", 0.3 + n / 100, 0.1)]
    rows += make_curve("alone/text-image", "m@1", 0.9, 0.1)
    text = written(tmp_path, rows)
    assert section_of(text, "prefixes").count("<figure>") == 2
    scores = section_of(text, "scores")
    overview, *folded = scores.split("<details>")
    assert re.findall(r'<th scope="row">([^<]+)', overview) == ["text → text", "alone/text-image"]
    mean = sum((0.3 + n / 100) * (1 - 6 / 768) for n in range(40)) / 40
    assert f"{mean:.3f}" in overview
    assert [len(re.findall('<th scope="row">', part)) for part in folded] == [40, 1]


def test_old_rows_without_the_newer_fields_are_shown(tmp_path: Path) -> None:
    old = {"benchmark": "a/text-text", "metric": "m@1", "prefix": 64, "dtype": "float32", "value": 0.5, "chance": 0.1}
    text = written(tmp_path, [old | {"num_queries": 10, "num_candidates": 20}])
    assert re.findall(r'<section id="(\w+)"', text) == ["scores", "prefixes"]
    assert "10 queries, 20 candidates" in text


@needs_chromium
def test_every_section_opens_without_console_message(tmp_path: Path) -> None:
    rows = []
    for name in ("de", "sw"):
        for dtype in ("float32", "int8", "binary"):
            rows += make_curve(f"{HOSTILE}_{name}/text-text", "m@1", 0.8, 0.1, dtype)
        rows += [r | {"prompts": False} for r in make_curve(f"{HOSTILE}_{name}/text-text", "m@1", 0.6, 0.1)]
    for row in rows:
        row |= {"group": HOSTILE, "language": f"{row['benchmark'][-12:]}{HOSTILE}", "low": 0.1, "high": 0.9}
    side = {"benchmark": "a", "prefix": 64, "side": HOSTILE, "measure": HOSTILE, "value": 0.1, "reference": 0.2, "note": None}
    write_report(tmp_path / "r.html", title="t", rows=rows, curves={}, neighbours=[], facts={}, space=[side])
    text = (tmp_path / "r.html").read_text()
    assert re.findall(r'<section id="(\w+)"', text) == ["scores", "prefixes", "bytes", "languages", "prompts", "space"]
    assert "script" not in Page(text).tags
    assert not any(name.startswith("on") for name in Page(text).attributes)
    dom, log = open_in_chromium((tmp_path / "r.html").as_uri(), tmp_path)
    assert "CONSOLE" not in log
    assert "<title>t</title>" in dom
    assert requested(tmp_path) == []


def written(folder: Path, rows: list[dict]) -> str:
    """The page of these rows alone."""
    write_report(folder / "report.html", title="a run", rows=rows, curves={}, neighbours=[], facts={})
    return (folder / "report.html").read_text()


def section_of(text: str, name: str) -> str:
    return text.split(f'<section id="{name}"')[1].split("</section>")[0]


def make_sample(folder: Path) -> dict[str, Any]:
    """A run as it comes: nine benchmarks, two runs with three tasks, neighbours of every modality."""
    return {
        "title": "Polyphony <b> run",
        "rows": make_rows(),
        "curves": {run: make_log(folder / f"{run}.csv", seed) for seed, run in enumerate(("hard negatives", "baseline"))},
        "neighbours": make_neighbours(),
        "facts": {
            "date": "2025-01-31",
            "steps": "20,000",
            "wall seconds": "5,412",
            "parameters": "310.4 M",
            "checkpoint": "a&b.ckpt",
        },
    }


def make_rows() -> list[dict]:
    ceilings = {
        "text-image": 0.93,
        "image-text": 0.91,
        "text-code": 0.88,
        "text-audio": 0.71,
        "text-video": 0.64,
        "text-page": 0.83,
    }
    rows = []
    for task, ceiling in ceilings.items():
        metrics = {"recall@1": 1.0, "recall@5": 1.05, "recall@10": 1.07, "mrr@10": 1.02, "ndcg@10": 1.03}
        for metric, factor in metrics.items():
            rows += make_curve(f"world/{task}", metric, ceiling * factor, 0.001 * int(metric.rpartition("@")[2]))
    rows += make_curve("world/text-image", "recall@1", 0.9, 0.005, dtype="int8")
    rows += make_curve("sts/sentences", "spearman", 0.81, 0.0)
    rows += make_curve("labels/sounds", "accuracy_zero_shot", 0.62, 0.1)
    rows += make_curve("labels/sounds", "accuracy_probe", 0.84, 0.1)
    rows += make_curve("labels/untrained", "accuracy_zero_shot", 0.09, 0.1)
    rows[0]["value"] = 0.905
    return rows


def make_curve(benchmark: str, metric: str, ceiling: float, chance: float, dtype: str = "float32") -> list[dict]:
    shared = {"benchmark": benchmark, "metric": metric, "dtype": dtype, "chance": chance, "num_queries": 1000}
    values = (min(ceiling * (1 - 6 / prefix), 1) for prefix in PREFIXES)
    return [shared | {"prefix": p, "value": v, "num_candidates": 1000} for p, v in zip(PREFIXES, values, strict=True)]


def make_log(path: Path, seed: int) -> Path:
    """A sparse metrics.csv: one row per task and step, one for the learning rate."""
    noise = np.random.default_rng(seed)
    tasks = {"world/text-image": 4.2, "code/text-code": 3.1, "sound/text-audio": 4.9}
    names = ("loss", "loss@64", "positive_cosine", "negative_cosine", "masked_share", "examples_per_second")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "learning_rate", *(f"train/{task}/{name}" for task in tasks for name in names)])
        writer.writeheader()
        for step in range(0, 20_001, 40):
            writer.writerow({"step": step, "learning_rate": 1e-4})
            for task, start in tasks.items():
                left = np.exp(-step / (3000 + 900 * seed))
                values = (0.3 + start * left, 0.5 + start * left, 0.82 - 0.5 * left, 0.08 + 0.2 * left, 0.01, 900)
                noisy = (value * noise.normal(1, 0.06) for value in values)
                writer.writerow({"step": step} | {f"train/{task}/{name}": v for name, v in zip(names, noisy, strict=True)})
    return path


def make_neighbours() -> list[Neighbours]:
    pictures = [
        media_item("image", picture(hue), extension) for hue, extension in enumerate(("jpg", "png", "webp", "jpg", "png"))
    ]
    sounds = [
        media_item("audio", sound(extension, 220 * n), extension) for n, extension in enumerate(("flac", "ogg", "wav"), start=1)
    ]
    films = [media_item("video", film(extension), extension) for extension in ("mp4", "webm")]
    pages = [media_item("page", page_image(extension), extension) for extension in ("webp", "png", "pdf")]
    mixed = Item(
        (Part("text", "What is drawn here, and what is said?"), pictures[0].parts[0], sounds[1].parts[0]), title="Both"
    )
    texts = [
        "a red circle on grey",
        HOSTILE,
        "two blue squares, the left one larger " * 8,
        "naïve café – 東京 ∑",
        "a green shape",
    ]
    captions = [text_item(text) for text in texts]
    code = [text_item(CODE, kind="code"), text_item("for (int i = 0; i < n; ++i) sum += i;", kind="code")]
    return [
        Neighbours("world/text-image", captions[0], ranked(pictures, relevant=0)),
        Neighbours("world/text-image", captions[2], ranked(pictures[::-1], relevant=2)),
        Neighbours("world/image-text", pictures[1], ranked(captions, relevant=1)),
        Neighbours("code/text-code", text_item("the first word of a list"), ranked(code, relevant=0)),
        Neighbours("sound/text-audio", text_item("a low hum"), ranked(sounds, relevant=1)),
        Neighbours("world/text-video", text_item("a bar that wanders to the right"), ranked(films, relevant=0)),
        Neighbours("world/text-page", text_item("revenue by quarter"), ranked(pages, relevant=2)),
        Neighbours("world/mixed-mixed", mixed, ranked([mixed, pages[0], captions[4]], relevant=0)),
    ]


def ranked(items: list[Item], relevant: int) -> tuple[tuple[Item, float, bool], ...]:
    return tuple((item, 0.91 - 0.07 * rank, rank == relevant) for rank, item in enumerate(items))


def picture(seed: int) -> bytes:
    """A disc on a ground, in the format of its place in the sample."""
    image = Image.new("RGB", (240, 180), (205, 205, 200))
    colour = [(196, 60, 50), (50, 90, 180), (60, 140, 80), (210, 160, 50), (120, 70, 150)][seed]
    ImageDraw.Draw(image).ellipse((20 + 20 * seed, 20, 150 + 20 * seed, 150), fill=colour)
    return saved(image, ("JPEG", "PNG", "WEBP", "JPEG", "PNG")[seed])


def page_image(format: str) -> bytes:
    image = Image.new("RGB", (300, 400), "white")
    draw = ImageDraw.Draw(image)
    draw.text((30, 30), "Revenue by quarter", fill="black", font_size=22)
    for line in range(12):
        draw.line((30, 90 + 22 * line, 260 - 9 * (line % 4), 90 + 22 * line), fill=(120, 120, 120), width=5)
    return saved(image, format.upper())


def saved(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def sound(format: str, hertz: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000), 16_000, format=format.upper())
    return buffer.getvalue()


def film(format: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream({"mp4": "libx264", "webm": "libvpx"}[format], rate=8)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(8):
            pixels = np.full((120, 160, 3), 60, np.uint8)
            pixels[:, 20 * number : 20 * number + 20] = (200, 120, 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decoded_format(mime: str, data: bytes) -> str:
    """The file extension that belongs to `data`, which must decode as its MIME type says."""
    family, subtype = mime.split("/")
    match family:
        case "image":
            with Image.open(io.BytesIO(data), formats=(subtype,)) as image:
                image.load()
        case "audio":
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                assert file.format.lower() == subtype
                assert len(file.read()) == 16_000
        case "video":
            with av.open(io.BytesIO(data), "r", format={"webm": "matroska"}.get(subtype, subtype)) as container:
                assert len(list(container.decode(video=0))) == 8
        case _:
            assert len(pypdfium2.PdfDocument(data)) == 1
    return {"jpeg": "jpg"}.get(subtype, subtype)


def printed(table: object) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
