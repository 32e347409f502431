"""Names for runs: the method, and what tells its runs apart."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from palimpsest.record.results import Run

Leaves = dict[str, Any]


def labels(runs: Sequence[Run]) -> list[str]:
    """One distinct label per run, e.g. `rome [variant=plain, layer=14]`.

    A label holds the values of `config.intervene` that differ between the runs of the same method,
    and the layer that was changed if it does; where these do not suffice, those of the whole
    configuration but `record`, and at last the run's id.
    """
    found: dict[int, str] = {}
    for method in sorted({run.method for run in runs}):
        places = [place for place, run in enumerate(runs) if run.method == method]
        group = [runs[place] for place in places]
        found |= zip(places, _group_labels(method, group), strict=True)
    return [found[place] for place in range(len(runs))]


def differences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """For each run, the settings that not all runs share: dotted path and value as text."""
    configs = [leaves(run.run.get("config", {})) for run in runs]
    varying = _varying(configs)
    return [_shown(config, varying) for config in configs]


def leaves(config: Any, prefix: str = "") -> Leaves:
    """A nested configuration as dotted paths and values, without Hydra's own keys (`_target_`)."""
    if not isinstance(config, Mapping):
        return {prefix: config} if prefix else {}
    found: Leaves = {}
    for key, value in config.items():
        if not str(key).startswith("_"):
            found |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _group_labels(method: str, runs: Sequence[Run]) -> list[str]:
    whole = [_settings(run) for run in runs]
    chosen = [_within(config, ("intervene.", "locate.", "site.")) for config in whole]
    for configs in (chosen, whole):
        named = [_label(method, parts) for parts in _short(configs)]
        if len(set(named)) == len(named):
            return named
    repeated = Counter(named)
    return [
        f"{name} {run.run_id[:6]}" if repeated[name] > 1 else name
        for name, run in zip(named, runs, strict=True)
    ]


def _settings(run: Run) -> Leaves:
    """The configuration without `record`, and the changed layer in place of how it was chosen."""
    config = leaves(run.run.get("config", {}))
    layer = (run.run.get("site") or {}).get("layer")
    left_out = ("record.", "locate.") if layer is not None else ("record.",)
    kept = {path: value for path, value in config.items() if not path.startswith(left_out)}
    return kept if layer is None else kept | {"site.layer": layer}


def _within(config: Leaves, prefixes: tuple[str, ...]) -> Leaves:
    return {path: value for path, value in config.items() if path.startswith(prefixes)}


def _varying(configs: Sequence[Leaves]) -> list[str]:
    """Paths whose value differs between the configurations, or is missing in some."""
    paths = {path: None for config in configs for path in config}
    absent = object()
    return [path for path in paths if len({_text(c.get(path, absent)) for c in configs}) > 1]


def _short(configs: Sequence[Leaves]) -> list[dict[str, str]]:
    """The varying settings under their last name, or the whole path where two share it."""
    varying = _varying(configs)
    last = Counter(path.rpartition(".")[2] for path in varying)
    names = {p: p.rpartition(".")[2] if last[p.rpartition(".")[2]] == 1 else p for p in varying}
    return [{names[p]: v for p, v in _shown(config, varying).items()} for config in configs]


def _shown(config: Leaves, paths: Sequence[str]) -> dict[str, str]:
    return {path: _text(config[path]) for path in paths if path in config}


def _label(method: str, parts: Mapping[str, str]) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in parts.items())
    return f"{method} [{settings}]" if settings else method


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=repr, sort_keys=True).replace('"', "")
