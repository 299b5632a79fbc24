"""Images and videos with captions, as their publishers distribute them.

Every reader says in its docstring how its layout was confirmed.
"""

from collections.abc import Iterator
from functools import partial

from datamodules.recipes.layouts import Captioned, Folder, Layout, Made, captions_of, read_list, read_object, read_rows, said
from datamodules.recipes.pack import complete, read_records
from datamodules.sample import Example, Item, text_item

CAPTIONS_COUNTED = 5  # of an image of Karpathy's splits; MSCOCO has up to 7, of which the 5k test commonly counts the first 5
DOMAINS = ("microscopy", "art", "astronomy", "recipes")


def _karpathy(name: str, images: str | None, folder: Folder, split: str) -> list[Made]:
    """`dataset_<name>.json`: {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}, Flickr30k no filepath.

    Confirmed by public readers of these files (their fields), not by the files.
    """
    file = folder.file(f"dataset_{name}.json")

    def captioned() -> Iterator[Captioned]:
        for number, image in enumerate(read_object(file, "images")["images"]):
            where = f"{file}, image {number}"
            fields = ("filename", "split", "sentences") if images else ("filename", "split", "sentences", "filepath")
            image = complete(image, fields, where)
            if image["split"] == split:
                where = f"{file}, image {image['filename']!r}"
                sentences = [complete(sentence, ("raw",), where)["raw"] for sentence in image["sentences"]]
                path = f"{images or image['filepath']}/{image['filename']}"
                yield Captioned(image["filename"].rpartition(".")[0], [path], sentences[:CAPTIONS_COUNTED], where)

    return captions_of(folder, split, "image", captioned, file, both_ways=True)


def _docci(folder: Folder, split: str) -> list[Made]:
    """`docci_descriptions.jsonlines`: {"split", "image_file", "description"}.

    Confirmed by public readers of this file (its fields and address), not by the file.
    """
    file = folder.file("docci_descriptions.jsonlines")

    def captioned() -> Iterator[Captioned]:
        for record in read_records(file, ("split", "image_file", "description")):
            if record["split"] == split:
                name = record["image_file"]
                where = f"{file}, image {name!r}"
                yield Captioned(name.rpartition(".")[0], [f"images/{name}"], [record["description"]], where)

    return captions_of(folder, split, "image", captioned, file, both_ways=True)


def _textcaps(folder: Folder, split: str) -> list[Made]:
    """`TextCaps_0.1_val.json`: {"data": [{"image_id", "caption_str"}]}, a caption a record; the image is `<image_id>.jpg`.

    Confirmed by big_vision's conversion of these files (google-research/big_vision, datasets), which names their fields.
    """
    file = folder.file(f"TextCaps_0.1_{split}.json")

    def captioned() -> Iterator[Captioned]:
        grouped: dict[str, list[str]] = {}
        for number, record in enumerate(read_object(file, "data")["data"]):
            record = complete(record, ("image_id", "caption_str"), f"{file}, record {number}")
            grouped.setdefault(str(record["image_id"]), []).append(record["caption_str"])
        for image, captions in grouped.items():
            yield Captioned(image, [f"train_images/{image}.jpg"], captions, f"{file}, image {image!r}")

    return captions_of(folder, split, "image", captioned, file, both_ways=True)


def _vatex(folder: Folder, split: str) -> list[Made]:
    """`vatex_public_test_english_v1.1.json`: [{"videoID": "<youtube id>_<start>_<end>", "enCap": [10 strings]}].

    Confirmed by the publisher's description of the format. It distributes no video: clips are cut from YouTube.
    """
    file = folder.file("vatex_public_test_english_v1.1.json")

    def captioned() -> Iterator[Captioned]:
        for number, record in enumerate(read_list(file)):
            record = complete(record, ("videoID", "enCap"), f"{file}, record {number}")
            name, where = record["videoID"], f"{file}, video {record['videoID']!r}"
            yield Captioned(name, _clips("videos", name), record["enCap"], where)

    return captions_of(folder, split, "video", captioned, file, both_ways=False)


def _msrvtt(folder: Folder, split: str) -> list[Made]:
    """`MSRVTT_JSFUSION_test.csv`, 1k-A: key,vid_key,video_id,sentence. For the whole test split with its 20 captions a video,
    `test_videodatainfo.json`: {"sentences": [{"video_id", "caption"}]}.

    Confirmed by public readers of the two files (the head line; the fields), not by the files.
    """
    file = folder.file("MSRVTT_JSFUSION_test.csv" if split == "test_1k" else "test_videodatainfo.json")

    def captioned() -> Iterator[Captioned]:
        if split == "test_1k":
            found = [(row["video_id"], row["sentence"]) for _, row in read_rows(file, ("video_id", "sentence"))]
        else:
            records = enumerate(read_object(file, "sentences")["sentences"])
            sentences = (complete(record, ("video_id", "caption"), f"{file}, sentence {n}") for n, record in records)
            found = [(record["video_id"], record["caption"]) for record in sentences]
        grouped: dict[str, list[str]] = {}
        for video, caption in found:
            grouped.setdefault(video, []).append(caption)
        for video, captions in grouped.items():
            yield Captioned(video, _clips("videos", video), captions, f"{file}, video {video!r}")

    return captions_of(folder, split, "video", captioned, file, both_ways=False)


def _youcook2(folder: Folder, split: str) -> list[Made]:
    """`youcookii_annotations_trainval.json`: {"database": {<video>: {"subset", "annotations": [{"id", "sentence", ..}]}}}.

    Confirmed by public readers of this file (its fields), not by the file. The publisher distributes features and addresses,
    no video; a file for each segment, as read here, is what one cuts from the videos: whole ones are longer than is decoded.
    """
    file = folder.file("youcookii_annotations_trainval.json")

    def captioned() -> Iterator[Captioned]:
        for video, about in read_object(file, "database")["database"].items():
            about = complete(about, ("subset", "annotations"), f"{file}, video {video!r}")
            for segment in about["annotations"] if about["subset"] == split else ():
                segment = complete(segment, ("id", "sentence"), f"{file}, video {video!r}")
                name = f"{video}_{segment['id']}"
                yield Captioned(name, _clips("clips", name), [segment["sentence"]], f"{file}, segment {name!r}")

    return captions_of(folder, split, "video", captioned, file, both_ways=False)


def _specialised(folder: Folder, split: str) -> list[Made]:
    """`<domain>/metadata.jsonl`: {"image", "text"}, images below the domain's folder.

    The papers' sets are not published, so this layout is ours, for sets of one's own.
    """

    def pairs(domain: str) -> Iterator[Example]:
        file = folder.file(f"{domain}/metadata.jsonl")
        for number, record in enumerate(read_records(file, ("image", "text"))):
            where = f"{file}, image {record['image']!r}"
            text, part = said(record["text"], where), folder.media("image", [f"{domain}/{record['image']}"], where)
            if part is not None:
                yield Example(f"{number:06d}", Item((part,)), text_item(text))

    domains = DOMAINS if split == "all" else (split,)
    files = {domain: folder.file(f"{domain}/metadata.jsonl") for domain in domains}
    return [Made(domain, folder.made_from(file), partial(pairs, domain)) for domain, file in files.items()]


def _clips(folder: str, name: str) -> list[str]:
    return [f"{folder}/{name}.{kind}" for kind in ("mp4", "webm")]


KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/ (caption_datasets.zip)"
CAPTIONED = {
    "mscoco": Layout(
        f"{KARPATHY} and https://cocodataset.org (val2014.zip)",
        "annotations CC BY 4.0; the images are Flickr users'",
        "dataset_coco.json and val2014/*.jpg (the images of Karpathy's test split are all there)",
        ("test", "val"),
        partial(_karpathy, "coco", None),
    ),
    "flickr30k": Layout(
        f"{KARPATHY} and https://shannon.cs.illinois.edu/DenotationGraph/ (flickr30k-images)",
        "research and education only; the images are Flickr users'",
        "dataset_flickr30k.json and flickr30k-images/*.jpg",
        ("test", "val"),
        partial(_karpathy, "flickr30k", "flickr30k-images"),
    ),
    "docci": Layout(
        "https://google.github.io/docci/",
        "CC BY 4.0",
        "docci_descriptions.jsonlines and images/*.jpg",
        ("test", "qual_test", "qual_dev", "train"),
        _docci,
    ),
    "textcaps": Layout(
        "https://textvqa.org/textcaps/dataset/",
        "CC BY 4.0",
        "TextCaps_0.1_val.json and train_images/*.jpg (of train_val_images.zip)",
        ("val", "train"),
        _textcaps,
    ),
    "vatex": Layout(
        "https://eric-xw.github.io/vatex-website/",
        "CC BY 4.0 for the captions; the videos are YouTube users'",
        "vatex_public_test_english_v1.1.json and videos/<videoID>.mp4 or .webm, each the clip of ten seconds that it names",
        ("test",),
        _vatex,
    ),
    "msrvtt": Layout(
        "Microsoft Research (MSR-VTT, CVPR 2016), 1k-A from https://github.com/ArrowLuo/CLIP4Clip (msrvtt_data.zip)",
        "not known here; the videos are YouTube users'",
        "MSRVTT_JSFUSION_test.csv (for split=test: test_videodatainfo.json) and videos/<video_id>.mp4 or .webm",
        ("test_1k", "test"),
        _msrvtt,
    ),
    "youcook2": Layout(
        "http://youcook2.eecs.umich.edu/download",
        "not known here; the videos are YouTube users'",
        "youcookii_annotations_trainval.json and clips/<video>_<id>.mp4 or .webm, one for each segment, cut where it says",
        ("validation", "training"),
        _youcook2,
    ),
    "specialised": Layout(
        "a collection of your own, as the papers do not publish theirs",
        "that of the collection",
        f"{', '.join(f'{domain}/metadata.jsonl' for domain in DOMAINS)}, whose lines are "
        '{"image": <path below the folder>, "text": ..}, and the images; split=art takes that one alone',
        ("all", *DOMAINS),
        _specialised,
    ),
}
