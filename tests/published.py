"""Small samples of published data sets, in the layouts that their publishers use."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
from samples import picture_bytes, sound_bytes

from datamodules.recipes.passages import SVQ, XOR, XTREME_UP


def film_bytes(shade: int) -> bytes:
    """A clip of a second and of one grey."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write(file: Path, data: bytes | str | Any) -> None:
    """A file of bytes, of text, or of a value as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = data if isinstance(data, bytes | str) else json.dumps(data)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    write(file, "".join(json.dumps(record) + "\n" for record in records))


def write_table(file: Path, rows: Sequence[Mapping[str, str]], *, delimiter: str = ",") -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    write(file, text.getvalue())


def mscoco(root: Path) -> None:
    images = []
    for number, (split, captions) in enumerate([("test", 6), ("train", 5), ("test", 5)]):
        name = f"COCO_val2014_{number:012d}.jpg"
        sentences = [{"raw": f" caption {n} of image {number}\n", "tokens": []} for n in range(captions)]
        images.append({"filepath": "val2014", "filename": name, "split": split, "sentences": sentences, "cocoid": number})
        write(root / "val2014" / name, picture_bytes("JPEG", width=8, height=8, seed=number))
    write(root / "dataset_coco.json", {"dataset": "coco", "images": images})


def flickr30k(root: Path) -> None:
    images = []
    for number, split in enumerate(["test", "val", "test"]):
        name = f"{number}.jpg"
        sentences = [{"raw": f"caption {n} of image {number}"} for n in range(5)]
        images.append({"filename": name, "split": split, "sentences": sentences, "imgid": number})
        write(root / "flickr30k-images" / name, picture_bytes("JPEG", width=8, height=8, seed=number))
    write(root / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})


def docci(root: Path) -> None:
    records = []
    for number, split in enumerate(["test", "train", "test"]):
        name = f"{split}_{number:05d}.jpg"
        records.append({"example_id": name[:-4], "split": split, "image_file": name, "description": f"A long story, {number}."})
        write(root / "images" / name, picture_bytes("JPEG", width=8, height=8, seed=number))
    write_lines(root / "docci_descriptions.jsonlines", records)


def textcaps(root: Path) -> None:
    data = []
    for image in ("a0", "b1"):
        data += [{"image_id": image, "image_name": image, "caption_str": f"a sign {n} of {image}"} for n in range(5)]
        write(root / "train_images" / f"{image}.jpg", picture_bytes("JPEG", width=8, height=8, seed=ord(image[0])))
    write(root / "TextCaps_0.1_val.json", {"dataset_type": "val", "data": data})


def vatex(root: Path) -> None:
    records = []
    for number in range(2):
        name = f"Ptf_2VRj-V{number}_000122_000132"
        records.append({"videoID": name, "enCap": [f"caption {n} of video {number}" for n in range(10)]})
        write(root / "videos" / f"{name}.mp4", film_bytes(40 * number))
    write(root / "vatex_public_test_english_v1.1.json", records)


def msrvtt(root: Path) -> None:
    rows = [("ret0", "msr9770", "video9770", "a person, connecting"), ("ret1", "msr9771", "video9771", "a car is driven")]
    keys = ("key", "vid_key", "video_id", "sentence")
    write_table(root / "MSRVTT_JSFUSION_test.csv", [dict(zip(keys, row, strict=True)) for row in rows])
    sentences = [{"caption": f"{row[3]}, {n}", "video_id": row[2], "sen_id": n} for row in rows for n in range(3)]
    write(root / "test_videodatainfo.json", {"info": {}, "videos": [], "sentences": sentences})
    for number, row in enumerate(rows):
        write(root / "videos" / f"{row[2]}.mp4", film_bytes(60 * number))


def youcook2(root: Path) -> None:
    database = {}
    for number, (video, subset) in enumerate([("GLd3aX16zBg", "validation"), ("xHr8X2Wpmno", "training")]):
        segments = [{"segment": [90, 102], "id": n, "sentence": f"spread {n} on bread {number}"} for n in range(2)]
        database[video] = {"duration": 241.6, "subset": subset, "recipe_type": "113", "annotations": segments}
        for n in range(2):
            write(root / "clips" / f"{video}_{n}.mp4", film_bytes(100 * number + 20 * n))
    write(root / "youcookii_annotations_trainval.json", {"database": database})


def specialised(root: Path) -> None:
    for place, domain in enumerate(("microscopy", "art", "astronomy", "recipes")):
        records = [{"image": f"images/{n}.png", "text": f"{domain} number {n}"} for n in range(2)]
        write_lines(root / domain / "metadata.jsonl", records)
        for n in range(2):
            write(root / domain / f"images/{n}.png", picture_bytes(width=8, height=8, seed=10 * place + n))


def encyclopedic_vqa(root: Path) -> None:
    articles = {}
    for name, texts in {
        "Bean goose": ["A goose.", "It lives in bogs.", " "],
        "Menger Hotel": ["A hotel.", "Built in 1859."],
    }.items():
        url = f"https://en.wikipedia.org/wiki/{name.replace(' ', '_')}"
        titles = [name, *(f"Section {n}" for n in range(1, len(texts)))]
        articles[url] = {"title": name, "section_titles": titles, "section_texts": texts, "image_urls": [], "url": url}
    write(root / "encyclopedic_kb_wiki.json", articles)
    goose, hotel = articles
    write(root / "inaturalist/val.json", {"images": [{"id": 2686843, "file_name": "val/0001_Aves/a.jpg"}]})
    write(root / "inaturalist/val/0001_Aves/a.jpg", picture_bytes("JPEG", width=8, height=8, seed=1))
    for number, image in enumerate(("00cba0067c078490", "00f928e383e1d121")):
        write(
            root / "landmarks/train/0/0" / image[2] / f"{image}.jpg", picture_bytes("JPEG", width=8, height=8, seed=2 + number)
        )
    row = {"question": "Where does this bird live?", "answer": "bogs", "dataset_image_ids": "2686843"}
    row |= {"dataset_name": "inaturalist", "question_type": "templated", "wikipedia_url": goose, "evidence_section_id": "1"}
    other = {
        "question": "When was this hotel built?",
        "answer": "1859",
        "dataset_image_ids": "00cba0067c078490|00f928e383e1d121",
    }
    other |= {"dataset_name": "landmarks", "question_type": "automatic", "wikipedia_url": hotel, "evidence_section_id": ""}
    hops = row | {"question": "Which is older?", "question_type": "2_hop", "wikipedia_url": f"{goose}|{hotel}"}
    write_table(root / "test.csv", [row, other, hops | {"evidence_section_id": "0|1"}])


def xtreme_up(root: Path) -> None:
    passages = [{"id": f"english-{n}-1", "title": f"Title {n}", "context": f"Passage number {n}."} for n in range(4)]
    write_lines(root / "retrieval_cross_lang/index.jsonl", passages)
    for language in XTREME_UP:
        records = [{**passages[n], "question": f"{language}: which number is {n}?"} for n in (0, 2)]
        write_lines(root / f"retrieval_cross_lang/test/{language}.jsonl", records)


def xor_retrieve(root: Path) -> None:
    rows = [("1", "Tokyo is the capital of Japan.", "Tokyo"), ("2", 'He said "no" to it,\tso it was 1859.', "Hotel")]
    table = [{"id": number, "text": text, "title": title} for number, text, title in rows]
    write_table(root / "psgs_w100.tsv", table, delimiter="\t")
    records = []
    for number, language in enumerate(XOR):
        about = {"lang": language, "split": "dev"}
        records.append({"id": f"{number}00", "question": f"{language} capital?", "answers": ["Tokyo", "yes"], **about})
        records.append({"id": f"{number}01", "question": f"{language} true?", "answers": ["no"], **about})
    write_lines(root / "xor_dev_retrieve_eng_span_v1_1.jsonl", records)


def mseb(root: Path) -> None:
    passages = [{"id": f"p-{n}", "title": f"Title {n}", "context": f"Passage number {n}."} for n in range(3)]
    write_lines(root / "passage_retrieval_in_lang_index.jsonl", passages)
    records, sounds = [], []
    for place, locale in enumerate(SVQ):
        for n in range(2):
            name = f"utt_{place}_{n}"
            records.append({"utt_id": name, "locale": locale, "text": f"question {n}", "passage_id_in_lang": f"p-{n}"})
            sounds.append({"utt_id": name, "waveform": {"bytes": sound_bytes(seconds=0.1, pitch=200 + 20 * place + n)}})
        records.append(
            {**records[-1], "utt_id": f"utt_{place}_9", "passage_id_in_lang": None, "retrievals/passage_in_lang": False}
        )
    write_lines(root / "passage_retrieval_in_lang.jsonl", records)
    (root / "audio").mkdir()
    for part in range(2):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sounds[part::2]), root / "audio" / f"{part}.parquet")


SAMPLES: dict[str, Callable[[Path], None]] = {
    **{made.__name__: made for made in (mscoco, flickr30k, docci, textcaps, vatex, msrvtt, youcook2, specialised)},
    **{made.__name__: made for made in (encyclopedic_vqa, xtreme_up, xor_retrieve, mseb)},
}
