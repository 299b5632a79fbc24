"""Promises of conf=inspect: its numbers are those of the shards, what is missing is named, what is hostile is only text."""

import base64
import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import Page, needs_chromium, open_in_chromium, requested
from PIL import Image
from samples import picture_bytes, sound_bytes

import train
from datamodules.curation.duplicates import Contents, repeats
from datamodules.curation.survey import evenly, padding, spreads, survey
from datamodules.extent import EXTENT
from datamodules.sample import Example, Item, Part, media_item, text_item
from datamodules.shards import Split, quarantined, read_quarantine, write_quarantine, write_split
from datamodules.tasks import BenchmarkSpec, TaskSpec
from lightning_modules.inspection import Mixture, inspect

ROOT = Path(__file__).parent.parent
HOSTILE = "<script>document.title='it ran'</script><img src=x onerror=\"document.title='it ran'\">"


def pair(key: str, query: str, target: str, **more) -> Example:
    return Example(key, text_item(query), text_item(target), **more)


def write(folder: Path, *examples: Example, **more) -> Split:
    write_split(folder, examples, **more)
    return Split(folder)


def damage(split: Split, needle: bytes) -> None:
    """Change one byte of what is stored."""
    tar = Path(str(split.folder)) / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(needle)] ^= 1
    tar.write_bytes(data)


def tables(page: str) -> dict[str, list[list[str]]]:
    """Section to the rows of its tables, cells as text, heads among them."""
    found = {}
    for name, section in re.findall(r'<section id="(\w+)">(.*?)</section>', page, flags=re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", section)
        found[name] = [[Page(cell).text for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]
    return found


def inspected(root: Path, tasks: dict[str, TaskSpec], benchmarks: dict[str, BenchmarkSpec] | None = None, **more) -> str:
    """The page of an inspection."""
    inspect(str(root), Mixture(tasks), str(root / "out"), benchmarks=benchmarks, **more)
    return (root / "out" / "inspect.html").read_text()


@pytest.fixture
def small(tmp_path) -> Path:
    """A split of four pairs with a repeated one and hard negatives, a test split that shares a query and a target."""
    no = (text_item("no"),)
    train_pairs = [
        pair("a", "red", "rot", negatives=no * 2),
        pair("b", "blue", "blau", negatives=no),
        pair("c", " blue ", "blau"),  # white space folds: the same content
        pair("d", "blue", "bleu"),
    ]
    test_pairs = [pair("x", "blue", "azul"), pair("y", "green", "rot"), pair("z", "grey", "gris")]
    write(tmp_path / "set" / "train", *train_pairs, about={"licence": "CC0"})
    write(tmp_path / "set" / "test", *test_pairs)
    return tmp_path


def test_counts_of_a_task_are_those_worked_out_by_hand(small):
    tasks = {"a/pairs": TaskSpec("set/train", batch_size=2), "b/twice": TaskSpec("set/train", batch_size=4, rate=3.0)}
    rows = tables(inspected(small, tasks))["tasks"]
    megabytes = f"{(small / 'set' / 'train' / '000000.tar').stat().st_size / 1e6:.1f}"
    # four examples in batches of two: two steps of the task, which has a quarter of the steps; three negatives in all
    assert rows[1] == ["a/pairs", "retrieval", "4", megabytes, "25.0%", "2", "2.0", "8", "0.75", ""]
    assert rows[2] == ["b/twice", "retrieval", "4", megabytes, "75.0%", "4", "1.0", "1", "0.75", ""]
    assert ["a/pairs", "set/train", "CC0"] in rows


def test_repeated_pairs_and_what_benchmarks_share_with_training_are_found(small):
    benchmarks = {"x/text-text": BenchmarkSpec("retrieval", "set/test"), "gone/text-text": BenchmarkSpec("retrieval", "none")}
    page = inspected(small, {"a/pairs": TaskSpec("set/train")}, benchmarks)
    rows = tables(page)["duplicates"]
    assert ["set/train", "1", "4"] in rows
    assert ["set/train", "c", "b", " blue "] in rows
    assert ["set/test", "query", "1 of 3", "33.3%", "set/train", "x/text-text"] in rows
    assert ["set/test", "target", "1 of 3", "33.3%", "set/train", "x/text-text"] in rows
    assert ["set/test", "x", "set/train", "b", "blue"] in rows
    assert ["set/test", "y", "set/train", "a", "rot"] in rows
    assert "2 more the split is not there" in page
    assert ["missing, for benchmarks", "none"] in tables(page)["tasks"]


def test_texts_of_labels_are_no_duplicates(tmp_path):
    write(tmp_path / "train", *(pair(f"a{n}", f"asked {n}", "card arrival", label="card_arrival") for n in range(3)))
    write(tmp_path / "test", *(pair(f"b{n}", f"asked {n + 2}", "card arrival", label="card_arrival") for n in range(3)))
    write(tmp_path / "words", pair("w", "card arrival", "asked 9"))  # what a judged label says is trained on as well
    tasks = {"t": TaskSpec("train", kind="classification")}
    judged = {"x/text-text": BenchmarkSpec("classification", "test", train="train")}
    page = inspected(tmp_path, {**tasks, "w": TaskSpec("words")}, judged)
    shared = [row for row in tables(page)["duplicates"] if row[0] == "test" and len(row) == 6]
    assert shared == [["test", "query", "1 of 3", "33.3%", "train", "x/text-text"]]
    assert tables(page)["tasks"][1][-1] == "1"  # class
    page = inspected(tmp_path, tasks, {"x/text-text": BenchmarkSpec("retrieval", "test")})
    assert [row[1] for row in tables(page)["duplicates"] if row[0] == "test" and len(row) == 6] == ["query"]


def test_contents_equal_a_loop_over_the_examples(world, tmp_path):
    names = ("text-image", "text-audio", "text-text")
    splits = {name: Split(world / "world" / name / "train") for name in names}
    surveys = {name: survey(split, 1000) for name, split in splits.items()}
    contents = Contents({(name, column): surveys[name].contents(column) for name in names for column in ("query", "target")})
    first: dict[int, tuple[str, int]] = {}
    for name, split in splits.items():
        for column in ("query", "target"):
            for position in range(len(split)):
                first.setdefault(getattr(split.read(position), column).content_id, (name, position))
    asked = np.array([*first, 1, 2, 3])
    assert contents.holds(asked).tolist() == [True] * len(first) + [False] * 3
    assert {content: contents.place(content) for content in first} == first
    assert not Contents({}).holds(asked).any()


def test_repeats_equal_a_loop(tmp_path):
    random = np.random.default_rng(0)
    examples = [pair(f"e{n}", f"q{random.integers(5)}", f"t{random.integers(4)}") for n in range(60)]
    examples[5] = pair("e5", "to be damaged", "t1")
    examples[7:9] = [Example(f"no-target-{n}", text_item("q1")) for n in range(2)]
    split = write(tmp_path / "train", *examples)
    damage(split, b"to be damaged")
    seen, expected = {}, []
    for position, example in enumerate(examples):
        if example.query is not None and example.target is not None:
            place = (example.query.content_id, example.target.content_id)
            expected += [(position, seen[place])] if place in seen else []
            seen.setdefault(place, position)
    assert len(expected) > 30
    found = survey(split, 1000)
    assert found.causes == {"damaged bytes": 1}
    assert found.modalities["target"] == {"text": 57, "nothing": 2}
    assert repeats(found) == expected


def test_lengths_are_those_of_the_index(tmp_path):
    sounds = [media_item("audio", sound_bytes(seconds=seconds), "wav") for seconds in (0.5, 1.0)]
    examples = [Example(f"e{n}", text_item("x" * n), sounds[n % 2]) for n in range(1, 102)]
    found = spreads(write(tmp_path / "train", *examples))
    assert found == {("query", "text"): (51, 96, 101), ("target", "audio"): (1.0, 1.0, 1.0)}
    page = inspected(tmp_path, {"t": TaskSpec("train")})
    assert ["t", "target", "audio", "seconds of sound", "1.00", "1.00", "1.00"] in tables(page)["lengths"]
    assert ["t", "query", "text", "bytes of text", "51", "96", "101"] in tables(page)["lengths"]
    assert EXTENT.names == ("text", "pictures", "audio", "video")


def test_padding_is_what_batches_fill_with_nothing(tmp_path):
    short, long = ("x" * 30, "y" * 30), ("x" * 600, "y" * 600)  # 10 and 200 tokens
    split = write(tmp_path / "train", *(pair(f"e{n}", *(short, long)[n % 2]) for n in range(8)))
    # One batch, 4 short and 4 long: 8 * 200 places for 840 tokens; two passes have none too many.
    assert padding(split, 8) == (pytest.approx(1 - 840 / 1600), 0.0)
    single = write(tmp_path / "one", *(pair(f"e{n}", "x" * 30, "y" * (30 + 30 * n)) for n in range(2)))
    assert padding(single, 2) == (pytest.approx(1 - 50 / 60),) * 2  # a second pass would cost more than ten tokens
    assert padding(single, 3) is None
    picture = media_item("image", picture_bytes(), "png")
    assert padding(write(tmp_path / "mute", *(Example(f"e{n}", picture, picture) for n in range(4))), 2) is None


def test_even_positions_begin_at_the_first_and_are_evenly_apart():
    assert evenly(10, 3).tolist() == [0, 3, 6]
    assert evenly(3, 10).tolist() == [0, 1, 2]
    assert evenly(5, 0).tolist() == []
    assert evenly(10**11, 10**6)[-1] == 10**11 - 10**5


def test_only_so_many_examples_are_read_and_that_is_said(small):
    page = inspected(small, {"a": TaskSpec("set/train")}, max_examples=2)
    assert "2 in" in page
    assert tables(page)["tasks"][1][2] == "4"
    assert not any("red" in row for row in tables(page)["duplicates"])  # a and c were read
    labelled = [pair(f"e{n}", f"q{n}", "x", label=f"l{n}") for n in range(6)]
    write(small / "labelled", *labelled)
    page = inspected(small, {"a": TaskSpec("labelled", kind="classification")}, max_examples=3)
    assert tables(page)["tasks"][1][-1] == "≥ 3"


def test_bad_examples_are_shown_listed_or_not(small, capsys):
    folder = small / "set" / "train"
    split = Split(folder)
    listed = [(n, split.shard(n), split.key(n), "too slow", f"took {n} hours") for n in (1, 3)]
    write_quarantine(folder, split.manifest, listed)
    assert read_quarantine(
        split.folder, split.manifest, np.array([key.encode() for key in Split(folder, quarantine=False).keys])
    ) == [1, 3]
    assert [entry["cause"] for entry in quarantined(split.folder, split.manifest)] == ["too slow"] * 2
    damage(split, b"rot")
    page = inspected(small, {"a": TaskSpec("set/train")})
    rows = tables(page)["bad"]
    assert ["set/train", "left out", "2", "too slow"] in rows
    assert ["set/train", "not listed", "1", "damaged bytes"] in rows
    assert ["set/train", split.shard(3), "d", "too slow", "took 3 hours"] in rows
    assert any(row[2:4] == ["a", "damaged bytes"] for row in rows)
    assert tables(page)["tasks"][1][2] == "2"  # what is left out is no example
    assert "damaged" in page.split('<section id="samples">')[1].split("</section>")[0]
    assert "took 3 hours" in capsys.readouterr().out


def test_missing_and_refused_splits_are_named_and_the_others_shown(small, capsys):
    (small / "changed").mkdir()
    for file in (small / "set" / "train").iterdir():
        (small / "changed" / file.name).write_bytes(file.read_bytes())
    with (small / "changed" / "examples.npy").open("r+b") as table:
        table.seek(-1, os.SEEK_END)
        table.write(b"\xff")
    tasks = {"a": TaskSpec("set/train"), "b": TaskSpec("set/nowhere"), "c": TaskSpec("changed"), "d": TaskSpec("e", rate=0)}
    page = inspected(small, tasks)
    rows = tables(page)["tasks"]
    assert [row[:3] for row in rows[1:4]] == [
        ["a", "retrieval", "4"],
        ["b", "retrieval", "missing"],
        ["c", "retrieval", "refused"],
    ]
    assert any("was changed after it was written" in row[0] and row[1] == "changed" for row in rows)
    assert "1 of 3" in page
    assert re.search(r"left out with rate 0</dt><dd>d</dd>", page)
    shown = capsys.readouterr().out
    assert "set/nowhere" in shown
    assert "missing" in shown


def test_no_split_at_all_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 2 tasks has its shards in .* \(the first, x: missing\); give another"):
        inspect(str(tmp_path), Mixture({"a": TaskSpec("x"), "b": TaskSpec("y")}), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no task of a rate above 0"):
        inspect(str(tmp_path), Mixture({"a": TaskSpec("x", rate=0)}), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="max_examples is 0"):
        inspect(str(tmp_path), Mixture({"a": TaskSpec("x")}), str(tmp_path / "out"), max_examples=0)
    assert not (tmp_path / "out").exists()


def hostile(folder: Path) -> dict[str, TaskSpec]:
    """A task whose every text is hostile: to a page, to rich's markup, to a terminal."""
    terminal = "\x1b]0;owned\x07\x1b[2J[bold red]not bold[/]"
    text = f"{HOSTILE} {terminal}"
    examples = [
        Example(f"k<b>{n}", text_item(text), text_item(text), (Item((Part("code", text),), title=text),), label=text)
        for n in range(4)
    ]
    split = write(folder / "train", *examples, about={"licence": text})
    write_quarantine(folder / "train", split.manifest, [(3, text, split.key(3), text, text)])
    return {"a/<i>task": TaskSpec("train", kind="classification", query_prompt="<u>{text}", batch_size=2)}


def test_hostile_text_is_shown_and_nothing_of_it_runs(tmp_path, capsys):
    page = inspected(tmp_path, hostile(tmp_path), {"<b>/text-text": BenchmarkSpec("retrieval", "train")})
    parsed = Page(page)
    assert not {"script", "i", "u", "img"} & parsed.tags
    assert not any(name.startswith("on") for name in parsed.attributes)
    assert parsed.text.count(HOSTILE) > 12  # samples, labels, licence, quarantine, duplicates
    assert all(address.startswith("data:") for _, address in parsed.addresses)
    assert "default-src 'none'" in page
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[bold red]not" in shown.replace("\n", "")


@needs_chromium
def test_the_page_asks_nothing_of_the_network_and_says_nothing_in_the_console(tmp_path):
    inspected(tmp_path, hostile(tmp_path))
    dom, log = open_in_chromium((tmp_path / "out" / "inspect.html").as_uri(), tmp_path / "browser")
    assert "CONSOLE" not in log
    assert "it ran</title>" not in dom
    assert requested(tmp_path / "browser") == []


def test_samples_carry_prompts_pictures_negatives_and_labels(tmp_path):
    picture = picture_bytes(seed=1)
    mixed = Item((Part("text", "look:"), Part("image", picture, "png")), title="A picture")
    examples = [
        Example(f"e{n}", text_item(f"asked {n}", title="T"), mixed, (text_item("wrong"), mixed), label="kind_of")
        for n in range(9)
    ]
    long = "x" * 5000
    examples[6] = dataclasses.replace(examples[6], query=text_item(long))
    write(tmp_path / "train", *examples)
    task = TaskSpec("train", query_prompt="q: {text}", target_prompt="title: {title} | text: {text}")
    page = inspected(tmp_path, {"t": task}, num_samples=3)
    samples = page.split('<section id="samples">')[1].split("</section>")[0]
    text = Page(samples).text
    assert [number for number in range(9) if f"q: asked {number}" in text] == [0, 3]  # 0, 3 and 6, which is cut
    assert "… (5,003 characters)" in text
    assert long not in samples
    assert "title: none | text: wrong" in text
    assert "hard negative, 1 of 2" in text
    assert "label: kind_of" in text
    assert "A picture" in text
    assert "title: A picture" not in text  # what holds media carries no prompt
    sources = [address for tag, address in Page(samples).addresses if tag == "img"]
    assert [base64.b64decode(source.partition(",")[2]) for source in sources] == [picture] * 3


def test_a_shared_picture_is_shown(tmp_path):
    picture = media_item("image", picture_bytes(), "png")
    write(tmp_path / "train", Example("a", text_item("one"), picture), Example("b", text_item("two"), picture))
    write(tmp_path / "test", Example("c", text_item("three"), picture))
    judged = {
        "s/text-image": BenchmarkSpec("retrieval", "test"),
        "s/image-text": BenchmarkSpec("retrieval", "test", reverse=True),
    }
    page = inspected(tmp_path, {"t": TaskSpec("train")}, judged, num_samples=0)
    rows = [row for row in tables(page)["duplicates"] if row[0] == "test"]
    assert rows[0] == ["test", "target", "1 of 1", "100.0%", "train", "s/text-image, s/image-text"]
    assert rows[1][:4] == ["test", "c", "train", "a"]
    assert page.split('id="duplicates"')[1].count("<img ") == 1


def test_the_world_is_shown_through_train_py(world, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "train.py", "conf=quickstart/inspect", f"root={world}", f"out={out}", "num_samples=2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    page = (out / "inspect.html").read_text()
    rows = {row[0]: row for row in tables(page)["tasks"] if len(row) == 10}
    split = Split(world / "world" / "text-page" / "train")
    negatives = sum(len(split.read(n).negatives) for n in range(96)) / 96
    assert rows["world/text-page"][2] == "96"
    assert rows["world/text-page"][4:] == ["14.3%", "64", "1.5", "10", f"{negatives:.2f}", ""]  # one in seven; 1.5 * 7 = 10.5
    assert "Apache-2.0" in done.stdout
    assert "world/text-video" in done.stdout
    assert "Of 14 columns that benchmarks judge, 0 hold what is trained on." in page
    samples = page.split('<section id="samples">')[1].split("</section>")[0]
    assert samples.count('class="query sample"') == 7 * 2
    assert {"img", "audio", "video", "pre"} <= Page(samples).tags
    for tag, address in Page(samples).addresses:
        if tag == "img":
            Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).verify()


def test_the_packs_configuration_takes_its_tasks_and_benchmarks(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = train.run(["conf=inspect", f"root={tmp_path}", f"out={tmp_path / 'out'}"])
    assert "none of the 25 tasks has its shards" in str(shown)
