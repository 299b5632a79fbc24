"""Promises of published data sets: their files arrive whole, in the splits that conf/ names, or are refused by record."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published import SAMPLES, write, write_lines

from datamodules.decode import decode_example
from datamodules.media.limits import DecodeLimits
from datamodules.recipes import layouts
from datamodules.recipes.layouts import read_entries
from datamodules.recipes.published import DATASETS, prepare
from datamodules.sample import Example
from datamodules.shards import Split
from datamodules.tasks import BenchmarkSpec, modalities_of
from lightning_modules.configuration import compose
from lightning_modules.judge import Judge

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sample of every data set, which tests copy before they change it."""
    root = tmp_path_factory.mktemp("sources")
    for name, make in SAMPLES.items():
        (root / name).mkdir()
        make(root / name)
    return root


@pytest.fixture(scope="module")
def shards(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of every sample."""
    root = tmp_path_factory.mktemp("shards")
    for name in SAMPLES:
        prepare(name, str(sources / name), str(root))
    return root


@pytest.fixture
def copied(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Gives a copy of a sample."""
    return lambda name: Path(shutil.copytree(sources / name, tmp_path / name))


def benchmarks_of(name: str) -> dict[str, BenchmarkSpec]:
    config = compose(ROOT / "conf" / "benchmarks" / f"{name}.yaml", [])
    return {benchmark: BenchmarkSpec(**spec) for benchmark, spec in config["benchmarks"].items()}


def read(folder: Path) -> list[Example]:
    split = Split(folder)
    return [split.read(position) for position in range(len(split))]


def text_of(example: Example, column: str) -> str:
    item = getattr(example, column)
    assert [part.kind for part in item.parts] == ["text"]
    return item.parts[0].data


def test_every_data_set_has_a_sample_and_a_benchmark_file() -> None:
    assert set(SAMPLES) == set(DATASETS)
    for name in DATASETS:
        assert benchmarks_of(name)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_gives_exactly_the_splits_that_its_benchmarks_name(shards: Path, name: str) -> None:
    named = {folder for spec in benchmarks_of(name).values() for folder in (spec.shards, spec.corpus) if folder}
    assert {str(file.parent.relative_to(shards)) for file in (shards / name).rglob("manifest.json")} == named


@pytest.mark.parametrize("name", SAMPLES)
def test_every_query_has_the_modality_of_its_benchmark_and_finds_what_the_corpus_holds(shards: Path, name: str) -> None:
    for benchmark, spec in benchmarks_of(name).items():
        queries, targets = read(shards / spec.shards), read(shards / (spec.corpus or spec.shards))
        stated = modalities_of(benchmark)
        for example in queries:
            assert example.query is not None
            assert example.query.modality == stated[0]
            decode_example(example, DecodeLimits())
            if spec.metric == "answers@5kt":
                assert example.meta is not None
                assert example.meta["answers"] == ["Tokyo"]
            elif spec.corpus is not None:
                assert example.relevant
                assert example.relevant.keys() <= {target.key for target in targets}
        for example in targets:
            assert example.target is not None
            assert example.target.modality == stated[1]


def test_a_benchmark_file_says_where_the_data_comes_from_and_how_to_make_the_shards() -> None:
    for name in DATASETS:
        comment = [line for line in (ROOT / "conf/benchmarks" / f"{name}.yaml").read_text().splitlines() if line[0] == "#"]
        commands = [line for line in comment if f"conf=prepare_published dataset={name} source=/data/" in line]
        assert len(commands) == 1
        words = commands[0].removeprefix("#   python train.py conf=prepare_published ").split()
        assert compose(ROOT / "conf/prepare_published.yaml", words)["dataset"] == name
        assert name == "specialised" or any("https://" in line or "http://" in line for line in comment)


def test_images_and_captions_find_one_another(shards: Path) -> None:
    texts, images = read(shards / "mscoco/test-queries"), read(shards / "mscoco/test-corpus")
    assert [image.key for image in images] == ["COCO_val2014_000000000000", "COCO_val2014_000000000002"]
    assert len(texts) == 10  # the sixth caption of the first image does not count
    assert text_of(texts[4], "query") == "caption 4 of image 0"
    assert texts[4].relevant == {"COCO_val2014_000000000000": 1.0}
    assert texts[5].relevant == {"COCO_val2014_000000000002": 1.0}
    pictures, captions = read(shards / "mscoco/test-image_queries"), read(shards / "mscoco/test-captions")
    assert [picture.query for picture in pictures] == [image.target for image in images]
    assert pictures[1].relevant == {f"COCO_val2014_000000000002-{n}": 1.0 for n in range(5)}
    assert [text_of(caption, "target") for caption in captions] == [text_of(text, "query") for text in texts]
    assert [caption.key for caption in captions] == [text.key for text in texts]


def test_the_other_image_sets_keep_their_own_split(shards: Path) -> None:
    assert [image.key for image in read(shards / "flickr30k/test-corpus")] == ["0", "2"]
    assert [text_of(text, "query") for text in read(shards / "docci/test-queries")] == [
        "A long story, 0.",
        "A long story, 2.",
    ]
    assert [text.key for text in read(shards / "textcaps/val-queries")] == [f"{i}-{n}" for i in ("a0", "b1") for n in range(5)]
    pairs = read(shards / "specialised/art")
    assert [text_of(pair, "target") for pair in pairs] == ["art number 0", "art number 1"]


def test_captions_find_videos(shards: Path, copied: Callable[[str], Path], tmp_path: Path) -> None:
    assert len(read(shards / "vatex/test-queries")) == 20
    assert [clip.key for clip in read(shards / "youcook2/validation-corpus")] == ["GLd3aX16zBg_0", "GLd3aX16zBg_1"]
    (query, _) = read(shards / "msrvtt/test_1k-queries")
    assert text_of(query, "query") == "a person, connecting"
    assert query.relevant == {"video9770": 1.0}
    prepare("msrvtt", str(copied("msrvtt")), str(tmp_path / "out"), split="test")
    assert len(read(tmp_path / "out/msrvtt/test-queries")) == 6


def test_a_question_and_its_picture_find_the_section_that_answers(shards: Path) -> None:
    queries, corpus = read(shards / "encyclopedic_vqa/test-queries"), read(shards / "encyclopedic_vqa/corpus")
    sections = {target.key: (target.target.title, text_of(target, "target")) for target in corpus if target.target}
    assert sections == {
        "0-0": ("Bean goose", "A goose."),
        "0-1": ("Bean goose", "Section 1\nIt lives in bogs."),
        "1-0": ("Menger Hotel", "A hotel."),
        "1-1": ("Menger Hotel", "Section 1\nBuilt in 1859."),
    }
    assert [(query.key, query.relevant) for query in queries] == [
        ("0-0", {"0-1": 1.0}),
        ("1-0", {"1-0": 1.0, "1-1": 1.0}),
        ("1-1", {"1-0": 1.0, "1-1": 1.0}),
        ("2-0", {"0-0": 1.0, "1-1": 1.0}),
    ]
    assert all(query.query and [part.kind for part in query.query.parts] == ["image", "text"] for query in queries)


def test_questions_across_languages_find_their_passages(shards: Path) -> None:
    queries, corpus = read(shards / "xtreme_up/test-hi-queries"), read(shards / "xtreme_up/corpus")
    assert [query.relevant for query in queries] == [{"english-0-1": 1.0}, {"english-2-1": 1.0}]
    assert text_of(queries[1], "query") == "hi: which number is 2?"
    assert [(passage.key, passage.target.title) for passage in corpus if passage.target][3] == ("english-3-1", "Title 3")
    (question,) = read(shards / "xor_retrieve/dev-ja-queries")  # the one of yes or no alone is left out
    assert text_of(question, "query") == "ja capital?"
    assert question.meta == {"answers": ["Tokyo"], "language": "ja"}
    assert [text_of(passage, "target") for passage in read(shards / "xor_retrieve/corpus")] == [
        "Tokyo is the capital of Japan.",
        'He said "no" to it,\tso it was 1859.',
    ]


def test_spoken_questions_find_their_passages_and_keep_their_words(shards: Path) -> None:
    queries = read(shards / "mseb/test-fi_fi-queries")
    assert sorted((query.key, tuple(query.relevant or ())) for query in queries) == [
        ("utt_11_0", ("p-0",)),
        ("utt_11_1", ("p-1",)),
    ]
    assert {query.meta["transcript"] for query in queries if query.meta} == {"question 0", "question 1"}


@pytest.mark.parametrize("name", ["flickr30k", "msrvtt", "encyclopedic_vqa", "mseb", "specialised", "xtreme_up"])
def test_the_judge_judges_them(shards: Path, tiny_encoder: Any, processor: Any, name: str) -> None:
    benchmarks = dict(list(benchmarks_of(name).items())[:2])
    judge = Judge(tiny_encoder, processor, shards, batch_size=4, num_workers=0, device="cpu")
    rows = judge.results(benchmarks).rows
    assert {row["benchmark"] for row in rows} == set(benchmarks)
    assert all(0 <= row["value"] <= 1 for row in rows)
    metrics = {row["metric"] for row in rows}
    assert {spec.metric for spec in benchmarks.values()} <= metrics
    assert {row["metric"] for row in rows if row["low"] is not None} == {spec.metric for spec in benchmarks.values()}


def test_the_judge_judges_queries_by_their_answers(shards: Path, tiny_encoder: Any, processor: Any) -> None:
    benchmarks = dict(list(benchmarks_of("xor_retrieve").items())[:1])
    judge = Judge(tiny_encoder, processor, shards, batch_size=4, num_workers=0, device="cpu")
    rows = judge.results(benchmarks).rows
    assert [(row["metric"], row["value"]) for row in rows] == [("answers@5kt", 1.0)] * 3  # both passages are in 5,000 tokens


def test_a_second_run_rewrites_nothing_and_a_changed_file_its_splits(
    copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = copied("xor_retrieve"), tmp_path / "out"
    prepare("xor_retrieve", str(source), str(out))
    assert "dev-ja-queries: left out 1 x question of yes or no" in capsys.readouterr().out
    before = {file: file.stat().st_ctime_ns for file in out.rglob("manifest.json")}
    prepare("xor_retrieve", str(source), str(out))
    assert {file: file.stat().st_ctime_ns for file in out.rglob("manifest.json")} == before
    assert "8 of 8 splits" in capsys.readouterr().out
    passages = source / "psgs_w100.tsv"
    passages.write_text(passages.read_text() + "3\tmore\tTitle\n")
    prepare("xor_retrieve", str(source), str(out))
    changed = {file.parent.name for file in before if file.stat().st_ctime_ns != before[file]}
    assert changed == {"corpus"}
    about = Split(out / "xor_retrieve/corpus").manifest["about"]
    assert about["source"] == "https://github.com/AkariAsai/XORQA"
    assert set(about["files"]) == {"psgs_w100.tsv"}


def test_what_cannot_be_had_is_left_out_only_where_missing_txt_says_so(
    copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = copied("vatex"), tmp_path / "out"
    (source / "videos/Ptf_2VRj-V0_000122_000132.mp4").unlink()
    with pytest.raises(ValueError, match=r"video 'Ptf_2VRj-V0_000122_000132' names .*V0_000122_000132\.mp4'.*missing\.txt"):
        prepare("vatex", str(source), str(out))
    assert not list(out.rglob("manifest.json"))
    write(source / "missing.txt", "\nvideos/Ptf_2VRj-V0_000122_000132.mp4\n")
    prepare("vatex", str(source), str(out))
    assert len(read(out / "vatex/test-queries")) == 10
    assert [clip.key for clip in read(out / "vatex/test-corpus")] == ["Ptf_2VRj-V1_000122_000132"]
    printed = capsys.readouterr().out
    assert "test-corpus: left out 1 x video in missing.txt" in printed
    assert "numbers are not those of the published set" in printed


@pytest.mark.parametrize("name", SAMPLES)
def test_a_missing_file_is_told_with_where_to_get_it_and_the_layout(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="holds no") as caught:
        prepare(name, str(tmp_path), str(tmp_path / "out"))
    message, layout = str(caught.value), DATASETS[name]
    assert f"Get the data from {layout.home}. The folder given as `source` must hold {layout.expected}" in message


def change_json(file: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        value = json.loads((root / file).read_text())
        change(value)
        write(root / file, value)

    return damage


def change_lines(file: str, change: Callable[[list[Any]], None]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        records = [json.loads(line) for line in (root / file).read_text().splitlines()]
        change(records)
        write_lines(root / file, records)

    return damage


def change_text(file: str, before: str, after: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        text = (root / file).read_text()
        assert before in text
        write(root / file, text.replace(before, after, 1))

    return damage


def drop(file: str) -> Callable[[Path], None]:
    return lambda root: (root / file).unlink()


COCO, VATEX, SVQ = "dataset_coco.json", "vatex_public_test_english_v1.1.json", "passage_retrieval_in_lang.jsonl"
XOR, HINDI = "xor_dev_retrieve_eng_span_v1_1.jsonl", "retrieval_cross_lang/test/hi.jsonl"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("mscoco", drop("val2014/COCO_val2014_000000000002.jpg"), r"image 'COCO_val2014_000000000002\.jpg' names .*holds no"),
        ("mscoco", change_json(COCO, lambda v: v["images"][0]["sentences"].clear()), r"000000000000\.jpg' has no caption"),
        ("mscoco", change_json(COCO, lambda v: v["images"][0]["sentences"][1].update(raw=" ")), r"0\.jpg', caption 2 is ' '"),
        ("mscoco", change_json(COCO, lambda v: v["images"][1].pop("split")), r"image 1: record None lacks split"),
        ("mscoco", change_json(COCO, lambda v: v["images"][0].update(filename="../../x.jpg")), r"lie below"),
        ("mscoco", change_json(COCO, lambda v: v.pop("images")), r"dataset_coco\.json has no images at its top"),
        ("mscoco", change_json(COCO, lambda v: v.update(images=[])), r"gives no example for the split 'test-queries'"),
        ("mscoco", change_text(COCO, '"images"', "images"), r"dataset_coco\.json is not JSON"),
        ("docci", change_text("docci_descriptions.jsonlines", "A long story, 0.", ""), r"image 'test_00000\.jpg', caption 1"),
        ("vatex", change_json(VATEX, lambda v: v[0].pop("enCap")), r"record 0: record None lacks enCap"),
        ("msrvtt", change_text("MSRVTT_JSFUSION_test.csv", "sentence", "text"), r"has no column sentence"),
        ("msrvtt", change_text("MSRVTT_JSFUSION_test.csv", ",a car", ""), r"line 3 has not the 4 fields"),
        ("specialised", change_text("art/metadata.jsonl", "art number 1", ""), r"image 'images/1\.png' is ''"),
        ("encyclopedic_vqa", change_text("test.csv", "Bean_goose", "Been_goose"), r"line 2: the article '.*Been_goose' is not"),
        ("encyclopedic_vqa", change_text("test.csv", "Bean_goose,1", "Bean_goose,2"), r"line 2: its evidence is section '2'"),
        ("encyclopedic_vqa", change_text("test.csv", "2686843", "2686844"), r"image '2686844' is in no list"),
        ("encyclopedic_vqa", change_text("test.csv", "2686843", ""), r"line 2 names no image"),
        ("encyclopedic_vqa", change_text("test.csv", "landmarks", "places"), r"its images are of 'places'"),
        ("encyclopedic_vqa", drop("landmarks/train/0/0/c/00cba0067c078490.jpg"), r"image '00cba0067c078490' names"),
        ("encyclopedic_vqa", change_text("encyclopedic_kb_wiki.json", "section_texts", "texts"), r"Bean_goose' lacks title"),
        ("xtreme_up", change_text(HINDI, "english-2-1", "english-9-1"), r"question 2 is answered by the passage 'english-9-1'"),
        ("xtreme_up", change_text(HINDI, "hi: which number is 0?", ""), r"hi\.jsonl, question 1 is ''"),
        ("xtreme_up", drop(HINDI), r"holds no retrieval_cross_lang/test/hi\.jsonl"),
        ("xor_retrieve", change_lines(XOR, lambda v: v[0].update(answers=[])), r"question '000' has no answer"),
        ("xor_retrieve", change_lines(XOR, lambda v: v[0].update(lang="de")), r"question '000' is in 'de'"),
        ("xor_retrieve", change_text("psgs_w100.tsv", "Tokyo is the capital of Japan.", ""), r"psgs_w100\.tsv, line 2 is ''"),
        (
            "mseb",
            change_lines(SVQ, lambda v: v[0].update(passage_id_in_lang="p-7")),
            r"'utt_0_0' is answered by the passage 'p-7'",
        ),
        ("mseb", change_lines(SVQ, lambda v: v[0].update(utt_id="utt_x")), r"1 utterances of ar_eg have no sound.* 'utt_x'"),
    ],
)
def test_a_bad_record_is_named(
    copied: Callable[[str], Path], tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    source = copied(name)
    damage(source)
    with pytest.raises(ValueError, match=message):
        prepare(name, str(source), str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_an_unknown_data_set_or_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset is 'coco'; known are mscoco, flickr30k, .*, mseb$"):
        prepare("coco", str(tmp_path))
    with pytest.raises(ValueError, match=r"split is 'dev'; msrvtt has test_1k, test$"):
        prepare("msrvtt", str(tmp_path), split="dev")


def test_one_domain_can_be_made_alone(copied: Callable[[str], Path], tmp_path: Path) -> None:
    source = copied("specialised")
    shutil.rmtree(source / "recipes")
    prepare("specialised", str(source), str(tmp_path / "out"), split="art")
    assert [file.parent.name for file in (tmp_path / "out").rglob("manifest.json")] == ["art"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_a_large_object_is_read_entry_by_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(layouts, "CHUNK", chunk)
    value = {"a": {"b": [1, "}", {}]}, "ü\n": 12.5, "c": None, "": "x,y"}
    for indent in (None, 2):
        write(tmp_path / "x.json", json.dumps(value, indent=indent))
        assert dict(read_entries(tmp_path / "x.json")) == value
    write(tmp_path / "x.json", " { } ")
    assert list(read_entries(tmp_path / "x.json")) == []
    for broken in ('{"a": 1', '{"a": 1,}', '{"a" 1}', '["a"]', "", '{"a": 1} x', '{"a": tru}'):
        write(tmp_path / "x.json", broken)
        with pytest.raises(ValueError, match=r"x\.json is no whole JSON object"):
            list(read_entries(tmp_path / "x.json"))


def test_one_stage_judges_all_of_them() -> None:
    config = compose(ROOT / "conf/evaluate_papers.yaml", ["checkpoint=c", "out=o"])
    assert config["benchmarks"].keys() == {benchmark for name in DATASETS for benchmark in benchmarks_of(name)}
    assert config["root"] == compose(ROOT / "conf/prepare_published.yaml", ["dataset=d", "source=s"])["out"]
