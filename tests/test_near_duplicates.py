"""Near duplicates: estimates against true Jaccard similarities, what is found against all pairs, and what must stay apart."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.curation import near_duplicates
from datamodules.curation.near_duplicates import (
    FINGERPRINT,
    MAX_COMPARED,
    NUM_BANDS,
    fingerprint,
    near_pairs,
    overlaps,
    shingles,
    signature,
    similarity,
    texts_of,
)
from datamodules.sample import Item, Part, media_item, text_item

ROOT = Path(__file__).parent.parent
PICTURE, OTHER_PICTURE = Part("image", b"one picture", "png"), Part("image", b"another picture", "png")
WORDS = [first + vowel + last for first in "bdgkmp" for vowel in "aeiou" for last in ("lem", "nat")]


def text_of(rng: np.random.Generator, length: int) -> str:
    return " ".join(rng.choice(WORDS, length))


def edited(rng: np.random.Generator, text: str, num_words: int) -> str:
    words = text.split()
    for place in rng.choice(len(words), num_words, replace=False):
        words[place] = f"new{rng.integers(10**9)}"
    return " ".join(words)


def rows_of(*texts: str) -> np.ndarray:
    return fingerprint([text_item(text) for text in texts])


def are_near(one: str, other: str) -> bool:
    return near_pairs(rows_of(one, other)).tolist() == [0, 0]


def shingle_set(text: str) -> set[int]:
    return set(shingles(text).tolist())


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


def greedy(near: np.ndarray) -> list[int]:
    """Rows in order, each to the first kept one that it is near, by all pairs (N, N)."""
    kept, heads = [], []
    for row in range(len(near)):
        heads.append(next((head for head in kept if near[row, head]), row))
        if heads[-1] == row:
            kept.append(row)
    return heads


def all_similarities(rows: np.ndarray) -> np.ndarray:
    return (rows["signature"][:, None] == rows["signature"][None]).mean(2)


@pytest.mark.parametrize(("shared", "own"), [(0, 50), (10, 40), (60, 20), (90, 5), (1, 0), (3000, 500)])
def test_the_share_of_equal_minima_estimates_the_jaccard_similarity(shared, own):
    rng, trials = np.random.default_rng(0), 200
    true = shared / (shared + 2 * own)
    estimates = []
    for seed in range(trials):
        numbers = rng.integers(0, 2**64, shared + 2 * own, dtype=np.uint64)
        one, other = numbers[: shared + own], np.concatenate([numbers[:shared], numbers[shared + own :]])
        estimates.append((signature(one, seed=seed) == signature(other, seed=seed)).mean())
    deviation = np.sqrt(true * (1 - true) / 128)  # of a mean of 128 independent coins
    assert abs(np.mean(estimates) - true) <= 3 * deviation / np.sqrt(trials)
    assert np.std(estimates) <= 1.2 * deviation  # 1 / sqrt(2 · 200) = 5 % is one standard deviation of a standard deviation
    assert np.mean(np.abs(np.array(estimates) - true) <= 3 * deviation) >= 0.97  # 99.7 % of a normal distribution


def test_fingerprints_of_texts_estimate_the_similarity_of_their_shingles():
    rng = np.random.default_rng(1)
    errors = []
    for num_edits in [1, 2, 4, 8, 16] * 20:
        text = text_of(rng, 120)
        texts = text, edited(rng, text, num_edits)
        true = jaccard(*map(shingle_set, texts))
        rows = rows_of(*texts)
        errors.append((all_similarities(rows)[0, 1] - true) / np.sqrt(true * (1 - true) / 128))
    assert np.mean(np.abs(errors) <= 3) >= 0.97
    assert abs(np.mean(errors)) <= 0.3  # 3 / sqrt(100)


@pytest.mark.parametrize("place", [0, 1, 30, 58, 59])
def test_one_other_word_counts_the_same_wherever_it_stands(place):
    words = [f"word{number}" for number in range(60)]
    other = [*words[:place], "other", *words[place + 1 :]]
    assert jaccard(shingle_set(" ".join(words)), shingle_set(" ".join(other))) == 59 / 65  # (k − 1) / (k + 2n − 1)
    assert are_near(" ".join(words), " ".join(other))


def test_bands_join_as_many_pairs_as_the_curve_says():
    rng = np.random.default_rng(2)
    for share in (0.6, 0.7, 0.8, 0.9):
        minima = rng.integers(0, 2**64, (2, 4000, 128), dtype=np.uint64)
        minima[1] = np.where(rng.random((4000, 128)) < share, minima[0], minima[1])
        bands = near_duplicates._combine(near_duplicates._mix(minima).reshape(2, 4000, NUM_BANDS, 8))
        found = (bands[0] == bands[1]).any(1).mean()
        expected = 1 - (1 - share**8) ** 16
        assert abs(found - expected) <= 3 * np.sqrt(expected * (1 - expected) / 4000)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A small red circle", "a  small RED circle."),
        ("“Straße”", "STRASSE"),
        ("ﬁne ①", "fine 1"),  # NFKC
        ("你好，世界。", "你好 世界!"),
        ("مرحبا بالعالم؟", "مرحبا بالعالم"),
        ("🎉🎉 done", "🎉🎉 done!"),
    ],
)
def test_case_marks_and_white_space_do_not_matter(one, other):
    assert np.array_equal(shingles(one), shingles(other))
    assert are_near(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a small red circle", "a small blue circle"),
        ("Show me a picture of a small circle that is painted red", "Show me a picture of a small circle that is painted blue"),
        ("What is 2 * 3?", "What is 2 / 3?"),
        ("What is 2-3?", "What is 2+3?"),
        ("learn C++", "learn C#"),
        ("worth $5", "worth £5"),
        ("great 🎉", "great 😡"),
        ("هذا كتاب أحمر", "هذا كتاب أزرق"),
        ("画面左上角有一个小的红色圆形右下角有一个大的蓝色方形", "画面左上角有一个小的绿色圆形右下角有一个大的蓝色方形"),
        ("हिन्दी", "हन्दी"),  # vowel signs are no letters to \w
        ("...", "?!"),
        ("", "a"),
        ("word", "word word"),
    ],
)
def test_short_texts_are_near_only_where_all_words_are_the_same(one, other):
    assert not are_near(one, other)


def test_short_texts_of_one_template_stay_apart():
    colors, shapes = WORDS[:20], WORDS[20:40]
    texts = [
        f"There is one small {a} {b} at the top of the picture and one large {c} thing below it, slowly moving to the left"
        for a, b, c in zip(colors * 20, np.repeat(shapes, 20), WORDS[40:44] * 100, strict=True)
    ]
    assert len({len(text.split()) for text in texts} & {22, 23, 24}) == 1
    assert near_pairs(rows_of(*texts), threshold=0.7).tolist() == list(range(400))


def test_a_paraphrase_and_another_text_on_the_topic_are_kept():
    text = """Technology stocks led Asian share markets lower on Friday after a retreat by their American peers, with
        investors cautious amid record-breaking oil prices and ahead of a speech by the head of the central bank about
        interest rates."""
    paraphrase = """On Friday, Asian markets fell with technology shares leading the losses: American stocks had slipped,
        oil stood at a record, and investors were waiting for what the head of the central bank would say about
        interest rates."""
    other = """Technology stocks led European share markets higher on Monday after a rally of their Asian peers, with
        investors hopeful amid falling oil prices and after a speech by the president of the central bank about lower
        interest rates."""
    assert near_pairs(rows_of(text, paraphrase, other)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("alphabet", ["你好世界大小红色圆形的是在有一个这那上下左右", "กขคงจฉชซญฐณดตถทธนบปผ"])
def test_scripts_without_spaces_are_cut_into_letters(alphabet):
    rng = np.random.default_rng(3)
    text, other = ("".join(rng.choice(list(alphabet), 100)) for _ in range(2))
    changed = f"{text[:50]}々{text[51:]}" if alphabet[0] == "你" else f"{text[:50]}ฮ{text[51:]}"
    assert jaccard(shingle_set(text), shingle_set(changed)) == 99 / 109
    assert are_near(text, changed)
    assert not are_near(text, other)


def test_a_few_letters_of_another_script_leave_a_text_its_words():
    text = f"{' '.join(f'word{number}' for number in range(57))} 你好 吗"
    assert jaccard(shingle_set(text), shingle_set(text.replace("word30", "other"))) == 59 / 65  # of 60 words, in runs of 3


def test_a_german_text_is_found_with_one_word_changed():
    text = """Die Straße führt über den Fluss und weiter in die Berge, wo im Frühling die Wiesen blühen; kein Mensch wohnt dort,
        nur ein alter Hirte zieht mit seinen Schafen von einem Tal in das andere und zählt die Tage bis zum ersten Schnee."""
    assert are_near(text, text.replace("Frühling", "Sommer"))


def test_a_text_of_a_megabyte_is_found_with_words_changed():
    rng = np.random.default_rng(4)
    text = text_of(rng, 180_000)
    assert len(text) > 1_000_000
    assert are_near(text, edited(rng, text, 1000))
    assert not are_near(text, text_of(rng, 180_000))
    assert len(shingles("x" * 1_000_000)) == 5  # of equal pieces: two that begin before, two that end after, one within


@pytest.mark.parametrize("text", ["", "   \n", "...", "?!", "«»"])
def test_a_text_without_words_is_near_only_its_equals(text):
    assert len(shingles(text)) == 0
    assert near_pairs(rows_of("a", text, ";;", text)).tolist() == [0, 1, 2, 1]


def test_texts_of_an_item_are_its_title_and_its_texts():
    item = Item((Part("text", "a"), PICTURE, Part("code", "b\nc")), "T")
    assert texts_of(item) == "T\na\nb\nc"
    assert texts_of(media_item("image", b"", "png")) == ""
    assert texts_of(text_item("a")) == "a"


def test_items_with_other_media_are_apart_and_with_the_same_compared_by_text():
    rng = np.random.default_rng(5)
    text = text_of(rng, 60)
    texts = Part("text", text), Part("text", edited(rng, text, 1))
    items = [Item((texts[0],)), *(Item((part, picture)) for picture in (PICTURE, OTHER_PICTURE) for part in texts)]
    assert near_pairs(fingerprint(items)).tolist() == [0, 1, 1, 3, 3]
    alone = [Item((PICTURE,)), Item((OTHER_PICTURE,)), Item((PICTURE,))]
    assert near_pairs(fingerprint(alone)).tolist() == [0, 1, 0]


def test_a_record_is_near_where_every_column_is():
    rng = np.random.default_rng(6)
    passage, question, picture = text_of(rng, 100), text_of(rng, 40), Item((PICTURE,))
    near_passage, near_question = edited(rng, passage, 1), edited(rng, question, 1)
    queries = [question, "who?", near_question, "Who!", question, question, question]
    targets = [*map(text_item, [passage, passage, passage, near_passage, text_of(rng, 100)]), picture, None]
    rows = np.stack([rows_of(*queries), fingerprint(targets)], 1)
    assert near_pairs(rows).tolist() == [0, 1, 0, 1, 4, 5, 6]
    assert near_pairs(np.concatenate([rows, rows])).tolist() == [0, 1, 0, 1, 4, 5, 6] * 2
    assert similarity(rows, np.array([0, 0]), rows, np.array([1, 4])).max() < 0.1  # one column is the same
    assert near_pairs(rows[:, :1]).tolist() == [0, 1, 0, 1, 0, 0, 0]


def test_a_chain_of_changes_is_not_dropped_as_a_whole():
    words = [f"word{number}" for number in range(100)]
    texts = [" ".join(["changed"] * num_changed + words[num_changed:]) for num_changed in (0, 8, 16, 24)]
    similarities = all_similarities(rows := rows_of(*texts))
    assert similarities.diagonal(1).min() >= 0.8
    assert similarities.diagonal(2).max() < 0.8
    assert near_pairs(rows).tolist() == [0, 0, 2, 2]


def test_all_pairs_of_true_similarities_say_the_same():
    rng = np.random.default_rng(7)
    bases = [text_of(rng, length) for length in rng.integers(120, 200, 100)]
    texts = [edited(rng, bases[rng.integers(100)], int(rng.integers(0, 2))) for _ in range(300)]  # two of a base: at least 0.9
    sets = [shingle_set(text) for text in texts]
    near = np.eye(300, dtype=bool)
    for one, other in combinations(range(300), 2):
        true = jaccard(sets[one], sets[other])
        assert not 0.4 < true < 0.9  # three standard deviations from the threshold
        near[one, other] = near[other, one] = true >= 0.8
    expected = greedy(near)
    assert near_pairs(rows_of(*texts)).tolist() == expected
    assert 50 < len(set(expected)) < 110


def test_all_pairs_of_estimates_find_little_more():
    rng = np.random.default_rng(8)
    bases = [text_of(rng, 100) for _ in range(20)]
    rows = rows_of(*(edited(rng, bases[rng.integers(20)], int(rng.integers(0, 5))) for _ in range(300)))
    similarities = all_similarities(rows)
    expected, found = np.array(greedy(similarities >= 0.8)), near_pairs(rows)
    assert (similarities[np.arange(300), found] >= 0.8).all()
    assert np.array_equal(found[found], found)
    kept, rightly = set(found.tolist()), set(expected.tolist())
    assert len(rightly) < 200
    assert len(kept - rightly) <= 6  # 2 % of the rows


PIECES = st.lists(st.sampled_from(["", "a b", "?", *(text_of(np.random.default_rng(n), 30) for n in range(3))]), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES.map(" ".join), max_size=12), st.data())
def test_order_decides_and_blocks_and_later_rows_do_not(texts, data):
    rows = rows_of(*texts)
    cut = data.draw(st.integers(0, len(texts)))
    assert np.array_equal(np.concatenate([rows_of(*texts[:cut]), rows_of(*texts[cut:])]), rows)
    first = near_pairs(rows)
    assert np.array_equal(near_pairs(rows[:cut]), first[:cut])
    assert np.array_equal(first[first], first)
    assert (first <= np.arange(len(texts))).all()
    assert (similarity(rows, np.arange(len(texts)), rows, first) >= 0.8).all()
    for one, other in combinations(range(len(texts)), 2):
        assert first[one] == first[other] or rows["content"][one] != rows["content"][other]
    assert overlaps(rows, rows[:cut])[:cut].all()


def test_another_process_makes_the_same_fingerprints(tmp_path):
    texts = ["", "a", "Größe 你好 🎉 " * 40, "word " * 100, "one two three four five six " * 9]
    program = """if True:
        import sys, numpy as np
        from datamodules.curation.near_duplicates import fingerprint
        from datamodules.sample import text_item
        np.save(sys.argv[1], fingerprint([text_item(text) for text in sys.argv[2:]]))"""
    for hash_seed in ("1", "2"):
        path = tmp_path / f"{hash_seed}.npy"
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
        subprocess.run([sys.executable, "-c", program, str(path), *texts], env=environment, check=True)
        assert np.array_equal(np.load(path), rows_of(*texts))


@pytest.fixture
def comparisons(monkeypatch) -> list[int]:
    counts, compare = [], similarity

    def counting(rows, at, others, other_at):
        counts.append(len(at))
        return compare(rows, at, others, other_at)

    monkeypatch.setattr(near_duplicates, "similarity", counting)
    return counts


def test_equal_texts_are_not_compared(comparisons):
    text = text_of(np.random.default_rng(9), 60)
    assert not near_pairs(rows_of(*([text] * 500), *([text.upper()] * 500))).any()
    assert sum(comparisons) == 0


def test_near_texts_are_compared_with_a_bounded_number_of_others(comparisons):
    rng = np.random.default_rng(10)
    text = text_of(rng, 200)
    assert not near_pairs(rows_of(text, *(edited(rng, text, 1) for _ in range(999)))).any()
    assert 1000 < sum(comparisons) <= 1000 * NUM_BANDS * MAX_COMPARED


def test_overlaps_compares_with_a_bounded_number_of_judged_rows(comparisons):
    rng = np.random.default_rng(11)
    text = text_of(rng, 200)
    judged = rows_of(*(edited(rng, text, 1) for _ in range(300)))
    assert overlaps(rows_of(text, text_of(rng, 200)), judged).tolist() == [True, False]
    assert sum(comparisons) <= 2 * NUM_BANDS * MAX_COMPARED


def test_overlaps_are_equal_or_near():
    rng = np.random.default_rng(12)
    judged_texts = [text_of(rng, 80) for _ in range(40)]
    items = [text_item(edited(rng, text, 1)) for text in judged_texts] + [text_item(text_of(rng, 80)) for _ in range(40)]
    items += [
        Item((PICTURE,)),
        Item((OTHER_PICTURE,)),
        text_item("Who?"),
        text_item("where"),
        text_item("?"),
        text_item("!"),
        None,
    ]
    judged = fingerprint([*map(text_item, judged_texts), Item((PICTURE,)), text_item("who"), text_item("?"), None])
    rows = fingerprint(items)
    expected = [True] * 40 + [False] * 40 + [True, False, True, False, True, False, False]
    assert overlaps(rows, judged).tolist() == expected
    assert np.concatenate([overlaps(rows[:50], judged), overlaps(rows[50:], judged)]).tolist() == expected


def test_rows_that_share_a_band_and_little_more_are_no_overlaps():
    rng = np.random.default_rng(14)
    texts = [text_of(rng, 100) for _ in range(150)]
    rows, judged = rows_of(*(edited(rng, text, 1 + number % 8) for number, text in enumerate(texts))), rows_of(*texts)
    share_a_band = (rows["bands"] == judged["bands"]).any(1)
    near = similarity(rows, np.arange(150), judged, np.arange(150)) >= 0.8
    assert (share_a_band & ~near).sum() > 20
    assert overlaps(rows, judged).tolist() == (share_a_band & near).tolist()


def test_equals_are_found_however_full_their_buckets(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_COMPARED", 0)
    rows = rows_of("a b", "A b", "c")
    assert near_pairs(rows).tolist() == [0, 0, 2]
    assert overlaps(rows, rows[:1]).tolist() == [True, False, False]


def test_an_overlap_of_media_needs_every_byte():
    data = bytes(range(256))
    judged = fingerprint([media_item(kind, data, "x") for kind in ("image", "audio", "video", "page")])
    assert overlaps(judged, judged).all()
    assert not overlaps(fingerprint([media_item(kind, data[:-1], "x") for kind in ("image", "audio")]), judged).any()
    assert not overlaps(judged[:1], judged[1:]).any()


def test_rows_may_be_a_memmap_or_none(tmp_path):
    np.save(tmp_path / "rows.npy", rows_of("a", "b", "A."))
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert near_pairs(rows).tolist() == [0, 1, 0]
    assert overlaps(rows, rows[1:2]).tolist() == [False, True, False]
    assert overlaps(rows, rows[:0]).tolist() == [False] * 3
    assert near_pairs(rows[:0]).tolist() == overlaps(rows[:0], rows).tolist() == []
    assert near_pairs(np.zeros((0, 2), FINGERPRINT)).tolist() == []


def test_blocks_do_not_change_what_is_found(monkeypatch):
    rng = np.random.default_rng(13)
    texts = [text_of(rng, 60) for _ in range(30)]
    texts += [edited(rng, text, 1) for text in texts]
    rows = rows_of(*texts)
    at = np.arange(60)
    expected = similarity(rows, at, rows, at % 30)
    monkeypatch.setattr(near_duplicates, "BLOCK", 7)
    assert np.array_equal(similarity(rows, at, rows, at % 30), expected)
    assert np.array_equal(rows_of(*texts), rows)
    assert near_pairs(rows).tolist() == [*range(30)] * 2


@pytest.mark.parametrize("threshold", [0.5, 1.1, float("nan")])
def test_a_threshold_that_bands_cannot_serve_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold of"):
        near_pairs(rows_of("a"), threshold=threshold)
    with pytest.raises(ValueError, match="threshold of"):
        overlaps(rows_of("a"), rows_of("a"), threshold=threshold)


def test_what_is_no_fingerprint_is_refused():
    with pytest.raises(ValueError, match="make them with `fingerprint`"):
        near_pairs(np.zeros(3))
    with pytest.raises(ValueError, match="give it one column"):
        overlaps(rows_of("a")[:, None], rows_of("a"))
