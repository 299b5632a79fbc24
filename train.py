"""One stage: compose conf/<stage>.yaml with its overrides, refuse what does not fit, run it.

    python train.py conf=finetune trainer.max_steps=10
    python train.py fit --config conf/finetune.yaml --trainer.max_steps=10

are the same run. `python train.py` lists the stages, `python train.py conf=finetune --help` a stage's keys.
`run:` in a configuration names what runs: a LightningModule (trained with `datamodules.training.TrainingData`) or a function.
A configuration is not code: it may come from a stranger, and names only what ALLOWED lists.
"""

import errno
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_dumper, set_loader, set_parsing_settings
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parent / "conf"
CLASS_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*\.[A-Z]\w*")
ALLOWED = (  # what a configuration may name to be imported, and where Lightning defines what it exports there
    *(f"lightning.pytorch.{kind}." for kind in ("callbacks", "loggers", "plugins", "profilers", "strategies")),
    *("lightning.fabric.plugins.environments.", "lightning_modules.", "datamodules."),
)
REFUSED = ("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")  # take functions
MAX_CHARACTERS, MAX_SCALAR, MAX_VALUES, MAX_DEPTH = 2**20, 2**14, 10_000, 32  # our choice; none of ours has 1,000 values
NAME = r"(?:0|[1-9]\d*|[a-zA-Z_/@][\w/@+-]*)"  # of a key, or the place in a list, written in one way only
REFERENCE = re.compile(rf"\$\{{({NAME}(?:\.{NAME})*)\}}", re.ASCII)  # the only interpolation: no resolver is called
SECRET = re.compile(r"(?:^|[\W_])(?:token|secret|password|credentials?|(?:api|access|private)_key)(?:$|[\W_])", re.IGNORECASE)
ENVIRONMENT = {  # what is refused of it
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "torch would run the code that a checkpoint holds",
    "GOPEN_REWRITE": "webdataset would open other files or commands than it is told to",
    "USE_AIS_FOR": "webdataset would run a command to read",
    "JSONARGPARSE_DEFAULT_ENV": "keys would come from the environment, unchecked",
}
read_yaml = get_loader("yaml")  # jsonargparse's own


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    _refuse_shadowed_kernels()
    _refuse_environment()
    conf, overrides, wants_help = parse_command_line(arguments)
    if conf is None:
        print(__doc__, "\nStages:", ", ".join(stages()))
        return
    config = compose(conf, overrides, resolve=not wants_help)
    target = named_object(config.pop("run", None), conf)
    if inspect.isclass(target):
        fit(target, config, wants_help)
    else:
        call(target, config, wants_help)


def parse_command_line(arguments: list[str]) -> tuple[Path | None, list[str], bool]:
    """Configuration file, overrides as `key=value`, and whether help is wanted, from either form of the command."""
    words = [word for word in arguments if word not in ("-h", "--help")]
    wants_help = len(words) < len(arguments)
    if words and words[0] == "fit":
        words = words[1:]
    conf, overrides = None, []
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and not equals:
            if not words:
                raise ValueError(f"{word} needs a value")
            value = words.pop(0)
        elif not equals:
            raise ValueError(f"{word!r} is no key=value; the form is: python train.py conf=<stage> key=value ..")
        if name == "conf":
            conf = CONF / f"{value}.yaml"
            if not conf.is_file():
                raise ValueError(f"unknown stage {value!r}; the stages are: {', '.join(stages())}")
        elif name == "config" and word.startswith("--"):
            conf = Path(value)
            if not conf.is_file():
                raise ValueError(f"no configuration file {value}; the stages in {CONF}: {', '.join(stages())}")
        else:
            overrides.append(f"{name}={value}")
    if conf is None and overrides:
        raise ValueError(f"which stage? Add conf=<stage>; the stages are: {', '.join(stages())}")
    return conf, overrides, wants_help


def stages() -> list[str]:
    """Configurations that say what runs."""
    return sorted(
        str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml") if "run" in _with_includes(path, ())
    )


def compose(conf: Path, overrides: list[str], *, resolve: bool = True) -> dict[str, Any]:
    """A configuration with its includes below it and the overrides on top, interpolations resolved, as plain containers.

    Raises:
        ValueError: A file is missing or no YAML mapping, a value still has to be given, or a class is not allowed.
    """
    try:
        merged = _with_includes(conf, ())
        for override in overrides:
            name, _, value = override.partition("=")
            if not re.fullmatch(r"[\w/@+-]+(\.[\w/@+-]+)*", name) or name.count(".") >= MAX_DEPTH:
                raise ValueError(f"{override[:99]!r} names no key; the form is key.of.a.key=value, of at most {MAX_DEPTH} keys")
            parsed = _from_yaml(value, repr(override[:99]), lambda text: OmegaConf.from_dotlist([f"value={text}"])["value"])
            OmegaConf.update(merged, name, parsed, merge=False)
        _check_references(OmegaConf.to_container(merged), conf)
        missing = OmegaConf.missing_keys(merged) if resolve else ()
        if missing:
            raise ValueError(f"{conf} needs a value for {', '.join(sorted(missing))}; add key=value to the command")
        config = OmegaConf.to_container(merged, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ValueError(f"{conf}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, dict)
    _check_class_paths(config)
    _check_strings(config)
    if "config" in config:
        raise ValueError(f"{conf}: the key `config` is not accepted; `include` names further files")
    return {str(key): value for key, value in config.items()}


def _with_includes(path: Path, above: tuple[Path, ...]) -> DictConfig:
    if path in above or not path.is_file():
        raise ValueError(
            f"{above[-1] if above else path} includes {path}, which {'includes it' if path in above else 'does not exist'}"
        )
    with path.open("rb") as file:
        own = _from_yaml(file.read(MAX_CHARACTERS + 1), str(path), lambda text: OmegaConf.load(io.StringIO(text)))
    if not isinstance(own, DictConfig):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    _check_references(OmegaConf.to_container(own), path)
    names = own.pop("include", [])
    if not isinstance(names, list | ListConfig) or not all(re.fullmatch(r"\w+(/\w+)*", str(name)) for name in names):
        raise ValueError(f"{path}: `include` must be a list of names below conf/, without .yaml, but is {names}")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: `include` names a file more than once: {names}")
    merged = OmegaConf.merge(*(_with_includes(CONF / f"{name}.yaml", (*above, path)) for name in names), own)
    assert isinstance(merged, DictConfig)
    return merged


def _from_yaml(data: str | bytes, where: str, build: Callable[[str], Any]) -> Any:
    try:
        text = data if isinstance(data, str) else data.decode()
        _check_yaml(text)
        return build(text)
    except Exception as error:  # YAML's own errors name line and column
        raise ValueError(f"{where} is no YAML that is read here: {' '.join(str(error).split())}") from error


def _check_yaml(text: str, *, tags: bool = False) -> None:
    """Raises ValueError, before anything is built, for more than bounded mappings, lists, values and plain references."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
    values = depth = 0
    before = ""
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        values += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        scalar = event.value if isinstance(event, yaml.ScalarEvent) else ""
        if values > MAX_VALUES or depth > MAX_DEPTH or len(scalar) > MAX_SCALAR:
            raise ValueError(f"it has more than {MAX_VALUES} values, {MAX_DEPTH} levels or {MAX_SCALAR} characters in a value")
        if depth and (getattr(event, "anchor", None) or (getattr(event, "tag", None) and not tags)):
            raise ValueError(f"line {event.start_mark.line + 1} has an alias (&, *) or a tag (!), which are not allowed")
        if "${" in REFERENCE.sub("", scalar):
            raise ValueError(
                f"{before[:99]}: {scalar[:99]!r} is no plain ${{key.of.a.key}}, the only form allowed".lstrip(": ")
            )
        before = scalar or before


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping or list, with its dotted key."""
    if not isinstance(value, dict | list):
        yield key, value
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not isinstance(name, str):
            raise ValueError(f"the key {name!r} of {key!r} is no text; put it in quotation marks")
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def _check_references(config: Any, conf: Path) -> None:
    """Follow every `${key}` as resolving it will, and refuse what makes too much or goes round in a ring."""
    leaves = list(_leaves(config))
    named: dict[str, list[Any]] = {}
    pending, work, key = [value for _, value in leaves], 0, ""
    while pending:
        value = str(pending.pop())
        for key in REFERENCE.findall(value):
            if key not in named:  # its values, or the reference that it leads through
                ends = f"{key}."
                named[key] = [v for name, v in leaves if f"{name}.".startswith(ends) or ends.startswith(f"{name}.")]
                work += len(leaves)
            pending += named[key]
        work += len(value) + 1
        if work > MAX_CHARACTERS:
            raise ValueError(f"{conf}: references such as ${{{key}}} go round in a ring or make too much text")


def _check_class_paths(config: Any) -> None:
    """Configuration is not code: what it names to be imported must begin with an allowed prefix.

    A string alone can name a class as `class_path` does (`trainer.logger=package.Logger`), so every dotted name ending in a
    class's capital letter is looked at. Whatever else a string can make jsonargparse import meets `limit_parser`.
    """
    for key, value in _leaves(config):
        is_class = CLASS_NAME.fullmatch(str(value)) or (key.endswith("class_path") and "." in str(value))
        if is_class and (not str(value).startswith(ALLOWED) or str(value).startswith(REFUSED)):
            raise ValueError(_not_allowed(value, key))


def _not_allowed(name: str, key: str = "") -> str:
    allowed = f"only what begins with {', '.join(ALLOWED)} is, without LambdaCallback"
    return f"{key}: {name!r} is not allowed to be imported; {allowed}".removeprefix(": ")


def _check_strings(config: Any) -> None:
    """The rules of `_check_yaml` for each string, which jsonargparse reads as YAML once more; most are none."""
    for key, value in _leaves(config):
        try:
            _check_yaml(value if isinstance(value, str) else "", tags=True)  # a tag is only text here
        except yaml.YAMLError:
            continue
        except ValueError as error:
            raise ValueError(f"{key} is a text that reads as YAML, but {error}") from error


def limit_parser() -> None:
    """Bound what jsonargparse makes of a string: any import, file, address or YAML, and a class where anything is accepted."""

    def read(text: str) -> Any:
        _check_yaml(text)
        value = read_yaml(text)
        _check_strings(value)
        return value

    set_parsing_settings(
        config_read_mode_fsspec_enabled=False,  # Lightning enables it when it is imported
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*", *REFUSED],
        import_path_allowlist=[prefix.rstrip(".") for prefix in ALLOWED],
    )
    set_loader("yaml", read, (yaml.YAMLError, ValueError))
    without_aliases: Any = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})  # a dump is read again
    set_dumper("yaml", lambda data: yaml.dump(data, Dumper=without_aliases, allow_unicode=True, sort_keys=False))


def without_secrets(value: Any) -> Any:
    """A configuration that can be shown: passwords, keys and tokens, also those within addresses, as <redacted>."""
    if isinstance(value, dict):  # a number or a boolean is a token's place or use, as in `class_token: false`
        hidden = {key for key in value if SECRET.search(key) and value[key] is not None}
        hidden -= {key for key in hidden if "token" in key.lower() and isinstance(value[key], bool | int | float)}
        return {key: "<redacted>" if key in hidden else without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    return re.sub(r"(\w://)[^/?#\s]+@", r"\1<redacted>@", value) if isinstance(value, str) else value


def named_object(name: Any, conf: Path) -> Any:
    """What `run:` names: a LightningModule class or a function of this project."""
    module, _, attribute = str(name).rpartition(".")
    if not module.startswith(("lightning_modules.", "datamodules.")):
        raise ValueError(f"{conf}: `run` is {name!r}; it must name a class or function of lightning_modules or datamodules")
    names = module.split(".")
    exists = all(map(str.isidentifier, names)) and Path(__file__).parent.joinpath(*names).with_suffix(".py").is_file()
    found = vars(importlib.import_module(module)).get(attribute) if exists else None
    if getattr(found, "__module__", None) != module:  # neither missing nor imported there
        raise ValueError(f"{conf}: `run` is {name!r}, but there is no such class or function")
    if not _is_stage(found, str(name)):
        raise ValueError(f"{conf}: `run` is {name!r}, which is neither a LightningModule nor named by a file below conf/")
    return found


def _is_stage(found: Any, name: str) -> bool:
    if inspect.isclass(found):
        from lightning.pytorch import LightningModule

        return issubclass(found, LightningModule)
    line = re.compile(rf"^run: {re.escape(name)}$", re.MULTILINE)
    return inspect.isfunction(found) and any(line.search(path.read_text()) for path in CONF.rglob("*.yaml"))


def fit(stage: type, config: dict[str, Any], wants_help: bool) -> None:
    """Train a stage through the Lightning CLI, which refuses unknown keys and wrong types at every depth."""
    from lightning.pytorch.cli import LightningCLI

    from datamodules.files import replace_file
    from datamodules.training import TrainingData
    from lightning_modules.checkpoints import FOLDER, newest

    class StageCLI(LightningCLI):
        def before_fit(self) -> None:
            replace_file(Path(self.trainer.default_root_dir) / "config.yaml", resolved)

        def _parse_ckpt_path(self) -> None:
            """Take no configuration from a checkpoint: it would be unpickled, and could name what to import."""

    if config.get("ckpt_path") == "newest":
        folder = Path(config["trainer"]["default_root_dir"]) / FOLDER
        found = newest(folder)
        config["ckpt_path"] = None if found is None else str(found)
        print(f"going on from {found}" if found else f"no checkpoint in {folder}: starting anew", flush=True)
    limit_parser()
    resolved = OmegaConf.to_yaml(OmegaConf.create(without_secrets(config)))  # before the parser puts its own objects into it
    sys.argv = sys.argv[:1]  # everything is in `arguments`; the CLI warns when both are there
    arguments: Any = ["fit", "--help"] if wants_help else {"subcommand": "fit", "fit": config}
    cli = StageCLI(stage, TrainingData, args=arguments, save_config_callback=None, parser_kwargs={"exit_on_error": wants_help})
    guard = cli.model.guard
    if guard.storm is not None:
        raise ValueError(guard.storm)
    if guard.stopped_by is not None:
        raise StoppedError(guard.stopped_by, cli.trainer.global_step)


def call(function: Any, config: dict[str, Any], wants_help: bool) -> None:
    """Call a function stage with its arguments from the configuration."""
    limit_parser()
    parser = ArgumentParser(prog=f"train.py conf={function.__name__}", exit_on_error=wants_help)
    parser.add_function_arguments(function)
    if wants_help:
        parser.parse_args(["--help"])
    function(**parser.instantiate(parser.parse_object(config)).as_dict())


class StoppedError(Exception):
    """A signal ended the run at a batch's end, with a checkpoint."""

    def __init__(self, stop: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {stop.name} after step {step}, with a checkpoint; ckpt_path=newest goes on from it")
        self.code = 128 + stop


def _refuse_shadowed_kernels() -> None:
    """transformers probes a distribution called `kernels`, which would meet ours."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ValueError(
        f"the package `kernels` {version} is installed and clashes with this project's kernels/; pip uninstall kernels"
    )


def _refuse_environment() -> None:
    """Raises ValueError when a variable of the environment would undo what is refused of a configuration or a checkpoint."""
    for name, effect in ENVIRONMENT.items():
        if os.environ.get(name, "").lower() not in ("", "0", "n", "no", "false"):
            raise ValueError(f"{name} is set in the environment: {effect}; unset {name}")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # whatever `weights_only`, `plugins` or `strategy` say


def _quiet_libraries() -> None:
    """Keep what a person cannot act on off the screen."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # advertisements among others
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 uses what torch 2.15 deprecates
    warnings.filterwarnings("ignore", message=".*JSONARGPARSE_DEPRECATION.*")  # Lightning 2.6 calls what jsonargparse renamed
    warnings.filterwarnings("ignore", message=".*has `__len__` defined.*")  # workers share the steps, see StepStream
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # the DataModule keeps the step
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # two cores have no use for many


def clear_message(error: Exception) -> str:
    """What went wrong in one line, the parser's nested report joined, with the keys that would have been accepted."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error}); free some space or choose another folder. Nothing half-written was left"
    text = str(error) or repr(error)
    if "Traceback" in text:  # from a loader's worker: the error itself is the last line
        text = text.strip().splitlines()[-1].partition(": ")[2]
    denied = re.search(r"Importing '([\w.]+)' is not allowed", text)
    if denied:  # by `limit_parser`, told among what every type of the key made of it
        return _not_allowed(denied[1])
    noise = ("Given value", "Subtypes:", "Errors:", "Does not validate", "- Expected a <class 'NoneType'>")
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if not line.strip().startswith(noise)]
    classes = [
        line.partition("class_path ")[2].strip("':") for line in lines if line.startswith("Problem with given class_path")
    ]
    message = " ".join(line for line in lines if line and not line.startswith("Problem with given class_path"))
    if classes and "is not accepted" in message:
        module, _, name = classes[-1].rpartition(".")
        message += f"; accepted: {', '.join(inspect.signature(getattr(importlib.import_module(module), name)).parameters)}"
    elif "not accept" in message:
        message += "; --help lists what is accepted"
    return message.replace("Parser key ", "")


def run(arguments: list[str]) -> int | str:
    """The exit status of the command: 0, a sentence that says what is wrong, or 128 plus the signal that ended it."""
    _quiet_libraries()
    try:
        main(arguments)
    except KeyboardInterrupt:
        return "stopped by hand"
    except StoppedError as error:
        print(error, file=sys.stderr)
        return error.code
    except (ValueError, OSError, ArgumentError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        return f"error: {clear_message(error)}\n(TRACEBACK=1 in the environment shows where)"
    finally:
        for child in multiprocessing.active_children():  # a process stuck in a decoder would be waited for
            child.kill()
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
