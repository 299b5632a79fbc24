"""A configuration: composed from conf/, refused where it is more than plain values, shown without secrets.

It is not code: it may come from a stranger, and names only what ALLOWED lists.
"""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader, set_parsing_settings
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parent.parent / "conf"
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
read_yaml = get_loader("yaml")  # jsonargparse's own


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
            raise ValueError(not_allowed(value, key))


def not_allowed(name: str, key: str = "") -> str:
    """What to say of a name that may not be imported."""
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
