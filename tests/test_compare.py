"""A comparison pairs runs by their queries, says what it could not compare, and shows both as a page and as plain values."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page, needs_chromium, open_in_chromium, requested
from rich.console import Console

import train
from lightning_modules.compare import compare, comparison_table, told
from lightning_modules.comparison import Comparison, Run, compared, named
from lightning_modules.statistics import holm, paired

HOSTILE = "<script>document.title='it ran'</script>|[bold]&"
SEEDS = {"before": 1, "after": 2}  # of noise that leaves the middle benchmark unclear
Queries = dict[int, float]


def row(benchmark: str, prefix: int, value: float | None, metric: str = "ndcg@10", **more: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "metric": metric,
        "prefix": prefix,
        "dtype": "float32",
        "prompts": True,
        "value": value,
    } | more


def write(folder: Path, benchmarks: dict[str, dict[int, Queries]], rows: list[dict[str, Any]] | None = None) -> Path:
    """A run of benchmarks with the values of their queries by prefix, and further rows."""
    folder.mkdir(parents=True, exist_ok=True)
    every, arrays = list(rows or []), {}
    for name, by_prefix in benchmarks.items():
        for prefix, by_query in by_prefix.items():
            every.append(row(name, prefix, float(np.mean(list(by_query.values())))))
            arrays[f"{name}|queries"] = np.array(list(by_query), np.int64)
            arrays[f"{name}|ndcg@10|{prefix}|float32|true"] = np.array(list(by_query.values()))
    (folder / "results.json").write_text(json.dumps(every))
    if arrays:
        np.savez(folder / "values.npz", **arrays)
    return folder


def drawn(seed: int, lift: float, number: int = 40) -> Queries:
    values = np.random.default_rng(0).uniform(0.2, 0.8, number) + np.random.default_rng(seed).normal(lift, 0.05, number)
    return {1000 + place: float(value) for place, value in enumerate(values)}


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """A baseline and a run: clearly better, clearly worse and unclear benchmarks, one of them untested."""
    before = {"up/text-text": 0.0, "down/text-text": 0.0, "same/text-text": 0.0}
    after = {"up/text-text": 0.1, "down/text-text": -0.1, "same/text-text": 0.001}
    sts = "sts/text-text"
    folders = []
    for name, lifts, spearman in (("before", before, 0.5), ("after", after, 0.6)):
        benchmarks = {b: {64: drawn(SEEDS[name], lift / 2), 128: drawn(SEEDS[name], lift)} for b, lift in lifts.items()}
        folders.append(str(write(tmp_path / name, benchmarks, [row(sts, p, spearman, "spearman") for p in (64, 128)])))
    return folders


def of(runs: list[str]) -> Comparison:
    names = named(runs, None)
    baseline, run = (Run(Path(folder), name) for folder, name in zip(runs, names, strict=True))
    return compared(run, baseline)


def test_differences_are_those_of_the_queries_with_interval_and_corrected_p(runs: list[str]) -> None:
    comparison = of(runs)
    wanted = {
        name: paired(np.array(list(drawn(SEEDS["after"], lift).values())), np.array(list(drawn(SEEDS["before"], 0.0).values())))
        for name, lift in (("up/text-text", 0.1), ("down/text-text", -0.1), ("same/text-text", 0.001))
    }
    found = {row.benchmark: row for row in comparison.rows}
    for name, corrected in zip(wanted, holm([one.p_value for one in wanted.values()]), strict=True):
        own = found[name]
        assert (own.difference, own.low, own.high, own.p_value) == wanted[name]
        assert own.corrected == corrected
        assert (own.prefix, own.num_queries, own.note) == (128, 40, "")
    assert [found[name].verdict for name in wanted] == ["better", "worse", "unclear"]


def test_queries_are_paired_by_content_not_by_place(tmp_path: Path) -> None:
    first = drawn(1, 0.0)
    turned = {query: first[query] + 0.1 for query in reversed(first)}
    runs = [str(write(tmp_path / n, {"a/text-text": {64: q}})) for n, q in (("before", first), ("after", turned))]
    (found,) = of(runs).rows
    assert found.difference == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    assert found.verdict == "better"


def test_only_shared_queries_are_compared_and_it_is_said(tmp_path: Path) -> None:
    before, after = {1: 0.2, 2: 0.4, 3: 0.9}, {2: 0.5, 3: 0.9, 4: 0.0, 5: 0.0}
    runs = [str(write(tmp_path / n, {"a/text-text": {64: q}})) for n, q in (("before", before), ("after", after))]
    (found,) = (comparison := of(runs)).rows
    assert found.difference == pytest.approx(0.05)
    assert (found.baseline, found.value) == (pytest.approx(0.65), pytest.approx(0.7))
    assert found.num_queries == 2
    assert "over the 2 queries in common of 3 and 4" in found.note
    assert comparison.by_prefix[0].differences == {"a/text-text": pytest.approx(0.05)}


def test_no_query_in_common_is_a_note_without_a_number(tmp_path: Path) -> None:
    runs = [str(write(tmp_path / n, {"a/text-text": {64: q}})) for n, q in (("before", {1: 0.5, 2: 0.6}), ("after", {3: 0.5}))]
    (found,) = of(runs).rows
    assert (found.difference, found.value, found.baseline, found.p_value, found.verdict) == (None, None, None, None, "")
    assert "no query in common (2 in before, 1 in after)" in found.note


def test_what_cannot_be_compared_is_said_never_dropped(tmp_path: Path) -> None:
    shared = {"ok/text-text": {64: drawn(1, 0.0)}}
    before = [row("gone/text-text", 64, 0.5), row("metric/text-text", 64, 0.5, "recall@1"), row("width/text-text", 64, 0.5)]
    after = [row("new/text-text", 64, 0.5), row("metric/text-text", 64, 0.5), row("width/text-text", 32, 0.5)]
    before.append(row("heard/text-audio", 64, 0.5))
    after.append(row("heard/text-audio", 64, None, note="not supported: the encoder takes no audio"))
    runs = [str(write(tmp_path / name, shared, rows)) for name, rows in (("before", before), ("after", after))]
    notes = {r.benchmark: (r.note, r.difference) for r in of(runs).rows}
    assert notes.pop("ok/text-text") == ("", 0.0)
    assert notes == {
        "gone/text-text": ("only in before", None),
        "new/text-text": ("only in after", None),
        "metric/text-text": ("before measures recall@1, after ndcg@10", None),
        "width/text-text": ("no prefix in common: 64 in before, 32 in after", None),
        "heard/text-audio": ("after: not supported: the encoder takes no audio", None),
    }
    compare(runs, str(tmp_path / "out"))
    text = Page((tmp_path / "out" / "compare.html").read_text()).text
    assert all(name in text and note in text for name, (note, _) in notes.items())


def test_runs_of_other_widths_are_compared_at_the_widest_in_common(tmp_path: Path) -> None:
    queries = drawn(1, 0.0)
    wide = write(tmp_path / "wide", {"a/text-text": {64: queries, 128: {q: v + 0.1 for q, v in queries.items()}}})
    narrow = write(tmp_path / "narrow", {"a/text-text": {32: queries, 64: queries}})
    (found,) = of([str(wide), str(narrow)]).rows
    assert (found.prefix, found.difference) == (64, 0.0)
    assert "at 64, the widest in common; wide has 128" in found.note


def test_without_values_of_queries_there_is_a_difference_but_no_test(runs: list[str]) -> None:
    found = {row.benchmark: row for row in of(runs).rows}["sts/text-text"]
    assert found.difference == pytest.approx(0.1)
    assert (found.low, found.p_value, found.corrected, found.verdict) == (None, None, None, "untested")
    assert "not tested: no values of single queries in before and after" in found.note


def test_values_that_do_not_fit_results_are_said(runs: list[str]) -> None:
    path = Path(runs[1]) / "results.json"
    rows = json.loads(path.read_text())
    for one in rows:
        one["value"] += 0.25 if one["benchmark"] == "up/text-text" else 0
    path.write_text(json.dumps(rows))
    found = {row.benchmark: row for row in of(runs).rows}
    assert "results.json of after says" in found["up/text-text"].note
    assert found["down/text-text"].note == ""


def test_wins_ties_losses_and_the_mean_are_counted(runs: list[str]) -> None:
    summary = of(runs).summary()
    assert [summary[name] for name in ("wins", "ties", "losses", "untested", "compared")] == [1, 1, 1, 1, 4]
    assert summary["higher"] + summary["equal"] + summary["lower"] == 4
    assert summary["mean_difference"] == pytest.approx(np.mean([row["difference"] for row in summary["rows"]]))
    assert [at["prefix"] for at in summary["by_prefix"]] == [64, 128]
    assert summary["by_prefix"][1]["mean_difference"] == pytest.approx(summary["mean_difference"])


def test_page_and_json_hold_the_comparison_sorted_by_difference(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(runs, str(tmp_path / "out"), names=["base", "new"])
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (content["baseline"], content["comparisons"][0]["run"]) == ("base", "new")
    assert content["folders"] == dict(zip(("base", "new"), runs, strict=True))
    text = (tmp_path / "out" / "compare.html").read_text()
    shown = re.findall(r'<div class="(\w+)"><span class="name">(.*?)</span>.*?<output>(.*?)</output>', text)
    rows = sorted(content["comparisons"][0]["rows"], key=lambda one: -one["difference"])
    wanted = [(one["verdict"], one["benchmark"], f"{one['difference']:+.3f}".replace("-", "−")) for one in rows]
    assert shown == wanted
    assert text.count("<circle class=") == 4
    for one in rows:
        assert f"<td>{one['baseline']:.3f}</td><td>{one['value']:.3f}</td>" in text
    printed = capsys.readouterr().out
    assert "1 clearly better, 1 clearly worse" in printed
    assert "compare.html" in printed


def test_dots_and_intervals_lie_where_their_numbers_are(runs: list[str], tmp_path: Path) -> None:
    compare(runs, str(tmp_path / "out"))
    text = (tmp_path / "out" / "compare.html").read_text()
    zero = float(re.findall(r"--zero: ([\d.]+)%", text)[0])
    found = re.findall(
        r'<div class="(better|worse|unclear)"><span class="name">.*?left: ([\d.]+)%; width: ([\d.]+)%.*?left: ([\d.]+)%', text
    )
    assert len(found) == 3
    for verdict, left, width, dot in found:
        low, high, place = float(left), float(left) + float(width), float(dot)
        assert 0 <= low <= place <= high <= 100
        assert {"better": low > zero, "worse": high < zero, "unclear": low < zero < high}[verdict]


def test_many_benchmarks_show_both_ends_and_fold_the_rest(tmp_path: Path) -> None:
    runs = []
    for name, step in (("before", 0.0), ("after", 0.001)):
        rows = [row(f"b{n}/text-text", 64, 0.5 + step * n) for n in range(30)]
        runs.append(str(write(tmp_path / name, {}, rows)))
    compare(runs, str(tmp_path / "out"))
    shown, folded = (tmp_path / "out" / "compare.html").read_text().split("<details>")[:2]
    names = re.findall(r'<span class="name">(.*?)</span>', shown)
    assert [names[0], names[12], names[-1], len(names)] == ["b29/text-text", "6 between these", "b0/text-text", 25]
    assert folded.count('<span class="name">') == 30


def test_several_runs_have_a_section_each(runs: list[str], tmp_path: Path) -> None:
    third = write(tmp_path / "third", {"up/text-text": {128: drawn(3, 0.0)}})
    compare([*runs, str(third)], str(tmp_path / "out"))
    text = (tmp_path / "out" / "compare.html").read_text()
    assert re.findall(r'<section id="([\w-]+)"', text) == ["overview", "run-0", "run-1"]
    assert len(json.loads((tmp_path / "out" / "compare.json").read_text())["comparisons"]) == 2


def test_the_terminal_table_shows_notes_and_fits_120_columns(tmp_path: Path) -> None:
    long = "mteb." + "VeryLongRetrieval" * 4 + "/text-text"
    runs = [
        str(write(tmp_path / n, {long: {64: drawn(1, x)}}, [row(n, 64, 0.5)])) for n, x in (("before", 0.0), ("after", 0.1))
    ]
    comparison = of(runs)
    console = Console(width=120, file=io.StringIO())
    console.print(comparison_table(comparison))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 120
    for text in ("only in before", "only in after", "+0.1", "ndcg@10 @ 64", "…"):
        assert text in shown
    assert "+0.1" in told(comparison)


def test_hostile_names_are_shown_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {HOSTILE: {64: drawn(1, 0.0), 128: drawn(1, 0.0)}}
    runs = []
    for name in ("before", "after"):
        rows = [row("a\x1b[31m", 64, None, note=HOSTILE), row("b", 64, 0.5, metric=HOSTILE)]
        runs.append(str(write(tmp_path / name, hostile, rows)))
    compare(runs, str(tmp_path / "out"), names=[HOSTILE, f"{HOSTILE}2"])
    text = (tmp_path / "out" / "compare.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name in page.attributes)
    assert HOSTILE in page.text
    assert "default-src 'none'" in text
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[bold]" in printed


@needs_chromium
def test_the_page_opens_without_console_message_and_asks_nothing(runs: list[str], tmp_path: Path) -> None:
    compare(runs, str(tmp_path / "out"))
    dom, log = open_in_chromium((tmp_path / "out" / "compare.html").as_uri(), tmp_path / "browser")
    assert "CONSOLE" not in log
    assert "up/text-text" in dom
    assert requested(tmp_path / "browser") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; name folders that conf=evaluate wrote"),
        ("{", "is broken"),
        ("[]", "must hold a list of at least one row"),
        ('{"a": 1}', "must hold a list of at least one row"),
        ("[3]", "row 0 is no mapping"),
        ('[{"benchmark": 3}]', "row 0 has 3 for `benchmark`"),
        ('[{"benchmark": "a", "metric": "m", "prefix": 64, "value": "high"}]', "row 0 has 'high' for `value`"),
        ('[{"benchmark": "a", "metric": "m", "prefix": 0, "value": 1}]', "row 0 has 0 for `prefix`"),
        ('[{"benchmark": "a", "metric": "m", "prefix": true, "value": 1}]', "row 0 has True for `prefix`"),
        ('[{"benchmark": "a", "metric": "m", "value": 0.5}]', "a value without a metric or a prefix"),
        ('[{"benchmark": "a", "metric": "m", "prefix": 64, "value": NaN}]', "is broken"),
    ],
)
def test_a_missing_or_broken_results_file_is_one_sentence(
    content: str | None, message: str, runs: list[str], tmp_path: Path
) -> None:
    path = Path(runs[1]) / "results.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compare(runs, str(tmp_path / "out"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_broken_values_file_is_one_sentence(runs: list[str], tmp_path: Path) -> None:
    path = Path(runs[1]) / "values.npz"
    whole, key = path.read_bytes(), "a/text-text|ndcg@10|64|float32|true"
    np.save(tmp_path / "one.npy", np.zeros(3))
    one = (tmp_path / "one.npy").read_bytes()
    middle = len(whole) // 3
    flipped = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 200]) + whole[middle + 200 :]
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], one, flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"values\.npz is broken \(.+\); evaluate again"):
            compare(runs, str(tmp_path / "out"))
    arrays: list[tuple[np.ndarray, np.ndarray, str]] = [
        (np.arange(3), np.zeros(2), "one number for each query"),
        (np.zeros(2), np.zeros(2), "one number for each query"),
        (np.array([1, 1]), np.zeros(2), "a query twice"),
        (np.arange(2), np.array([0.5, np.nan]), "no number"),
        (np.arange(2), np.array([{}, {}], object), "is broken"),
    ]
    for ids, values, message in arrays:
        write(Path(runs[0]), {"a/text-text": {64: {1: 0.5}}})
        write(Path(runs[1]), {"a/text-text": {64: {1: 0.5}}})
        both: dict[str, Any] = {"a/text-text|queries": ids, key: values}
        np.savez(path, **both)
        with pytest.raises(ValueError, match=message):
            compare(runs, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_old_runs_without_values_are_compared_and_it_is_said(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(runs[0]) / "values.npz").unlink()
    compare(runs, str(tmp_path / "out"))
    said = "no values.npz in before: differences there have no interval; evaluate again"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "out" / "compare.html").read_text()
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["comparisons"][0]["untested"] == 4


@pytest.mark.parametrize(
    ("runs", "names", "message"),
    [
        (["a"], None, "at least two runs and got 1"),
        (["a", "./a"], None, "a run is given more than once"),
        (["a", "b"], ["x"], "give 2 different ones"),
        (["a", "b"], ["x", "x"], "give 2 different ones"),
    ],
)
def test_runs_and_names_that_do_not_fit_are_refused(runs: list[str], names: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(runs, names)


def test_runs_are_called_by_as_much_of_their_folders_as_tells_them_apart() -> None:
    assert named(["x/before", "y/after"], None) == ["before", "after"]
    assert named(["x/soup", "y/soup"], None) == ["x/soup", "y/soup"]


def test_the_command_compares(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    train.main(["conf=compare", f"runs=[{','.join(runs)}]", f"out={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "compare.html").is_file()
