"""Promises of the nouns: what counts as equal content, and what is refused."""

import pytest

from datamodules.record import to_record
from datamodules.sample import Example, Item, Part, content_id_of_label, key_of, media_item, text_item


def test_equal_text_has_equal_content_whatever_its_spacing_or_unicode_form():
    assert text_item("caf\u00e9  au\nlait").content_id == text_item(" cafe\u0301 au lait").content_id
    assert text_item("Cat").content_id != text_item("cat").content_id


def test_code_counts_letter_by_letter():
    assert text_item("if x:\n  y", kind="code").content_id != text_item("if x:\n y", kind="code").content_id


def test_kind_title_order_and_part_borders_make_a_difference():
    one, two = Part("text", "ab"), Part("text", "c")
    ids = {
        text_item("abc").content_id,
        text_item("abc", title="t").content_id,
        Item((one, two)).content_id,
        Item((two, one)).content_id,
        Item((Part("text", "a"), Part("text", "bc"))).content_id,
        media_item("image", b"abc", "png").content_id,
        media_item("page", b"abc", "png").content_id,
    }
    assert len(ids) == 7


def test_ids_are_stable_over_processes():
    assert text_item("polyphony").content_id == int.from_bytes(bytes.fromhex("aad8329f8ac12240"), "little", signed=True)


def test_a_label_is_not_equal_to_the_text_that_spells_it():
    assert content_id_of_label("zero") != text_item("zero").content_id


def test_a_mixed_item_says_so():
    assert Item((Part("text", "a"), Part("image", b"x", "png"))).modality == "mixed"
    assert media_item("audio", b"x", "ogg").modality == "audio"


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "a\nb"])
def test_keys_that_a_tar_would_split_are_refused(key):
    with pytest.raises(ValueError, match="bad example key"):
        to_record(Example(key, text_item("x")))
    assert not set(key_of(key)) & set("./ \n")


def test_parts_of_the_wrong_type_are_refused():
    with pytest.raises(ValueError, match="unknown kind"):
        Part("smell", b"x")
    with pytest.raises(ValueError, match="needs bytes"):
        Part("image", "not bytes", "png")
    with pytest.raises(ValueError, match="at least one part"):
        Item(())
    with pytest.raises(ValueError, match="neither a query nor a target"):
        Example("a")
