"""The result table of first light, in Markdown: every benchmark with chance and, where the data pack gives one, its floor.

.venv/bin/python experiments/001_first_light/table.py runs/first_light/results.json
"""

import json
import sys

# From the README of the data pack. `words`: BM25 or TF-IDF over the text (for documents over given text, which a picture must
# be read for); `pixels`, `sound`: simple statistics with logistic regression; `scratch`: one small model for that task alone.
FLOORS = {
    ("cranfield/text-text", "ndcg@10"): (0.328, "words"),
    ("xquad_en/text-text", "ndcg@10"): (0.965, "words"),
    ("xquad_de/text-text", "ndcg@10"): (0.916, "words"),
    ("xquad_es/text-text", "ndcg@10"): (0.950, "words"),
    ("xquad_ru/text-text", "ndcg@10"): (0.859, "words"),
    ("xquad_ar/text-text", "ndcg@10"): (0.899, "words"),
    ("cosqa/text-code", "ndcg@10"): (0.343, "words"),
    ("agnews/text-text", "ndcg@10"): (0.770, "words"),
    ("nl2bash/text-code", "ndcg@10"): (0.527, "words"),
    ("java_cs/code-code", "ndcg@10"): (0.984, "words"),
    ("wikisql/text-code", "ndcg@10"): (0.986, "words"),
    ("charts/text-page", "ndcg@10"): (0.748, "words"),
    ("jose/text-page", "ndcg@10"): (0.926, "words"),
    ("stsb_en/text-text", "spearman"): (0.721, "words"),
    ("stsb_de/text-text", "spearman"): (0.681, "words"),
    ("banking77/text-text", "accuracy_probe"): (0.894, "words"),
    ("clinc150/text-text", "accuracy_probe"): (0.910, "words"),
    ("tweet_emotion/text-text", "accuracy_probe"): (0.640, "words"),
    ("agnews_class/text-text", "accuracy_probe"): (0.889, "words"),
    ("esc10/audio-text", "accuracy_probe"): (0.80, "sound"),
    ("fsdd/audio-text", "accuracy_probe"): (0.943, "sound"),
    ("tiny/image-text", "accuracy_probe"): (0.095, "pixels"),
    ("sprites_class/video-text", "accuracy_probe"): (1.000, "pixels"),
    ("fashion/text-image", "recall@1"): (0.252, "scratch"),
    ("emoji/text-image", "recall@1"): (0.173, "scratch"),
    ("flickr/text-image", "recall@1"): (0.032, "scratch"),
    ("sprites/text-video", "recall@1"): (0.997, "scratch"),
    ("charts/text-page", "recall@1"): (0.007, "scratch"),
    ("exercises/text-mixed", "recall@1"): (0.106, "scratch"),
    ("esc10/audio-text", "accuracy_zero_shot"): (0.725, "scratch"),
    ("fsdd/audio-text", "accuracy_zero_shot"): (0.930, "scratch"),
    ("tiny/image-text", "accuracy_zero_shot"): (0.165, "scratch"),
}


def main(path: str) -> None:
    """Print the rows with a floor, then every other benchmark's first metric."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    chance: dict[tuple[str, str], float] = {}
    with open(path) as file:
        for row in json.load(file):
            key = (row["benchmark"], row["metric"])
            values.setdefault(key, {})[row["prefix"]] = row["value"]
            chance[key] = row["chance"]
    prefixes = sorted(next(iter(values.values())))
    judged = {benchmark for benchmark, _ in FLOORS}
    first_metric = dict(reversed(values))
    others = [(benchmark, metric) for benchmark, metric in first_metric.items() if benchmark not in judged]
    print("| benchmark | metric | chance | " + " | ".join(map(str, prefixes)) + " | floor | |")
    print("|---|---|---|" + "---|" * len(prefixes) + "---|---|")
    for key in [*FLOORS, *sorted(others)]:
        floor, what = FLOORS.get(key, (None, ""))
        verdict = "" if floor is None else f"{what}: {'**above**' if values[key][prefixes[-1]] > floor else 'below'}"
        shown = " | ".join(f"{values[key][prefix]:.3f}" for prefix in prefixes)
        print(f"| {key[0]} | {key[1]} | {chance[key]:.3f} | {shown} | {'' if floor is None else f'{floor:.3f}'} | {verdict} |")


if __name__ == "__main__":
    main(sys.argv[1])
