"""One stage: compose conf/<stage>.yaml with its overrides, refuse what does not fit, run it.

    python train.py conf=finetune trainer.max_steps=10
    python train.py fit --config conf/finetune.yaml --trainer.max_steps=10

are the same run. `python train.py` lists the stages, `python train.py conf=finetune --help` a stage's keys.
`run:` in a configuration names what runs: a LightningModule (trained with `datamodules.training.TrainingData`) or a function.
"""

import errno
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf

from lightning_modules.cluster import join_step
from lightning_modules.configuration import CONF, compose, limit_parser, not_allowed, stages, without_secrets

ENVIRONMENT = {  # what is refused of it
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "torch would run the code that a checkpoint holds",
    "GOPEN_REWRITE": "webdataset would open other files or commands than it is told to",
    "USE_AIS_FOR": "webdataset would run a command to read",
    "JSONARGPARSE_DEFAULT_ENV": "keys would come from the environment, unchecked",
}
SHARED = ("lightning_modules.evaluate.evaluate",)  # functions whose processes share the work


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    _refuse_shadowed_kernels()
    _refuse_environment()
    join_step()
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


def fit(stage: Any, config: dict[str, Any], wants_help: bool) -> None:
    """Train a stage through the Lightning CLI, which refuses unknown keys and wrong types at every depth."""
    from lightning.pytorch.cli import LightningCLI

    from datamodules.files import replace_file
    from lightning_modules.checkpoints import FOLDER, newest
    from lightning_modules.loggers import spared

    class StageCLI(LightningCLI):
        def before_fit(self) -> None:
            replace_file(Path(self.trainer.default_root_dir) / "config.yaml", resolved)
            self.trainer.loggers = spared(self.trainer.loggers)

        def after_fit(self) -> None:
            guard = self.model.guard
            if guard.storm is not None:
                raise ValueError(guard.storm)
            if guard.stopped_by is not None and self.trainer.global_step < self.trainer.max_steps:
                raise StoppedError(guard.stopped_by, self.trainer.global_step)

        def _parse_ckpt_path(self) -> None:
            """Take no configuration from a checkpoint: it would be unpickled, and could name what to import."""

    if config.get("ckpt_path") == "newest":
        folder = Path(config.get("trainer", {}).get("default_root_dir") or ".") / FOLDER
        found = newest(folder)
        config["ckpt_path"] = None if found is None else str(found)
        print(f"going on from {found}" if found else f"no checkpoint in {folder}: starting anew", flush=True)
    limit_parser()
    resolved = OmegaConf.to_yaml(OmegaConf.create(without_secrets(config)))  # before the parser puts its own objects into it
    sys.argv = sys.argv[:1]  # everything is in `arguments`; the CLI warns when both are there
    arguments: Any = ["fit", "--help"] if wants_help else {"subcommand": "fit", "fit": config}
    StageCLI(stage, stage.data_class, args=arguments, save_config_callback=None, parser_kwargs={"exit_on_error": wants_help})


def call(function: Any, config: dict[str, Any], wants_help: bool) -> None:
    """Call a function stage with its arguments from the configuration."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and f"{function.__module__}.{function.__name__}" not in SHARED:
        raise ValueError(
            f"{function.__name__} is the work of one process, {size} were begun for it; take one task a job, or an array where "
            "it has array_index"
        )
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
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao 0.18, which transformers imports where it is
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 uses what torch 2.15 deprecates
    warnings.filterwarnings("ignore", message=".*JSONARGPARSE_DEPRECATION.*")  # Lightning 2.6 calls what jsonargparse renamed
    warnings.filterwarnings("ignore", message=".*has `__len__` defined.*")  # workers share the steps, see StepStream
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # the DataModule keeps the step
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # on a cluster, outside of its jobs
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
        return not_allowed(denied[1])
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
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
