"""Questions against passages, as their publishers distribute them: across languages, from speech, about images.

Every reader says in its docstring how its layout was confirmed.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.recipes.layouts import Folder, Layout, Made, read_entries, read_object, read_rows, said
from datamodules.recipes.pack import read_records
from datamodules.sample import Example, Item, Part, key_of, media_item, text_item

XTREME_UP = ("as", "bho", "brx", "gbm", "gom", "gu", "hi", "hne", "kn", "mai")
XTREME_UP += ("ml", "mni", "mr", "mwr", "or", "pa", "ps", "sa", "ta", "ur")
XOR = ("ar", "bn", "fi", "ja", "ko", "ru", "te")
NO_SPAN = ("yes", "no")  # answers that the official evaluation of XOR-Retrieve leaves out
SVQ = ("ar_eg", "ar_x_gulf", "ar_x_levant", "ar_x_maghrebi", "bn_bd", "bn_in", "en_au", "en_gb", "en_in", "en_ph", "en_us")
SVQ += ("fi_fi", "id_id", "ko_kr", "ru_ru", "sw", "te_in")
PASSAGE = ("id", "title", "context")
SOUNDS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg"}
ROWS = 64  # utterances that are read at a time; our choice


def _xtreme_up(folder: Folder, split: str) -> list[Made]:
    """`retrieval_cross_lang/<split>/<language>.jsonl`: {"id", "title", "context", "question"}, of which all but the
    question is the passage's; `retrieval_cross_lang/index.jsonl`: {"id", "title", "context"}.

    Confirmed by the publisher's code (google-research/xtreme-up: baseline/jsonl_to_seqio_tsv_lib.py, baseline/tasks_lib.py,
    evaluation/score_system.py and metrics.py, whose MRR is over passage ids), not by the files. The languages are the 20 of
    India that the set adds; its files of Arabic, Bengali, Finnish, Korean, Russian and Telugu are those of XOR-TyDi.
    """
    index = folder.file("retrieval_cross_lang/index.jsonl")
    files = {language: folder.file(f"retrieval_cross_lang/{split}/{language}.jsonl") for language in XTREME_UP}

    def queries(language: str) -> Iterator[Example]:
        known = {str(passage["id"]) for passage in read_records(index, PASSAGE)}
        for number, record in enumerate(read_records(files[language], ("id", "question"))):
            where = f"{files[language]}, question {number + 1}"
            _check_known(str(record["id"]), known, where, index)
            question = text_item(said(record["question"], where))
            yield Example(f"{language}-{number}", question, relevant={key_of(str(record["id"])): 1.0})

    made = [Made(f"{split}-{name}-queries", (file, index), partial(queries, name)) for name, file in files.items()]
    return [*made, Made("corpus", (index,), partial(_passages, index))]


def _xor_retrieve(folder: Folder, split: str) -> list[Made]:
    """`xor_dev_retrieve_eng_span_v1_1.jsonl`: {"id", "question", "answers": [..], "lang"}; passages of 100 words of English
    Wikipedia, `enwiki_20190201_w100.tsv` or DPR's `psgs_w100.tsv`: id, text, title between tabs.

    Confirmed by the publisher's README and evaluation (AkariAsai/XORQA) and public readers of the passages, not by the files.
    The test split has no published answers. No passage is given as relevant: answers decide, see `meta["answers"]`.
    """
    file = folder.file(f"xor_{split}_retrieve_eng_span{'_v1_1' if split == 'dev' else ''}.jsonl")
    passages = folder.file("enwiki_20190201_w100.tsv", "psgs_w100.tsv")

    def queries(language: str) -> Iterator[Example]:
        for record in read_records(file, ("id", "question", "answers", "lang")):
            where = f"{file}, question {record['id']!r}"
            if record["lang"] not in XOR:
                raise ValueError(f"{where} is in {record['lang']!r}; languages of this set: {', '.join(XOR)}")
            answers = [said(answer, f"{where}, an answer") for answer in record["answers"]]
            if not answers:
                raise ValueError(f"{where} has no answer; every question needs one: add it or take the question out")
            spans = [answer for answer in answers if answer not in NO_SPAN]
            if record["lang"] != language:
                continue
            if not spans:
                folder.left_out["question of yes or no"] += 1
            else:
                question = text_item(said(record["question"], where))
                yield Example(key_of(str(record["id"])), question, meta={"answers": spans, "language": language})

    def corpus() -> Iterator[Example]:
        for where, row in read_rows(passages, ("id", "text", "title"), delimiter="\t"):
            item = text_item(said(row["text"], where), title=row["title"].strip() or None)
            yield Example(key_of(row["id"]), target=item)

    made = [Made(f"{split}-{language}-queries", (file,), partial(queries, language)) for language in XOR]
    return [*made, Made("corpus", (passages,), corpus)]


def _mseb(folder: Folder, split: str) -> list[Made]:
    """Simple Voice Questions of MSEB: `passage_retrieval_in_lang.jsonl`: {"utt_id", "locale", "text", "passage_id_in_lang"} (or
    "passage_id"); `passage_retrieval_in_lang_index.jsonl`: {"id", "title", "context"}; and below `audio/` Parquet files with
    the columns utt_id and waveform (the bytes of a WAV, or a struct whose `bytes` they are).

    Confirmed by the publisher's code and its test data (google-research/mseb: datasets/simple_voice_questions.py, testdata/,
    tasks/retrievals/passage_in_lang), not by the data set. Newer releases may have a file of tasks for each locale instead.
    """
    tasks = folder.file("passage_retrieval_in_lang.jsonl")
    index = folder.file("passage_retrieval_in_lang_index.jsonl")
    sounds = folder.files("audio/*.parquet")

    def queries(locale: str) -> Iterator[Example]:
        known = {str(passage["id"]) for passage in read_records(index, PASSAGE)}
        wanted: dict[str, tuple[str, dict[str, Any]]] = {}
        for record in read_records(tasks, ("utt_id", "locale", "text")):
            if record["locale"] == locale and record.get("retrievals/passage_in_lang", True):  # the publisher's own choice
                where = f"{tasks}, utterance {record['utt_id']!r}"
                passage = record.get("passage_id_in_lang", record.get("passage_id"))
                _check_known(str(passage), known, where, index)
                wanted[record["utt_id"]] = str(passage), {"transcript": record["text"], "language": locale}
        for name, data in _sounds(sounds, wanted.keys()):
            passage, meta = wanted.pop(name)
            ending = SOUNDS.get(data[:4])
            if ending is None:
                raise ValueError(f"{tasks}, utterance {name!r}: its sound begins with {data[:4]!r} and is no WAV, FLAC or Ogg")
            yield Example(key_of(name), media_item("audio", data, ending), relevant={key_of(passage): 1.0}, meta=meta)
        if wanted:
            raise ValueError(
                f"{tasks}: {len(wanted)} utterances of {locale} have no sound in {folder.root / 'audio'}, the first is "
                f"{min(wanted)!r}. Get the data from {folder.layout.home}"
            )

    made = [Made(f"{split}-{locale}-queries", (tasks, index, *sounds), partial(queries, locale)) for locale in SVQ]
    return [*made, Made("corpus", (index,), partial(_passages, index))]


def _sounds(files: list[Path], wanted: Any) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the wanted utterances, in the order of the files."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError("Parquet files are read by pyarrow, which is not installed; pip install pyarrow") from error
    for file in files:
        with ParquetFile(file) as table:
            names = table.read(columns=["utt_id"])["utt_id"].to_pylist()
            if wanted.isdisjoint(names):
                continue
            for batch in table.iter_batches(ROWS, columns=["utt_id", "waveform"]):
                for row in batch.to_pylist():
                    if row["utt_id"] in wanted:
                        sound = row["waveform"]
                        yield row["utt_id"], sound["bytes"] if isinstance(sound, dict) else sound


def _encyclopedic_vqa(folder: Folder, split: str) -> list[Made]:
    """`<split>.csv`: question, dataset_image_ids (between |), dataset_name, wikipedia_url, evidence_section_id, ..;
    `encyclopedic_kb_wiki.json`: {<url>: {"title", "section_titles", "section_texts", ..}}.

    Confirmed by the publisher's README (google-research/google-research, encyclopedic_vqa); the bars between image ids and how
    images lie by public readers. An iNaturalist id is one of `images` in its `val.json` or `train.json` and names the file; a
    landmark lies at `<a>/<b>/<c>/<abc..>.jpg`.

    Every question with every one of its images is a query. A document is a section of an article; relevant are those that
    `evidence_section_id` names, all of the article where it names none, of both articles for questions of two hops. Sections
    without text are no documents.
    """
    file, articles = folder.file(f"{split}.csv"), folder.file("encyclopedic_kb_wiki.json")

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        fields = ("question", "answer", "dataset_image_ids", "dataset_name", "wikipedia_url", "evidence_section_id")
        return read_rows(file, fields)

    def queries() -> Iterator[Example]:
        urls = {url for _, row in rows() for url in row["wikipedia_url"].split("|")}
        with_text = {
            url: (number, [place for place, text in enumerate(_sections(article, url, articles)) if text])
            for number, (url, article) in enumerate(read_entries(articles))
            if url in urls
        }
        names = _inaturalist(folder) if any(row["dataset_name"] == "inaturalist" for _, row in rows()) else {}
        for number, (where, row) in enumerate(rows()):
            question, relevant = said(row["question"], where), _evidence(row, with_text, where, articles)
            images = [image for image in row["dataset_image_ids"].split("|") if image]
            if not images:
                raise ValueError(f"{where} names no image; every question needs one: add it or take the row out")
            for place, image in enumerate(images):
                part = folder.media(
                    "image", _image_names(row["dataset_name"], image, names, where), f"{where}, image {image!r}"
                )
                if part is not None:
                    meta = {"answer": row["answer"], "question_type": row.get("question_type", "")}
                    yield Example(f"{number}-{place}", Item((part, Part("text", question))), relevant=relevant, meta=meta)

    def corpus() -> Iterator[Example]:
        for number, (url, article) in enumerate(read_entries(articles)):
            for place, text in enumerate(_sections(article, url, articles)):
                if not text:
                    folder.left_out["section without text"] += 1
                else:
                    yield Example(f"{number}-{place}", target=text_item(text, title=article["title"].strip() or None))

    made = [Made(f"{split}-queries", folder.made_from(file, articles), queries)]
    return [*made, Made("corpus", (articles,), corpus)]


def _sections(article: Any, url: str, file: Path) -> list[str]:
    """Texts of the sections below their titles, empty where there is none; the first, titled like the article, without."""
    whole = isinstance(article, dict) and {"title", "section_titles", "section_texts"} <= article.keys()
    if not whole or len(article["section_titles"]) != len(article["section_texts"]):
        raise ValueError(f"{file}: the article {url!r} lacks title, section_titles or section_texts; correct it")
    titled = zip(article["section_titles"], article["section_texts"], strict=True)
    texts = [f"{title}\n{text.strip()}" if text.strip() else "" for title, text in titled]
    return [text.partition("\n")[2] if place == 0 else text for place, text in enumerate(texts)]


def _evidence(row: dict[str, str], with_text: dict[str, tuple[int, list[int]]], where: str, articles: Path) -> dict[str, float]:
    """Keys of the sections that answer a row's question."""
    urls, places = row["wikipedia_url"].split("|"), row["evidence_section_id"].split("|")
    keys: list[str] = []
    for hop, url in enumerate(urls):
        if url not in with_text:
            raise ValueError(f"{where}: the article {url!r} is not in {articles.name}; questions must name its articles")
        number, known = with_text[url]
        named = places[hop].strip() if hop < len(places) else ""
        if named and (not named.isdecimal() or int(named) not in known):
            raise ValueError(
                f"{where}: its evidence is section {named!r} of {url!r}, which has no text there; take the row out"
            )
        keys += [f"{number}-{place}" for place in ([int(named)] if named else known)]
    if not keys:
        raise ValueError(f"{where}: none of its articles has any text in {articles.name}; take the row out")
    return dict.fromkeys(keys, 1.0)


def _inaturalist(folder: Folder) -> dict[str, str]:
    """Image id to file name, of iNaturalist 2021's own lists."""
    lists = [folder.root / "inaturalist" / name for name in ("val.json", "train.json")]
    found = [file for file in lists if file.is_file()] or [folder.file("inaturalist/val.json", "inaturalist/train.json")]
    return {str(image["id"]): image["file_name"] for file in found for image in read_object(file, "images")["images"]}


def _image_names(dataset: str, image: str, names: dict[str, str], where: str) -> list[str]:
    if dataset == "inaturalist":
        if image not in names:
            raise ValueError(f"{where}: the image {image!r} is in no list of inaturalist/; put val.json and train.json there")
        return [f"inaturalist/{names[image]}"]
    if dataset == "landmarks":
        path = f"{'/'.join(image[:3])}/{image}.jpg"
        return [f"landmarks/{path}", *(f"landmarks/{part}/{path}" for part in ("train", "index", "test"))]
    raise ValueError(f"{where}: its images are of {dataset!r}; they are of inaturalist or landmarks: correct the row")


def _passages(file: Path) -> Iterator[Example]:
    for passage in read_records(file, PASSAGE):
        where = f"{file}, passage {passage['id']!r}"
        item = text_item(said(passage["context"], where), title=str(passage["title"]).strip() or None)
        yield Example(key_of(str(passage["id"])), target=item)


def _check_known(passage: str, known: set[str], where: str, index: Path) -> None:
    if passage not in known:
        raise ValueError(f"{where} is answered by the passage {passage!r}, which {index.name} does not hold; take it out")


PASSAGES = {
    "encyclopedic_vqa": Layout(
        "https://github.com/google-research/google-research/tree/master/encyclopedic_vqa, the images from iNaturalist 2021 "
        "(https://github.com/visipedia/inat_comp) and Google Landmarks v2 (https://github.com/cvdfoundation/google-landmark)",
        "not known here; the texts are Wikipedia's (CC BY-SA)",
        "test.csv, encyclopedic_kb_wiki.json, inaturalist/val.json (or train.json) with the images at the paths that it names, "
        "and landmarks/<a>/<b>/<c>/<abc..>.jpg, also below landmarks/train, index or test",
        ("test", "val", "train"),
        _encyclopedic_vqa,
    ),
    "xtreme_up": Layout(
        "https://github.com/google-research/xtreme-up (xtreme-up-v1.1.jsonl.tgz)",
        "not known here; the texts are Wikipedia's (CC BY-SA)",
        f"retrieval_cross_lang/index.jsonl and retrieval_cross_lang/test/<language>.jsonl for {', '.join(XTREME_UP)}",
        ("test", "validation", "train"),
        _xtreme_up,
    ),
    "xor_retrieve": Layout(
        "https://github.com/AkariAsai/XORQA",
        "not known here; the texts are Wikipedia's (CC BY-SA)",
        "xor_dev_retrieve_eng_span_v1_1.jsonl and enwiki_20190201_w100.tsv (or DPR's psgs_w100.tsv)",
        ("dev", "train"),
        _xor_retrieve,
    ),
    "mseb": Layout(
        "https://huggingface.co/datasets/google/svq",
        "CC BY 4.0",
        "passage_retrieval_in_lang.jsonl, passage_retrieval_in_lang_index.jsonl and audio/*.parquet",
        ("test",),
        _mseb,
    ),
}
