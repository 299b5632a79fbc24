"""Configuration is not code: hostile YAML, overrides and variables are refused with one sentence, at once, and nothing runs."""

import os
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import fsspec
import lightning.pytorch.cli
import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from omegaconf import OmegaConf

import datamodules.training  # noqa: F401  imports are slow and would count among the seconds that a refusal may take
import lightning_modules.prefinetune  # noqa: F401
import train

ROOT = Path(__file__).parent.parent
PREFINETUNE = ["conf=quickstart/prefinetune", "data.root=nowhere"]
CALLBACKS = "lightning.pytorch.callbacks"
MAX_SECONDS, MAX_MIB = 5, 256
LETTERS = "abcdefghijklmnopqrstuvwxyz"
STRINGS_BOMB = "\n".join(f"{a}: ${{{b}}}${{{b}}}" for a, b in pairwise(LETTERS)) + "\nz: boom\n"
MAPPINGS_BOMB = STRINGS_BOMB.replace("}$", "}', y: '$").replace(": $", ": {x: '$").replace("}\n", "}'}\n")
ALIAS_BOMB = "[&a0 [x]" + "".join(f", &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12)) + "]"


@pytest.fixture(autouse=True)
def _as_a_fresh_process(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # train.main sets it: put back afterwards


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """Where the module `intruder`, which can be imported, leaves a file when it is; it must not be."""
    (tmp_path / "intruder").mkdir()
    trace = tmp_path / "ran"
    code = f"open({str(trace)!r}, 'w').close()\nclass Logger: ...\ndef run(*_, **__): ...\n"
    (tmp_path / "intruder" / "__init__.py").write_text(code)
    (tmp_path / "intruder" / "part.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return trace


def refused(arguments: list[str]) -> str:
    """The one sentence that train.py ends with, within bounds of time and memory."""
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises((ValueError, train.ArgumentError)) as caught:
        train.main(arguments)
    shown = train.clear_message(caught.value)
    assert time.perf_counter() - start < MAX_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MAX_MIB * 1024
    assert "\n" not in shown
    assert "Traceback" not in shown
    return shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"a: {ALIAS_BOMB}", "has an alias"),
        ("base: &base {a: 1}\nb: {<<: *base}", "has an alias"),
        ("a: !!python/object/apply:os.system ['touch ran']", "a tag (!)"),
        ("a: !!python/object/apply:pathlib.PosixPath [x]", "a tag (!)"),
        ("a: !env HOME", "a tag (!)"),
        ("a: " + "[" * 20_000, "32 levels"),
        ("a: " + "{a: " * 20_000, "32 levels"),
        ("a: [" + "1," * 20_000 + "]", "10000 values"),
        ("a: " + "x" * 20_000, "16384 characters in a value"),
        ("a: 1 # " + "x" * 2**20, "more than 1048576 characters"),
        ("a: 1\na: 2", "found duplicate key a"),
        ("a: {1: x, 1: y}", "the key 1 of 'a' is no text"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \ud800", "can't decode"),
        ("a: 1" + ":59" * 5_000, "limit (4300 digits)"),
        ("include: [../../secrets]", "`include` must be a list of names below conf/"),
        ("include: [/etc/hosts]", "`include` must be a list of names below conf/"),
        ("include: ['${x}']\nx: ../y", "`include` must be a list of names below conf/"),
        ("include: [world, world]", "names a file more than once"),
        ("root: ${oc.env:HOME}", "root: '${oc.env:HOME}' is no plain ${key.of.a.key}"),
        ("a: {home: '${oc.env:HOME}'}", "home: '${oc.env:HOME}' is no plain"),
        ("a: '${oc.coerce:intruder.Logger,1}'", "a: '${oc.coerce:intruder.Logger,1}' is no plain"),
        ("a: ${oc.decode:x}", "is no plain"),
        ("a: ${oc.create:x}", "is no plain"),
        ("a: ${oc.select:b}\nb: 1", "is no plain"),
        ("a: ${oc.dict.keys:b}\nb: {c: 1}", "is no plain"),
        ("a: ${${b}}\nb: a", "is no plain"),
        ("a: '" + "${" * 4_000 + "}" * 4_000 + "'", "is no plain"),
        (STRINGS_BOMB, "go round in a ring or make too much text"),
        (MAPPINGS_BOMB, "go round in a ring or make too much text"),
        (f"include: ['${{a}}']\n{STRINGS_BOMB}", "go round in a ring or make too much text"),
        (
            f"include: [finetune]\nmodel: {{init_from: '${{a}}'}}\ndata: {{init_from: {{x: 1}}}}\n{STRINGS_BOMB}",
            "make too much",
        ),
        ("a: ${b}\nb: ${a}", "references such as ${a} go round"),
        ("a: {x: '${a}'}", "references such as ${a} go round"),
        ("a: ${nothing}", "Interpolation key 'nothing' not found"),
        ("config: other.yaml", "the key `config` is not accepted"),
        ("run: intruder.run", "must name a class or function of lightning_modules or datamodules"),
    ],
)
def test_a_hostile_file_is_refused(content, message, tmp_path, ran):
    file = tmp_path / "hostile.yaml"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert message in refused(["fit", "--config", str(file)])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=${oc.env:HOME}", "'data.root=${oc.env:HOME}' is no YAML that is read here"),
        (f"data.tasks={ALIAS_BOMB}", "has an alias"),
        (f"trainer.logger='{ALIAS_BOMB}'", "trainer.logger is a text that reads as YAML, but line 1 has an alias"),
        (f"trainer.logger='{'[' * 8_000}'", "trainer.logger is a text that reads as YAML, but it has more than"),
        ("data.root=!!python/object/apply:pathlib.PosixPath [x]", "a tag (!)"),
        (".".join(LETTERS * 2) + "=1", "names no key"),
        ("[=1", "names no key"),
        ("data.${a}=1", "names no key"),
        ("data.root[0]=1", "names no key"),
        ("model.init_from=${a}${a}", "Interpolation key 'a' not found"),
    ],
)
def test_a_hostile_override_is_refused(override, message):
    assert message in refused([*PREFINETUNE, override])


@pytest.mark.parametrize(
    "override",
    [
        "trainer.logger=intruder.Logger",
        "trainer.logger=intruder.run",
        "trainer.logger=intruder.part.run",
        "trainer.logger.0.class_path=intruder.Logger",
        "trainer.logger.0.class_path=intruder.run",
        "trainer.logger='{class_path: intruder.run}'",
        "trainer.logger=SUBCONFIG",
        "trainer.callbacks=[intruder.run]",
        "trainer.callbacks+=intruder.run",
        "--trainer.callbacks+=intruder.Logger",
        f"trainer.callbacks=[{{class_path: {CALLBACKS}.EarlyStopping, init_args: {{monitor: {{class_path: intruder.run}}}}}}]",
        "trainer.callbacks=[{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 1, avg_fn: intruder.run}}]",
        f"trainer.callbacks=[{{class_path: {CALLBACKS}.LambdaCallback, init_args: {{on_fit_start: intruder.run}}}}]",
        "trainer.callbacks=[{class_path: LambdaCallback, init_args: {on_fit_start: intruder.run}}]",
        f"trainer.callbacks=[{CALLBACKS}.lambda_function.LambdaCallback]",
        f"trainer.callbacks=[{CALLBACKS}.model_checkpoint.os.system]",
        "trainer.plugins=intruder.run",
        "trainer.plugins=[lightning.pytorch.plugins.TorchCheckpointIO]",
        "optimizer=intruder.run",
        "lr_scheduler={class_path: intruder.run, init_args: {}}",
        "model.encoder.backbone.towers.image.arguments={norm_layer: {class_path: intruder.run}}",
        "model.encoder.backbone.towers.image={class_path: intruder.run, dict_kwargs: {a: 1}}",
    ],
)
def test_what_a_string_names_is_not_imported(override, ran, tmp_path):
    (tmp_path / "logger.yaml").write_text("class_path: intruder.run")
    shown = refused([*PREFINETUNE, override.replace("SUBCONFIG", str(tmp_path / "logger.yaml"))])
    assert "is not allowed to be imported; only what begins with lightning.pytorch.callbacks., " in shown
    assert not ran.exists()
    assert "intruder" not in sys.modules


def test_no_configuration_is_fetched_from_an_address():
    fsspec.filesystem("memory").pipe("/progress.yaml", b"[{class_path: RichProgressBar}]")
    assert "memory://progress.yaml either not accessible" in refused([*PREFINETUNE, "trainer.callbacks=memory://progress.yaml"])


@pytest.mark.parametrize(
    "override",
    [
        "trainer.callbacks=[RichProgressBar]",
        "trainer.logger.0.class_path=CSVLogger",
        "trainer.callbacks=[{class_path: GradientAccumulationScheduler, init_args: {scheduling: {'4': 2}}}]",
        "trainer.strategy=lightning.pytorch.strategies.DDPStrategy",
        "trainer.plugins=[lightning.pytorch.plugins.environments.SLURMEnvironment]",
        "data.root=code.json",  # also the name of a module
        "data.root=runs/os.Path",
        "model.encoder.backbone.towers.image.model=vit_tiny_patch16_224.augreg_in21k",
        "data.tasks.world/text-image.query_prompt='!note: Q&A *bold* | os.path: {text}'",
    ],
)
@pytest.mark.filterwarnings("ignore:.*`srun` command is available")  # where Slurm is, outside of its jobs
def test_ordinary_values_pass(override):
    assert "no shards in " in refused([*PREFINETUNE, override])


@pytest.mark.parametrize(
    "name",
    [
        "datamodules.shards.shutil.rmtree",
        "datamodules.shards.os.system",
        "datamodules.shards.replace_file",
        "datamodules.training.TrainingData",
        "datamodules.stream._decoded",
        "datamodules.sample.Part",
        "datamodules..shards.x",
        "datamodules.a/b.c",
        "lightning_modules.finetune.torch",
        "lightning_modules.stage.LightningModule",
        "intruder.run",
        "[intruder.run]",
    ],
)
def test_run_names_a_stage_and_nothing_else(name, ran):
    assert "`run` is " in refused([*PREFINETUNE, f"run={name}"])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "value", "effect"),
    [
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "Yes", "torch would run the code that a checkpoint holds"),
        ("GOPEN_REWRITE", "shards=pipe:ls", "webdataset would open other files or commands than it is told to"),
        ("USE_AIS_FOR", "gs:s3", "webdataset would run a command to read"),
        ("JSONARGPARSE_DEFAULT_ENV", "true", "keys would come from the environment, unchecked"),
    ],
)
def test_a_variable_that_undoes_a_check_is_refused(name, value, effect, monkeypatch):
    monkeypatch.setenv(name, value)
    assert refused([]) == f"{name} is set in the environment: {effect}; unset {name}"
    monkeypatch.setenv(name, "0")
    train.main([])


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_no_checkpoint_is_unpickled_whatever_the_configuration_says(tmp_path):
    torch.save({"state_dict": Hostile(tmp_path / "ran")}, tmp_path / "hostile.ckpt")
    train.main([])
    with pytest.raises(Exception, match="Weights only load failed"):  # `trainer.plugins=[] weights_only=false` comes down to it
        TorchCheckpointIO().load_checkpoint(tmp_path / "hostile.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_secrets_are_not_shown_and_ordinary_keys_are():
    secret = {
        "token": "hf_x",
        "hf_token": "x",
        "TOKEN_FILE": "x",
        "client-secret": "x",
        "password": 12345,
        "db_password": "x",
        "openai_api_key": "x",
        "aws_access_key": "x",
        "aws_access_key_id": "x",
        "credential": "x",
        "credentials": {"user": "a", "key": "b"},
    }
    shown = {
        "tokenizer": "runs/x",
        "max_text_tokens": 96,
        "tokens_per_view": {"image": 16},
        "class_token": False,
        "pad_token_id": 0,
        "token": None,
        "secretary": "a",
        "passwords_seen": 3,
        "monkey": "b",
        "vocab_size": 4,
    }
    assert set(train.without_secrets(secret).values()) == {"<redacted>"}
    assert train.without_secrets({"a": [{"b": secret}]})["a"][0]["b"]["hf_token"] == "<redacted>"
    assert train.without_secrets(shown) == shown
    urls = ["s3://me:pass@host/x", "https://ghp_x@github.com/a", "see https://a.b/c?d=e@f"]
    assert train.without_secrets(urls) == ["s3://<redacted>@host/x", "https://<redacted>@github.com/a", urls[2]]


def test_the_saved_configuration_holds_no_secret_and_all_else(tmp_path, monkeypatch):
    class Recorded:
        def __init__(self, *_, args, **__) -> None:
            seen.append(args["fit"])
            self.trainer = SimpleNamespace(default_root_dir=str(tmp_path), loggers=[])
            self.before_fit()

        def before_fit(self) -> None: ...

    seen: list[dict] = []
    monkeypatch.setattr(lightning.pytorch.cli, "LightningCLI", Recorded)
    train.main([*PREFINETUNE, "trainer.logger.0.init_args.api_key=abc123"])
    saved = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))
    assert seen[0]["trainer"]["logger"][0]["init_args"].pop("api_key") == "abc123"
    assert isinstance(saved, dict)
    assert saved["trainer"]["logger"][0]["init_args"].pop("api_key") == "<redacted>"
    assert saved == seen[0]


def test_the_command_line_refuses_in_one_sentence(tmp_path, ran):
    def run(*arguments: str, **variables: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **variables}
        done = subprocess.run(
            [sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stdout + done.stderr
        return done.stderr

    (tmp_path / "hostile.yaml").write_text(f"a: {ALIAS_BOMB}")
    assert run("fit", "--config", str(tmp_path / "hostile.yaml")).startswith("error: ")
    assert "'intruder.Logger' is not allowed" in run(*PREFINETUNE, "--trainer.logger+=intruder.Logger")
    assert "unset GOPEN_REWRITE" in run("conf=world", GOPEN_REWRITE="a=b")
    assert not ran.exists()
