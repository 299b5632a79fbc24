"""The data pack becomes shards: whole, once, with clear errors; and what conf/ names is what the pack gives."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from datamodules.recipes.pack import prepare, splits_of
from datamodules.recipes.published import DATASETS
from datamodules.sample import Example, Item, Part, media_item, text_item
from datamodules.shards import Split
from datamodules.tasks import BenchmarkSpec, TaskSpec, modalities_of

ROOT = Path(__file__).parents[1]
PACK = ROOT.parent / "shared" / "data"
needs_pack = pytest.mark.skipif(not (PACK / "tasks.json").is_file(), reason=f"the data pack is not at {PACK}")

PICTURE = media_item("image", b"picture", "jpg")
SETS = {
    "text/news": (
        "pair + classification",
        "text->text",
        {"train": [{"id": "a.1", "query": {"text": "Title"}, "target": {"text": "Body"}, "label": "Sci_Tech", "label_id": 3}]},
    ),
    "text/search": (
        "retrieval",
        "text->text",
        {
            "en.corpus": [
                {"id": "d.1", "target": {"title": "One", "text": "first"}},
                {"id": "d 2", "target": {"title": "", "text": "second"}, "split": "train"},
            ],
            "en.queries.train": [{"id": "q/1", "query": {"text": "which"}}],
            "en.queries.test": [{"id": "q/2", "query": {"text": "what"}, "answers": ["x"]}],
        },
    ),
    "text/intent": ("classification", "text->label", {"test": [{"id": "1", "input": {"text": "hi"}, "label": "say_hello"}]}),
    "text/similar": (
        "sts",
        "text-text",
        {
            "en.train": [
                {"id": "s0", "a": {"text": "x"}, "b": {"text": "y"}, "score": 4.0},
                {"id": "s1", "a": {"text": "x"}, "b": {"text": "z"}, "score": 3.9},
            ]
        },
    ),
    "code/translate": (
        "pair",
        "code->code",
        {"test": [{"id": "c", "query": {"text": "int a;"}, "target": {"text": "var a;"}}]},
    ),
    "code/describe": ("pair", "text->code", {"test": [{"id": "c", "query": {"text": "list"}, "target": {"text": "ls"}}]}),
    "image/captions": (
        "image-caption; speech->image",
        "image<->text",
        {
            "test": [
                {
                    "id": "i",
                    "image": {"image": "media/p.jpg"},
                    "captions": ["a dog", "a hound"],
                    "captions_multilingual": {"en": "a dog", "de": "ein Hund"},
                },
                {"id": "j", "image": {"image": "media/p.jpg"}, "captions": ["a cat"]},
            ],
            "speech.test": [
                {"id": "i", "query": {"audio": "speech/s.ogg"}, "target": {"image": "media/p.jpg"}, "transcript": "a dog"}
            ],
        },
    ),
    "interleaved/steps": (
        "pair",
        "text->mixed",
        {
            "test": [
                {
                    "id": "m",
                    "query": {"text": "push"},
                    "target": {"parts": [{"image": "media/p.jpg"}, {"text": "Push-up"}, {"image": "media/q.jpg"}]},
                }
            ]
        },
    ),
    "document/pages": (
        "pair",
        "text->page",
        {"test": [{"id": "p", "query": {"text": "sum"}, "target": {"image": "media/p.webp"}}]},
    ),
    "video/clips": (
        "pair + classification",
        "text->video",
        {"test": [{"id": "v", "query": {"text": "he walks"}, "target": {"video": "media/v.mp4"}, "label": "walk_left"}]},
    ),
}
QRELS = {"en.qrels.train": "q/1\td.1\t1\nq/1\td 2\t2\n", "en.qrels.test": "q/2\td 2\t1\n"}
MEDIA = {
    "image/captions": {"media/p.jpg": b"picture", "speech/s.ogg": b"speech"},
    "interleaved/steps": {"media/p.jpg": b"picture", "media/q.jpg": b"second picture"},
    "document/pages": {"media/p.webp": b"page"},
    "video/clips": {"media/v.mp4": b"clip"},
}

# What each split must hold, written by hand from the records above.
NEWS_META = {"label_id": 3}
CLIP = media_item("video", b"clip", "mp4")
FIRST, SECOND = text_item("first", title="One"), text_item("second")
EXPECTED = {
    "text/news/train": [Example("a_1", text_item("Title"), text_item("Body"), label="Sci_Tech", meta=NEWS_META)],
    "text/news/train_classes": [
        Example("a_1", text_item("Title Body"), text_item("Sci Tech"), label="Sci_Tech", meta=NEWS_META)
    ],
    "text/search/en-corpus": [Example("d_1", None, FIRST), Example("d_2", None, SECOND, meta={"split": "train"})],
    "text/search/en-queries-train": [Example("q_1", text_item("which"), relevant={"d_1": 1.0, "d_2": 2.0})],
    "text/search/en-queries-test": [Example("q_2", text_item("what"), relevant={"d_2": 1.0}, meta={"answers": ["x"]})],
    "text/search/en-train": [Example("q_1", text_item("which"), FIRST), Example("q_1-2", text_item("which"), SECOND)],
    "text/intent/test": [Example("1", text_item("hi"), text_item("say hello"), label="say_hello")],
    "text/similar/en-train": [
        Example("s0", text_item("x"), text_item("y"), score=4.0),
        Example("s1", text_item("x"), text_item("z"), score=3.9),
    ],
    "text/similar/en-train_pairs": [Example("s0", text_item("x"), text_item("y"), score=4.0)],
    "code/translate/test": [Example("c", text_item("int a;", kind="code"), text_item("var a;", kind="code"))],
    "code/describe/test": [Example("c", text_item("list"), text_item("ls", kind="code"))],
    "image/captions/test": [
        Example("i-0", text_item("a dog"), PICTURE),
        Example("i-1", text_item("a hound"), PICTURE),
        Example("j-0", text_item("a cat"), PICTURE),
    ],
    "image/captions/de-test": [Example("i", text_item("ein Hund"), PICTURE)],
    "image/captions/speech-test": [Example("i", media_item("audio", b"speech", "ogg"), PICTURE, meta={"transcript": "a dog"})],
    "interleaved/steps/test": [
        Example(
            "m",
            text_item("push"),
            Item((Part("image", b"picture", "jpg"), Part("text", "Push-up"), Part("image", b"second picture", "jpg"))),
        )
    ],
    "document/pages/test": [Example("p", text_item("sum"), media_item("page", b"page", "webp"))],
    "video/clips/test": [Example("v", text_item("he walks"), CLIP, label="walk_left")],
    "video/clips/test_classes": [Example("v", CLIP, text_item("walk left"), label="walk_left")],
}


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    root = tmp_path / "pack"
    for name, (_, _, files) in SETS.items():
        for stem, records in files.items():
            write_records(root / name / f"{stem}.jsonl", records)
        for path, data in MEDIA.get(name, {}).items():
            (root / name / path).parent.mkdir(exist_ok=True)
            (root / name / path).write_bytes(data)
    for stem, lines in QRELS.items():
        (root / "text/search" / f"{stem}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    tasks = [
        {
            "name": name,
            "type": kind,
            "modality": modality,
            "files": {s: len(r) for s, r in files.items()},
            "licence": f"L {name}",
        }
        for name, (kind, modality, files) in SETS.items()
    ]
    (root / "tasks.json").write_text(json.dumps(tasks))
    (root / "SOURCES.md").write_text("".join(f"## {name}\n- from: repo of {name}\n" for name in SETS))
    return root


def write_records(file: Path, records: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_all(out: Path) -> dict[str, list[Example]]:
    found = {}
    for manifest in sorted(out.glob("*/*/*/manifest.json")):
        split = Split(manifest.parent)
        found[str(manifest.parent.relative_to(out))] = [split.read(position) for position in range(len(split))]
    return found


def times_of(out: Path) -> dict[str, int]:
    return {str(path.parent.relative_to(out)): path.stat().st_ctime_ns for path in out.glob("*/*/*/manifest.json")}


def test_every_record_arrives_with_its_content(pack: Path, tmp_path: Path) -> None:
    prepare(str(pack), str(tmp_path / "out"))
    assert read_all(tmp_path / "out") == EXPECTED


def test_the_listing_names_what_prepare_writes(pack: Path) -> None:
    assert {f"{split.set}/{split.split}" for split in splits_of(pack)} == set(EXPECTED)


def test_a_manifest_carries_licence_and_source(pack: Path, tmp_path: Path) -> None:
    prepare(str(pack), str(tmp_path / "out"), sets=["text/intent"])
    about = Split(tmp_path / "out/text/intent/test").manifest["about"]
    assert about["licence"] == "L text/intent"
    assert about["source"] == "repo of text/intent"


def test_a_second_run_rewrites_nothing(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prepare(str(pack), str(out))
    before = times_of(out)
    capsys.readouterr()
    prepare(str(pack), str(out))
    assert times_of(out) == before
    assert f"{len(EXPECTED)} of {len(EXPECTED)} splits" in capsys.readouterr().out


def test_a_changed_file_rewrites_the_splits_that_read_it_and_no_other(pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(pack), str(out))
    before = times_of(out)
    qrels = pack / "text/search/en.qrels.train.tsv"
    qrels.write_text(qrels.read_text().replace("d 2\t2", "d 2\t3"))
    prepare(str(pack), str(out))
    after = times_of(out)
    assert {name for name in before if after[name] != before[name]} == {"text/search/en-queries-train", "text/search/en-train"}
    assert read_all(out)["text/search/en-queries-train"][0].relevant == {"d_1": 1.0, "d_2": 3.0}


def test_a_damaged_split_is_written_anew(pack: Path, tmp_path: Path) -> None:
    prepare(str(pack), str(tmp_path / "out"), sets=["text/intent"])
    (tmp_path / "out/text/intent/test/000000.tar").write_bytes(b"")
    prepare(str(pack), str(tmp_path / "out"), sets=["text/intent"])
    assert read_all(tmp_path / "out") == {"text/intent/test": EXPECTED["text/intent/test"]}


def test_only_the_named_sets_are_written(pack: Path, tmp_path: Path) -> None:
    (pack / "document/pages/test.jsonl").unlink()
    prepare(str(pack), str(tmp_path / "out"), sets=["text/intent", "text/similar"])
    assert set(read_all(tmp_path / "out")) == {"text/intent/test", "text/similar/en-train", "text/similar/en-train_pairs"}


def test_judgements_name_keys_of_the_corpus(pack: Path, tmp_path: Path) -> None:
    prepare(str(pack), str(tmp_path / "out"), sets=["text/search"])
    corpus = Split(tmp_path / "out/text/search/en-corpus")
    for split in ("en-queries-train", "en-queries-test"):
        queries = Split(tmp_path / "out/text/search" / split)
        for position in range(len(queries)):
            assert set(queries.read(position).relevant or ()) <= set(corpus.keys)


def test_repeated_ids_are_numbered_and_judgements_mean_the_first(pack: Path, tmp_path: Path) -> None:
    documents = [("d.1", "one"), ("d_1", "two"), ("d 2", "three"), ("d.1", "four")]
    write_records(pack / "text/search/en.corpus.jsonl", [{"id": i, "target": {"text": t}} for i, t in documents])
    prepare(str(pack), str(tmp_path / "out"), sets=["text/search"])
    splits = read_all(tmp_path / "out")
    texts = {e.key: e.target.parts[0].data for e in splits["text/search/en-corpus"] if e.target}
    assert texts == {"d_1": "one", "d_1-2": "two", "d_2": "three", "d_1-3": "four"}
    assert [e.target.parts[0].data for e in splits["text/search/en-train"] if e.target] == ["one", "three"]


def test_a_document_graded_zero_is_no_pair(pack: Path, tmp_path: Path) -> None:
    (pack / "text/search/en.qrels.train.tsv").write_text("query-id\tcorpus-id\tscore\nq/1\td.1\t0\nq/1\td 2\t1\n")
    prepare(str(pack), str(tmp_path / "out"), sets=["text/search"])
    splits = read_all(tmp_path / "out")
    assert splits["text/search/en-train"] == [Example("q_1", text_item("which"), SECOND)]
    assert splits["text/search/en-queries-train"][0].relevant == {"d_1": 0.0, "d_2": 1.0}


def test_two_files_that_would_give_one_split_are_refused(pack: Path) -> None:
    write_records(pack / "text/search/en.train.jsonl", [{"id": "t", "query": {"text": "q"}, "target": {"text": "d"}}])
    tasks = json.loads((pack / "tasks.json").read_text())
    tasks[1]["files"]["en.train"] = 1
    (pack / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(ValueError, match="two files of text/search would give the split 'en-train'"):
        splits_of(pack)


def drop_media(pack: Path) -> None:
    (pack / "interleaved/steps/media/q.jpg").unlink()


def name_media_outside(pack: Path) -> None:
    record = {"id": "p", "query": {"text": "sum"}, "target": {"image": "../../tasks.json"}}
    write_records(pack / "document/pages/test.jsonl", [record])


def drop_label(pack: Path) -> None:
    records = [{"id": str(n), "input": {"text": "hi"}, "label": "say_hello"} for n in range(3)]
    del records[2]["label"]
    write_records(pack / "text/intent/test.jsonl", records)


def give_no_content(pack: Path) -> None:
    write_records(pack / "code/describe/test.jsonl", [{"id": "c", "query": {"words": "list"}, "target": {"text": "ls"}}])


def break_line(pack: Path) -> None:
    (pack / "text/intent/test.jsonl").write_text('{"id": "1",\n')


def empty_file(pack: Path) -> None:
    (pack / "text/intent/test.jsonl").write_text("")


def drop_positives(pack: Path) -> None:
    write_records(pack / "text/similar/en.train.jsonl", [{"id": "s", "a": {"text": "x"}, "b": {"text": "y"}, "score": 1.0}])


def judge_a_stranger(pack: Path) -> None:
    (pack / "text/search/en.qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\nq/2\td9\t1\n")


def judge_no_query(pack: Path) -> None:
    (pack / "text/search/en.qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\n")


@pytest.mark.parametrize(
    ("damage", "split", "message"),
    [
        (drop_media, "interleaved/steps/test", r"record 'm' names 'media/q\.jpg', but .* is no file; .*: put it there"),
        (name_media_outside, "document/pages/test", r"record 'p' names '\.\./\.\./tasks\.json'"),
        (drop_label, "text/intent/test", r"line 3: record '2' lacks label; a record here has id, input, label: complete it"),
        (give_no_content, "code/describe/test", r"record 'c' holds .*'words'.*exactly one of text, image, audio, video"),
        (break_line, "text/intent/test", r"line 1 is not JSON"),
        (
            empty_file,
            "text/intent/test",
            r"gives no example for the split 'test'; a split needs at least one: complete the file",
        ),
        (drop_positives, "text/similar/en-train_pairs", r"gives no example for the split 'en-train_pairs'"),
        (judge_a_stranger, "text/search/en-queries-test", r"query 'q/2' is judged against 'd9', which en\.corpus\.jsonl"),
        (judge_no_query, "text/search/en-queries-test", r"query 'q/2' has no line in en\.qrels\.test\.tsv"),
    ],
)
def test_a_bad_record_is_named_and_leaves_no_half_written_split(
    pack: Path, tmp_path: Path, damage: Callable[[Path], None], split: str, message: str
) -> None:
    damage(pack)
    with pytest.raises(ValueError, match=message):
        prepare(str(pack), str(tmp_path / "out"), sets=["/".join(split.split("/")[:2])])
    assert not (tmp_path / "out" / split).exists()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_an_unknown_set_is_refused_with_the_known_ones(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"sets is \['text/newz'\]; this pack has text/news, text/search, .*: name some of them"
    ):
        prepare(str(pack), str(tmp_path / "out"), sets=["text/newz"])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_pack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no data pack: it has no tasks\.json; give the folder that holds that file"):
        prepare(str(tmp_path), str(tmp_path / "out"))


def test_a_listed_file_that_is_missing_is_named(pack: Path, tmp_path: Path) -> None:
    (pack / "text/search/en.qrels.test.tsv").unlink()
    with pytest.raises(ValueError, match=r"en\.qrels\.test\.tsv is missing and en\.queries\.test\.jsonl needs it"):
        prepare(str(pack), str(tmp_path / "out"))


@needs_pack
@pytest.mark.parametrize("name", ["document/jose_pages", "text/tweet_emotion", "video/noto_emoji_anim"])
def test_a_set_of_the_real_pack_arrives_whole(tmp_path: Path, name: str) -> None:
    prepare(str(PACK), str(tmp_path), sets=[name])
    task = next(task for task in json.loads((PACK / "tasks.json").read_text()) if task["name"] == name)
    for stem, num_records in task["files"].items():
        split = Split(tmp_path / name / stem.replace(".", "-"))
        assert len(split) == num_records
        assert split.read(len(split) - 1).key


def configs(folder: str) -> list[Path]:
    found = sorted((ROOT / "conf" / folder).glob("*.yaml"))
    assert found, f"conf/{folder} holds no YAML file"
    return found


def tasks_in(file: Path) -> dict[str, dict]:
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    return content["data"]["tasks"]


def benchmarks_in(file: Path) -> dict[str, dict]:
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    assert content.keys() <= {"benchmarks", "suites"}  # suites are mteb's, see tests/test_suites.py
    return content.get("benchmarks", {})


@needs_pack
def test_every_split_that_conf_names_is_one_that_prepare_writes() -> None:
    written = {f"{split.set}/{split.split}" for split in splits_of(PACK)}
    specs = [spec for file in configs("tasks") for spec in tasks_in(file).values()]
    own = [file for file in configs("benchmarks") if file.stem not in DATASETS]  # tests/test_published.py has the others
    specs += [spec for file in own for spec in benchmarks_in(file).values()]
    named = {spec[field] for spec in specs for field in ("shards", "corpus", "train") if spec.get(field)}
    named = {re.sub("_(given|asr)$", "", name) for name in named}  # as conf=transcribe writes them again
    assert {name for name in named if not name.startswith("world/")} <= written


@needs_pack
def test_every_set_of_the_pack_is_judged() -> None:
    specs = benchmarks_in(ROOT / "conf/benchmarks/pack.yaml").values()
    named = {spec[field] for spec in specs for field in ("shards", "corpus", "train") if spec.get(field)}
    tests = {f"{split.set}/{split.split}" for split in splits_of(PACK) if split.split.split("_")[0].endswith("test")}
    assert tests - named == set()


def test_every_benchmark_of_several_languages_has_its_group_and_language() -> None:
    benchmarks = benchmarks_in(ROOT / "conf/benchmarks/pack.yaml")
    groups = {name: (spec["group"], spec["language"]) for name, spec in benchmarks.items() if "group" in spec}
    assert groups["xquad_de/text-text"] == ("xquad", "de")
    assert groups["xquad_de_en/text-text"] == ("xquad_en", "de")
    assert groups["tatoeba_jpn/text-text"] == ("tatoeba", "jpn")
    assert len(set(groups.values())) == len(groups)
    sets = ("text/xquad", "text/multi30k", "text/tatoeba", "text/stsb")
    assert {name for name, spec in benchmarks.items() if spec["shards"].startswith(sets)} <= groups.keys()


@pytest.mark.parametrize("file", configs("tasks"), ids=lambda file: file.stem)
def test_a_task_file_gives_valid_tasks(file: Path) -> None:
    for spec in tasks_in(file).values():
        assert TaskSpec(**spec).rate > 0


@pytest.mark.parametrize("file", configs("benchmarks"), ids=lambda file: file.stem)
def test_a_benchmark_file_gives_valid_benchmarks(file: Path) -> None:
    for name, spec in benchmarks_in(file).items():
        modalities_of(name)
        BenchmarkSpec(**spec)


@needs_pack
def test_a_benchmark_is_named_after_the_modalities_of_its_examples(tmp_path: Path) -> None:
    prepare(str(PACK), str(tmp_path), sets=["document/jose_pages", "interleaved/exercises", "video/sprites", "code/java_cs"])
    for name, spec in benchmarks_in(ROOT / "conf/benchmarks/pack.yaml").items():
        if not (tmp_path / spec["shards"]).exists():
            continue
        query = Split(tmp_path / spec["shards"]).read(0).query
        target = Split(tmp_path / spec.get("corpus", spec["shards"])).read(0).target
        assert query is not None
        assert target is not None
        found = (query.modality, target.modality)
        assert modalities_of(name) == (found[::-1] if spec.get("reverse") else found), name


@pytest.mark.parametrize("file", configs("mixture"), ids=lambda file: file.stem)
def test_a_mixture_rates_every_task_that_it_includes_and_no_other(file: Path) -> None:
    included = [name for include in OmegaConf.load(file).include for name in tasks_in(ROOT / "conf" / f"{include}.yaml")]
    assert set(tasks_in(file)) == set(included)


def test_the_multimodal_mixture_covers_every_modality() -> None:
    rated = {name for name, change in tasks_in(ROOT / "conf/mixture/multimodal.yaml").items() if change["rate"] > 0}
    specs = {name: spec for file in configs("tasks") for name, spec in tasks_in(file).items()}
    folders = {specs[name]["shards"].split("/")[0] for name in rated}
    assert folders == {"text", "code", "image", "document", "audio", "video", "interleaved"}
