"""Promises of transcription: text takes the place of sound, nothing else changes, and both halves are judged alike."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from samples import picture_bytes, sound_bytes
from tokenizers import pre_tokenizers

from datamodules.decode import decode_item
from datamodules.media.limits import DecodeLimits
from datamodules.recipes.pack import examples_of, splits_of
from datamodules.sample import Example, Item, Part, media_item, text_item
from datamodules.shards import Split, write_split
from datamodules.tasks import BenchmarkSpec, modalities_of
from lightning_modules.configuration import compose
from lightning_modules.judge import Judge
from lightning_modules.transcribe import NOTHING_SAID, name_of, transcribe, transcriber

T: Any = transformers  # whose constructors' types are not to the point here
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
PACK = ROOT.parent / "shared" / "data"
WHISPER = ("endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
WHISPER += ("notimestamps",)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a tokenizer of bytes and the special tokens, and weights that speak the letters from a to z."""
    folder = tmp_path_factory.mktemp("models") / "whisper"
    bytes_, times = sorted(pre_tokenizers.ByteLevel.alphabet()), [f"<|{number * 0.02:.2f}|>" for number in range(1501)]
    vocab = {token: number for number, token in enumerate([*bytes_, *(f"<|{name}|>" for name in WHISPER)])}
    tokenizer = T.WhisperTokenizer(vocab=vocab, merges=[], language="en", task="transcribe", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{name}|>" for name in WHISPER[1:]]})
    tokenizer.add_tokens([transformers.AddedToken(time, special=False) for time in times])
    end, start, *_, last = (vocab[f"<|{name}|>"] for name in WHISPER)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_target_positions": 64}
    sizes |= {"max_source_positions": 50}  # of a sound of one second
    ids = {"pad_token_id": end, "eos_token_id": end, "bos_token_id": end, "decoder_start_token_id": start}
    config = T.WhisperConfig(**sizes, **ids, vocab_size=len(tokenizer), suppress_tokens=None, begin_suppress_tokens=None)
    torch.manual_seed(1)
    model = T.WhisperForConditionalGeneration(config)
    letters = [vocab[letter] for letter in "abcdefghijklmnopqrstuvwxyz"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5)
            if name.endswith("embed_tokens.weight"):  # the output's too, where letters stand out
                parameter[[number for number in range(len(tokenizer)) if number not in letters]] *= 0.02
                parameter[letters] *= 4
    named = {"is_multilingual": True, "lang_to_id": {f"<|{name}|>": vocab[f"<|{name}|>"] for name in ("en", "de")}}
    named |= {"task_to_id": {name: vocab[f"<|{name}|>"] for name in ("translate", "transcribe")}}
    named |= {"no_timestamps_token_id": last, "prev_sot_token_id": vocab["<|startofprev|>"]}
    for name, value in {**named, "max_new_tokens": 8, "num_beams": 1, "_from_model_config": False}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    T.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "wav2vec2"
    folder.mkdir()
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghij"]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    T.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (20, 16), "conv_kernel": (20, 16), "feat_extract_norm": "layer"}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = T.Wav2Vec2Config(**sizes, **convolutions, **positions, vocab_size=len(letters), pad_token_id=0)
    model = T.Wav2Vec2ForCTC(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=2)
    model.save_pretrained(folder)
    T.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return str(folder)


def spoken(number: int, **more: Any) -> Example:
    sound = media_item("audio", sound_bytes(seconds=0.2 + 0.1 * number, pitch=300 + 90 * number), "wav")
    picture = media_item("image", picture_bytes(width=8, height=8, seed=number), "png")
    return Example(f"e{number}", sound, picture, meta={"transcript": f" said {number}\n", "speaker": "x"}, **more)


def read(folder: Path | str) -> list[Example]:
    split = Split(folder)
    return [split.read(position) for position in range(len(split))]


def words_of(examples: list[Example], column: str = "query") -> list[str]:
    items = [getattr(example, column) for example in examples]
    assert all([part.kind for part in item.parts] == ["text"] for item in items)
    return [item.parts[0].data for item in items]


@pytest.fixture
def speech(tmp_path: Path) -> str:
    write_split(tmp_path / "speech", [spoken(number, relevant={"d": 1.0}) for number in range(5)], about={"licence": "L"})
    return str(tmp_path / "speech")


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_a_model_writes_down_every_sound_and_changes_nothing_else(
    speech: str, tmp_path: Path, family: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    model = request.getfixturevalue(family)
    transcribe(speech, str(tmp_path / "out"), model=model, device="cpu", block_size=2)
    before, after = read(speech), read(tmp_path / "out")
    hear, name = transcriber(model, None, None, "cpu"), name_of(model, None)
    assert re.fullmatch(rf"{family}@[0-9a-f]{{16}}", name)
    for old, new in zip(before, after, strict=True):
        assert (old.key, old.target, old.relevant) == (new.key, new.target, new.relevant)
        assert old.meta is not None
        assert new.meta is not None
        assert new.meta == {**old.meta, "transcribed_by": name}
    assert words_of(after) == [hear(sound_of(example)) or NOTHING_SAID for example in before]
    assert len(set(words_of(after))) > 1
    about = Split(tmp_path / "out").manifest["about"]
    assert about["made_by"]["licence"] == "L"
    assert about["counts"]["records"] == about["counts"]["sounds"] == 5
    assert (
        f"written down by {name}; {about['counts']['empty transcripts']} of 5 transcripts are empty" in capsys.readouterr().out
    )


def sound_of(example: Example) -> Any:
    assert example.query is not None
    return decode_item(example.query, DecodeLimits()).parts[0].content


def test_a_long_sound_is_heard_to_its_end_and_a_language_can_be_named(whisper: str) -> None:
    noise = np.random.default_rng(0).normal(scale=0.1, size=4 * 16_000).astype(np.float32)
    hear = transcriber(whisper, None, "en", "cpu")
    assert len(hear(noise)) > len(hear(noise[:16_000])) > 0
    with pytest.raises(ValueError, match="Unsupported language: xx"):
        transcriber(whisper, None, "xx", "cpu")(noise[:16_000])


def test_words_that_are_known_need_no_model(speech: str, tmp_path: Path) -> None:
    transcribe(speech, str(tmp_path / "out"), from_meta="transcript")
    found = read(tmp_path / "out")
    assert words_of(found) == [f"said {number}" for number in range(5)]
    assert all(example.meta and example.meta["transcribed_by"] == "meta:transcript" for example in found)


def test_targets_and_sounds_among_other_parts_are_written_down(tmp_path: Path) -> None:
    sound, picture = Part("audio", sound_bytes(seconds=0.1), "wav"), Part("image", picture_bytes(width=8, height=8), "png")
    mixed = Item((Part("text", "before"), sound, picture), "a title")
    write_split(tmp_path / "mixed", [Example("m", text_item("q"), mixed, meta={"words": "heard"})])
    transcribe(str(tmp_path / "mixed"), str(tmp_path / "out"), from_meta="words", column="target")
    (found,) = read(tmp_path / "out")
    assert found.query == text_item("q")
    assert found.target == Item((Part("text", "before"), Part("text", "heard"), picture), "a title")


def test_an_empty_transcript_stays_as_a_text_that_says_nothing_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = [spoken(0), Example("silent", spoken(1).query, spoken(1).target, meta={"transcript": " "})]
    write_split(tmp_path / "speech", examples)
    transcribe(str(tmp_path / "speech"), str(tmp_path / "out"), from_meta="transcript")
    assert words_of(read(tmp_path / "out")) == ["said 0", "."]
    assert Split(tmp_path / "out").manifest["about"]["counts"]["empty transcripts"] == 1
    assert "1 of 2 transcripts are empty and became '.'" in capsys.readouterr().out


def test_a_sound_that_does_not_decode_is_set_aside(tmp_path: Path, wav2vec2: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Example("bad", media_item("audio", b"RIFF????", "wav"), text_item("t"))
    write_split(tmp_path / "speech", [spoken(0), bad, spoken(1)])
    transcribe(str(tmp_path / "speech"), str(tmp_path / "out"), model=wav2vec2, device="cpu")
    assert [example.key for example in read(tmp_path / "out")] == ["e0", "e1"]
    assert Split(tmp_path / "out").manifest["about"]["aside"] == {"does not decode": 1}
    assert "1 set aside" in capsys.readouterr().out


def test_a_second_run_hears_nothing_again_and_a_killed_one_goes_on(speech: str, tmp_path: Path, whisper: str) -> None:
    out = tmp_path / "out"
    transcribe(speech, str(out), model=whisper, device="cpu", block_size=2)
    whole = {path.name: (path.stat().st_ctime_ns, path.read_bytes()) for path in out.iterdir() if path.is_file()}
    transcribe(speech, str(out), model=whisper, device="cpu", block_size=2)
    kept = {path.name: (path.stat().st_ctime_ns, path.read_bytes()) for path in out.iterdir() if path.is_file()}
    assert {name: found for name, found in kept.items() if name[0] != "."} == {
        name: found for name, found in whole.items() if name[0] != "."
    }
    (out / "manifest.json").unlink()
    (out / "000001.tar").unlink()
    transcribe(speech, str(out), model=whisper, device="cpu", block_size=2)
    assert (out / "000000.tar").stat().st_ctime_ns == whole["000000.tar"][0]
    assert (out / "000001.tar").read_bytes() == whole["000001.tar"][1]
    assert len(Split(out)) == 5
    with pytest.raises(ValueError, match="begun otherwise: model was"):
        transcribe(speech, str(out), from_meta="transcript", block_size=2)


def test_what_cannot_be_is_refused(speech: str, tmp_path: Path, whisper: str) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="model is None and from_meta None; give one of them"):
        transcribe(speech, out)
    with pytest.raises(ValueError, match="give one of them"):
        transcribe(speech, out, model=whisper, from_meta="transcript")
    with pytest.raises(ValueError, match="'e0' has no text 'words' in its meta; its fields: transcript, speaker"):
        transcribe(speech, out, from_meta="words")
    with pytest.raises(ValueError, match="'e0' has no sound in its target"):
        transcribe(speech, str(tmp_path / "other"), from_meta="transcript", column="target")


def test_models_that_hear_nothing_are_refused(speech: str, tmp_path: Path, whisper: str, wav2vec2: str) -> None:
    bert = tmp_path / "bert"
    T.BertModel(T.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(bert)
    with pytest.raises(ValueError, match=r"no model of speech recognition can be read from .*a bert does not recognise speech"):
        transcribe(speech, str(tmp_path / "out"), model=str(bert), device="cpu")
    headless = tmp_path / "headless"
    T.Wav2Vec2Model.from_pretrained(wav2vec2).save_pretrained(headless)
    with pytest.raises(ValueError, match=r"its weights lack lm_head\.bias, lm_head\.weight"):
        transcriber(str(headless), None, None, "cpu")
    with pytest.raises(ValueError, match="make model a folder with"):
        transcriber(str(tmp_path / "nowhere"), None, None, "cpu")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in Path(whisper).iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(Path(whisper) / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no model of speech recognition can be read"):
        transcriber(str(pickled), None, None, "cpu")


def test_native_audio_and_the_cascade_are_judged_by_the_same_metric(
    speech: str, tmp_path: Path, whisper: str, tiny_encoder: Any, processor: Any
) -> None:
    write_split(tmp_path / "documents", [Example("d", target=text_item("yes")), Example("f", target=text_item("no"))])
    transcribe(speech, str(tmp_path / "asr"), model=whisper, device="cpu")
    transcribe(speech, str(tmp_path / "given"), from_meta="transcript")
    benchmarks = {
        f"{name}/{modality}-text": BenchmarkSpec("retrieval", split, corpus="documents", metric="mrr@10")
        for name, split, modality in [("native", "speech", "audio"), ("asr", "asr", "text"), ("given", "given", "text")]
    }
    rows = Judge(tiny_encoder, processor, tmp_path, batch_size=4, num_workers=0, device="cpu").results(benchmarks).rows
    judged = {row["benchmark"]: row["num_candidates"] for row in rows if row["metric"] == "mrr@10"}
    assert judged == dict.fromkeys(benchmarks, 2)


@pytest.mark.skipif(not (PACK / "tasks.json").is_file(), reason=f"the data pack is not at {PACK}")
def test_the_speech_benchmarks_run_on_the_data_pack(tmp_path: Path, tiny_encoder: Any, processor: Any) -> None:
    for split in splits_of(PACK, ["image/flickr8k_1k", "audio/ljspeech"]):
        if split.split in ("speech-test", "test"):
            write_split(tmp_path / split.set / split.split, examples_of(split))
    for line in (ROOT / "conf/benchmarks/speech.yaml").read_text().splitlines():
        if line.startswith("#   python"):
            words = line.replace("shards/pack", str(tmp_path)).removeprefix("#   python train.py conf=transcribe ").split()
            config = compose(ROOT / "conf/transcribe.yaml", words)
            config.pop("run")
            transcribe(**config)
    specs = compose(ROOT / "conf/benchmarks/speech.yaml", [])["benchmarks"]
    benchmarks = {name: BenchmarkSpec(**spec) for name, spec in specs.items()}
    for name, spec in benchmarks.items():
        example = Split(tmp_path / spec.shards).read(0)
        found = [item.modality for item in (example.query, example.target) if item is not None]
        assert list(modalities_of(name)) == (found[::-1] if spec.reverse else found)
    small = {name: spec for name, spec in benchmarks.items() if name == "flickr_given/text-image"}
    rows = Judge(tiny_encoder, processor, tmp_path, batch_size=64, num_workers=0, device="cpu").results(small, [16]).rows
    assert rows[0]["num_queries"] == 125
