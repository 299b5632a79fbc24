"""One stage: compose conf/<stage>.yaml with its overrides, refuse what does not fit, run it.

    python train.py conf=finetune trainer.max_steps=10
    python train.py fit --config conf/finetune.yaml --trainer.max_steps=10

are the same run. `python train.py` lists the stages, `python train.py conf=finetune --help` a stage's keys.
`run:` in a configuration names what runs: a LightningModule (trained with `datamodules.training.TrainingData`) or a function.
"""

import importlib
import importlib.metadata
import inspect
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parent / "conf"
ALLOWED = ("lightning.pytorch.", "lightning_modules.", "datamodules.")  # what a configuration may name to be imported


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    _refuse_shadowed_kernels()
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
    files = (path for path in CONF.rglob("*.yaml") if any(line.startswith("run:") for line in path.read_text().splitlines()))
    return sorted(str(path.relative_to(CONF).with_suffix("")) for path in files)


def compose(conf: Path, overrides: list[str], *, resolve: bool = True) -> dict[str, Any]:
    """A configuration with its includes below it and the overrides on top, interpolations resolved, as plain containers.

    Raises:
        ValueError: A file is missing or no YAML mapping, a value still has to be given, or a class is not allowed.
    """
    try:
        merged = OmegaConf.merge(_with_includes(conf, ()), OmegaConf.from_dotlist(overrides))
        missing = OmegaConf.missing_keys(merged) if resolve else ()
        if missing:
            raise ValueError(f"{conf.name} needs a value for {', '.join(sorted(missing))}; add key=value to the command")
        config = OmegaConf.to_container(merged, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ValueError(f"{conf}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, dict)
    _check_class_paths(config)
    return {str(key): value for key, value in config.items()}


def _with_includes(path: Path, above: tuple[Path, ...]) -> DictConfig:
    if path in above or not path.is_file():
        raise ValueError(f"{above[-1] if above else path} includes {path}, which {'includes it' if path in above else 'does not exist'}")
    try:
        own = OmegaConf.load(path)
    except Exception as error:  # YAML's own errors name line and column
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, DictConfig):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    included = own.pop("include", [])
    merged = OmegaConf.merge(*(_with_includes(CONF / f"{name}.yaml", (*above, path)) for name in included), own)
    assert isinstance(merged, DictConfig)
    return merged


def _check_class_paths(value: Any) -> None:
    """Configuration is not code: what it names to be imported must begin with an allowed prefix."""
    if isinstance(value, dict):
        named = value.get("class_path")
        if named is not None and not str(named).startswith(ALLOWED):
            raise ValueError(f"class_path {named!r} is not allowed; it must begin with one of {', '.join(ALLOWED)}")
        value = value.values()
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        for inner in value:
            _check_class_paths(inner)


def named_object(name: Any, conf: Path) -> Any:
    """What `run:` names: a LightningModule class or a function of this project."""
    module, _, attribute = str(name).rpartition(".")
    if not module.startswith(("lightning_modules.", "datamodules.")):
        raise ValueError(f"{conf}: `run` is {name!r}; it must name a class or function of lightning_modules or datamodules")
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None:
        raise ValueError(f"{conf}: `run` is {name!r}, but {module} has no {attribute}")
    return found


def fit(stage: type, config: dict[str, Any], wants_help: bool) -> None:
    """Train a stage through the Lightning CLI, which refuses unknown keys and wrong types at every depth."""
    from lightning.pytorch.cli import LightningCLI

    from datamodules.training import TrainingData

    arguments: Any = ["fit", "--help"] if wants_help else {"subcommand": "fit", "fit": config}
    if not wants_help:
        _keep(config)
    LightningCLI(stage, TrainingData, args=arguments, save_config_callback=None, parser_kwargs=_parser_settings(), trainer_defaults=None)


def call(function: Any, config: dict[str, Any], wants_help: bool) -> None:
    """Call a function stage with its arguments from the configuration."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**_parser_settings())
    parser.add_function_arguments(function)
    if wants_help:
        parser.parse_args(["--help"])
    function(**parser.instantiate(parser.parse_object(config)).as_dict())


def _keep(config: dict[str, Any]) -> None:
    """Write the resolved configuration beside the run's checkpoints."""
    run = Path((config.get("trainer") or {}).get("default_root_dir") or ".")
    run.mkdir(parents=True, exist_ok=True)
    beside = run / f".config.yaml.{os.getpid()}.partial"
    beside.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    beside.replace(run / "config.yaml")


def _parser_settings() -> dict[str, Any]:
    return {"exit_on_error": False}


def _refuse_shadowed_kernels() -> None:
    """transformers probes a distribution called `kernels`, which would meet ours."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ValueError(f"the package `kernels` {version} is installed and clashes with this project's kernels/; pip uninstall kernels")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, TypeError) as error:
        raise
