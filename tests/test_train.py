"""Promises of train.py: both command forms are one run, wrong keys are refused by name, a stopped run goes on exactly."""

import csv
import errno
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from samples import TINY

import train
from lightning_modules import configuration
from lightning_modules.encoder.checkpoint import read_provenance, read_weights

ROOT = Path(__file__).parent.parent


def run(*arguments: str, ok: bool = True) -> str:
    """train.py in a process of its own, as a user runs it; what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def tiny_prefinetune(world: Path, out: Path, *more: str) -> list[str]:
    return ["conf=quickstart/prefinetune", f"data.root={world}", f"trainer.default_root_dir={out}", *TINY, *more]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A run of 14 steps with a checkpoint after the sixth."""
    out = tmp_path_factory.mktemp("runs") / "prefinetune"
    every = ["trainer.callbacks.1.init_args.every_steps=6", "model.snapshot_every=6"]
    printed = run(*tiny_prefinetune(world, out, "trainer.max_steps=14", *every))
    (out / "printed.txt").write_text(printed)
    return out


def test_a_run_leaves_its_encoder_configuration_and_curves(trained):
    assert read_provenance(trained / "encoder")["steps"] == 14
    assert [read_provenance(trained / f"encoder-{step:06d}")["steps"] for step in (6, 12)] == [6, 12]
    config = OmegaConf.load(trained / "config.yaml")
    assert config.trainer.max_steps == 14
    assert config.data.processor.tokens_per_view == config.model.encoder.backbone.tokens
    with next((trained / "logs").glob("version_*/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    for task in ("world/text-image", "world/text-audio", "world/mixed-image"):
        for name in ("loss", "loss@4", "loss@16", "positive_cosine", "masked_share", "padding", "pairwise_cosine", "collapsed"):
            assert any(row[f"train/{task}/{name}"] for row in rows), f"{task}/{name}"
    assert list((trained / "tensorboard").rglob("events*"))
    assert (trained / "printed.txt").read_text().count("first loss ") == 1


def test_a_stopped_run_goes_on_exactly(trained, world, tmp_path):
    checkpoint = trained / "checkpoints" / "step=00000006.ckpt"
    run(*tiny_prefinetune(world, tmp_path / "again", "trainer.max_steps=14", f"ckpt_path={checkpoint}"))
    straight, resumed = read_weights(trained / "encoder"), read_weights(tmp_path / "again" / "encoder")
    assert all((straight[name] == resumed[name]).all() for name in straight)


def test_a_checkpoint_of_another_shape_or_of_garbage_is_refused(trained, world, tmp_path):
    checkpoint = trained / "checkpoints" / "step=00000006.ckpt"
    other = tiny_prefinetune(world, tmp_path / "x", "model.encoder.embedding_dim=32", "model.encoder.prefixes=[4,32]")
    shown = run(*other, f"ckpt_path={checkpoint}", ok=False)
    assert "is of another shape: 1 tensors differ, among them projection.0.weight" in shown
    (tmp_path / "garbage.ckpt").write_bytes(b"no checkpoint")
    shown += run(*tiny_prefinetune(world, tmp_path / "y"), f"ckpt_path={tmp_path / 'garbage.ckpt'}", ok=False)
    assert "garbage.ckpt cannot be used: it is too short" in shown
    assert "Traceback" not in shown


def test_finetuning_goes_on_from_the_encoder_with_its_own_tokenizer(trained, world, tmp_path):
    sizes = [argument for argument in TINY if argument.startswith("data.tasks")]
    arguments = [f"model.init_from={trained / 'encoder'}", f"data.root={world}", "data.num_workers=0", "trainer.max_steps=3"]
    run("conf=quickstart/finetune", *arguments, *sizes, f"trainer.default_root_dir={tmp_path / 'ft'}")
    provenance = read_provenance(tmp_path / "ft" / "encoder")
    assert provenance["stage"] == "FineTune"
    assert provenance["parents"][0]["sha256"] == read_provenance(trained / "encoder")["sha256"]
    names = ["tokenizer.json", "processor.json"]
    assert all((tmp_path / "ft" / "encoder" / n).read_bytes() == (trained / "encoder" / n).read_bytes() for n in names)
    refused = run("conf=quickstart/finetune", *arguments, "model.prefixes=[4,64]", ok=False)
    assert "error: prefix 64 is wider than the embedding, which has 16 dimensions" in refused


def test_both_command_forms_are_the_same_run():
    short = ["conf=finetune", "trainer.max_steps=10", "data.root=shards", "model.init_from=runs/x"]
    long = [
        "fit",
        "--config",
        "conf/finetune.yaml",
        "--trainer.max_steps=10",
        "--data.root",
        "shards",
        "--model.init_from=runs/x",
    ]
    first, second = (train.parse_command_line(words) for words in (short, long))
    assert first[0] is not None
    assert second[0] is not None
    assert train.compose(first[0], first[1]) == train.compose((ROOT / second[0]), second[1])
    assert train.compose(first[0], first[1])["data"]["init_from"] == "runs/x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conf=finetun"], "unknown stage 'finetun'; the stages are: adapt, assemble, compare, embed, evaluate,"),
        (["fit", "--config", "conf/none.yaml"], "no configuration file conf/none.yaml"),
        (["conf=soup"], "needs a value for checkpoints"),
        (["conf=soup", "checkpoints=[a]", "chekpoints=[b]"], "'chekpoints' is not accepted"),
        (["trainer.max_steps=1"], "which stage? Add conf=<stage>"),
        (["conf=soup", "loose"], "'loose' is no key=value"),
        (["conf=quickstart/prefinetune", "trainer.max_stepz=1"], "trainer.max_stepz"),
        (
            ["conf=quickstart/prefinetune", "model.encoder.backbone.towers.image.foo=1"],
            "'foo' is not accepted; accepted: model,",
        ),
        (["conf=quickstart/prefinetune", "data.tasks.world/text-image.foo=1"], "'foo' is not accepted; accepted: shards,"),
        (
            ["conf=quickstart/prefinetune", "trainer.max_steps=many"],
            "\"trainer.max_steps\": Expected a <class 'int'>. Got value: many",
        ),
        (
            ["conf=quickstart/prefinetune", "trainer.logger.0.class_path=os.system"],
            "0.class_path: 'os.system' is not allowed",
        ),
        (
            ["conf=quickstart/prefinetune", "trainer.logger=evil.Logger"],
            "trainer.logger: 'evil.Logger' is not allowed",
        ),
        (["conf=quickstart/prefinetune", "data.root=${oc.env:HOME}"], "oc.env"),
        (["conf=quickstart/prefinetune", "model.prefixes=[4"], "is no YAML that is read here"),
        (["conf=quickstart/prefinetune", "run=lightning_modules.foo.Bar"], "there is no such class or function"),
        (["conf=quickstart/prefinetune", "data.tasks={}", "data.root=x"], "no task has a rate above 0"),
        (["conf=quickstart/prefinetune", "run=os.system"], "must name a class or function of"),
        (["conf=quickstart/prefinetune", "data.root=nowhere"], "no shards in nowhere/world/"),
        (["conf=evaluate", "checkpoint=nowhere", "root=x", "out=y"], "no encoder in nowhere"),
        (["conf=prepare", "source=nowhere"], "nowhere"),
    ],
)
def test_what_a_person_gets_wrong_gets_one_sentence(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises((ValueError, OSError, train.ArgumentError)) as caught:
        train.main(arguments)
    shown = train.clear_message(caught.value)
    assert message in shown
    assert "\n" not in shown


def test_a_full_disk_is_called_so():
    shown = train.clear_message(OSError(errno.ENOSPC, "No space left on device"))
    assert shown.startswith("the disk is full")


def test_errors_end_with_a_sentence_and_no_traceback():
    shown = run("conf=soup", "checkpoints=[nowhere]", ok=False)
    assert "error: no encoder in nowhere" in shown
    assert "Traceback" not in shown


def test_a_workers_error_is_shown_without_its_traceback(world, tmp_path):
    split = tmp_path / "world" / "text-image" / "train"
    split.mkdir(parents=True)
    for file in (world / "world" / "text-image" / "train").iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".tar":
            with tarfile.open(file) as tar:
                second = tar.getmembers()[2].offset  # the first example, which the tokenizer is trained on, stays whole
            data[second::50] = bytes(len(data[second::50]))
        (split / file.name).write_bytes(data)
    off = [
        f"data.tasks.world/{n}.rate=0"
        for n in ("text-page", "text-audio", "text-video", "text-code", "text-text", "mixed-image")
    ]
    more = ["trainer.max_steps=30", *off, "data.max_tokenizer_texts=2", "data.num_workers=1"]
    shown = run(*tiny_prefinetune(tmp_path, tmp_path / "out", *more), ok=False)
    assert "100 examples in a row cannot be used" in shown
    assert "is damaged (its CRC-32 differs from the index)" in shown
    assert "Traceback" not in shown


def test_a_configuration_that_includes_itself_or_is_no_yaml_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "CONF", tmp_path)
    (tmp_path / "a.yaml").write_text("include: [b]\nrun: x")
    (tmp_path / "b.yaml").write_text("include: [a]")
    (tmp_path / "c.yaml").write_text("x: [1")
    (tmp_path / "d.yaml").write_text("include: [none]")
    for name, message in (("a", "includes it"), ("c", "is no YAML that is read here"), ("d", "does not exist")):
        with pytest.raises(ValueError, match=message):
            train.compose(tmp_path / f"{name}.yaml", [])


def test_every_command_of_the_readme_composes():
    lines = [line.split("#")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("python train.py conf=")]
    assert len(commands) >= 5
    for words in commands:
        conf, overrides, _ = train.parse_command_line(words)
        assert conf is not None
        assert "run" in train.compose(conf, overrides)


def test_every_stage_composes_and_no_key_is_left_over():
    for stage in train.stages():
        config = train.compose(ROOT / "conf" / f"{stage}.yaml", [], resolve=False)
        assert train.named_object(config["run"], Path(stage)) is not None


def test_a_package_called_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(train.importlib.metadata, "version", lambda name: "0.18.0")
    with pytest.raises(ValueError, match="pip uninstall kernels"):
        train.main([])
