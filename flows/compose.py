"""params.yaml of a run: the file as it stands plus dotted overrides, or conf/ composed as `dvc exp run` does."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cola_core.assets.cache import cache_root
from cola_core.config.params import Params, check_params
from cola_core.config.reading import load_yaml, read_yaml
from cola_core.errors import UserError, suggest
from cola_core.files import scratch
from cola_core.secrets import is_secret

__all__ = ["choices", "compose", "defaults", "edits"]

GROUPS = ("method", "task", "model", "chain", "machine")
PLAIN = re.compile(r"(?!(?i:inf|nan|null|true|false)$)[A-Za-z_][A-Za-z0-9_.\-]*")


def choices(root: Path, group: str) -> list[str]:
    """The names that conf/<group>/ offers, such as `m2` and `first_link_only/m2` of `chain`."""
    folder = root / "conf" / group
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def compose(root: Path, picks: Mapping[str, str | None], overrides: Sequence[str] = ()) -> str:
    """The text of params.yaml for a run of the project at `root`, checked whole.

    Args:
        picks: {group of conf/: choice}, none = as params.yaml stands. With any choice, also one among the overrides
            (`machine=cpu_bf16`), conf/ is composed; else the overrides are laid over params.yaml.
        overrides: Hydra's `key.key=value`, `+new.key=value`, `~key`.

    Raises:
        UserError: an unknown choice or key, hand edits that composing would drop, anything `check_params` refuses.
    """
    chosen, rest = _picks(root, picks, overrides)
    current = read_yaml(root / "params.yaml")
    if chosen and (lost := edits(root, current)):
        raise UserError(
            f"params.yaml has edits that composing conf/ for {', '.join(chosen)} would drop; "
            f"undo them and add: {_arguments(lost)}"
        )
    text = _composed(root, chosen, rest) if chosen else _laid_over(root, rest)
    params = load_yaml(text)
    if open_keys := list(_open_keys("", params)):
        raise UserError(f"{', '.join(open_keys)}: left to you; add -S {open_keys[0]}=...")
    _refuse_idle(check_params(params), rest)
    return text


def defaults(root: Path) -> str:
    """The text of params.yaml that conf/ gives by itself, whatever was edited by hand."""
    return _composed(root, {}, [])


def edits(root: Path, current: dict[str, Any]) -> list[str]:
    """What was changed by hand in `current`: overrides that turn the composition of its recipe and task into it."""
    origin = {
        group: name
        for group, name in (("method", current.get("recipe")), ("task", current.get("task")))
        if name in choices(root, group)
    }
    return list(_difference("", load_yaml(_composed(root, origin, [])), current))


def _picks(root: Path, picks: Mapping[str, str | None], overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Choices of groups, wherever they were named, and the other overrides."""
    chosen = {group: name for group, name in picks.items() if name is not None}
    rest = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals and not override.startswith("~"):
            raise UserError(f"override {override!r}: expected key=value, such as link.learning_rate=1e-4")
        if is_secret(key):
            raise UserError(
                f"override {key}: params.yaml is committed and holds no secrets; export HF_TOKEN and the like"
            )
        if key in GROUPS:
            chosen[key] = value
        else:
            rest.append(override)
    for group, name in chosen.items():
        if name not in (allowed := choices(root, group)):
            raise UserError(f"{group}: conf/{group} has no {name!r}{suggest(name, allowed)}")
    return chosen, rest


def _refuse_idle(params: Params, overrides: Sequence[str]) -> None:
    """Refuse steps for all links where every link has its own, as those of conf/chain do: nothing would change."""
    given = any(override.partition("=")[0].lstrip("+") == "link.steps" for override in overrides)
    if given and all("steps" in item.link for item in params.chain.values()):
        raise UserError(
            "override link.steps: changes nothing, since every link of the chain sets its own; set schedule.horizon, "
            f"which conf/chain deals out to the links: -S chain=m{params.final} -S schedule.horizon=..."
        )


def _composed(root: Path, chosen: Mapping[str, str], overrides: Sequence[str]) -> str:
    from dvc.utils.hydra import compose_and_dump

    arguments = [*(f"{group}={name}" for group, name in chosen.items()), *overrides]
    conf = (root / "conf").resolve()
    with scratch(cache_root(), "conf") as folder:
        made = folder / "params.yaml"
        with _told(root):
            compose_and_dump(made, str(conf), None, "config", str(conf / "plugins"), arguments)
        return made.read_text(encoding="utf-8")


def _laid_over(root: Path, overrides: Sequence[str]) -> str:
    text = (root / "params.yaml").read_text(encoding="utf-8")
    if not overrides:
        return text
    from dvc.utils.hydra import apply_overrides

    with scratch(cache_root(), "conf") as folder:
        made = folder / "params.yaml"
        made.write_text(text, encoding="utf-8")
        with _told(root):
            apply_overrides(made, list(overrides))
        return made.read_text(encoding="utf-8")


@contextmanager
def _told(root: Path) -> Iterator[None]:
    """Hydra's and OmegaConf's errors as one line of ours, and no alias that OmegaConf would write out for ever."""
    from dvc.exceptions import InvalidArgumentError
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for file in _conf_files(root):
        if b"&" in file.read_bytes():
            read_yaml(file)
    try:
        yield
    except (InvalidArgumentError, HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error, InvalidArgumentError) and error.__cause__ else error
        if unknown := re.search(r"Could not (?:override|delete)[^']*'([^']+)'", str(cause)):
            raise UserError(f"override: {_unknown(unknown[1], read_yaml(root / 'params.yaml'))}") from None
        override = getattr(cause, "override", None)  # known where a value has to be quoted
        given = f" {override!r}" if override else ""
        raise UserError(f"override{given}: {' '.join(str(cause).split('See http')[0].split())}") from None
    except Exception as error:  # Hydra checks little of a file of conf/ before it uses it
        for file in _conf_files(root):
            read_yaml(file)
        raise UserError(f"conf: cannot be composed: {type(error).__name__}: {error}") from None


def _conf_files(root: Path) -> list[Path]:
    return sorted((root / "conf").rglob("*.yaml"))


def _unknown(key: str, node: Any) -> str:
    """Where the dotted `key` leaves what params.yaml has, and the word that may have been meant."""
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return f"{key}: no such key{suggest(part, node if isinstance(node, dict) else [])} (+{key}=... adds one)"
        node = node[part]
    return f"{key}: cannot be set"


def _open_keys(prefix: str, node: Any) -> Iterator[str]:
    """Dotted keys whose value is Hydra's `???`: whoever composes has to give it."""
    if isinstance(node, dict):
        for key, inner in node.items():
            yield from _open_keys(f"{prefix}.{key}" if prefix else str(key), inner)
    elif node == "???":
        yield prefix


def _difference(prefix: str, old: Any, new: Any) -> Iterator[str]:
    """Overrides that turn `old` into `new`, key by key."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new or type(old) is not type(new):
            yield f"{prefix}={_value(new)}"
        return
    for key in [*old, *(key for key in new if key not in old)]:
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in new:
            yield f"~{path}"
        elif key not in old and new[key] and isinstance(new[key], dict):
            yield from ("+" + added.lstrip("+") for added in _difference(path, {}, new[key]))
        elif key not in old:
            yield f"+{path}={_value(new[key])}"
        else:
            yield from _difference(path, old[key], new[key])


def _value(value: Any) -> str:
    """`value` in Hydra's grammar, where JSON is almost at home: keys go unquoted, plain words too."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_value(str(key))}:{_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_value(inner) for inner in value) + "]"
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        # Hydra reads \' as a quote and halves backslashes only before one or at the end.
        return "'" + re.sub(r"(\\*)('|\Z)", lambda at: at[1] * 2 + ("\\'" if at[2] else ""), value) + "'"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _arguments(overrides: Sequence[str]) -> str:
    return " ".join(f"-S {_quoted(override)}" for override in overrides)


def _quoted(word: str) -> str:
    """`word` for bash and zsh, on one line whatever it holds."""
    if word.isprintable():
        return shlex.quote(word)
    marks = {"\\": "\\\\", "'": "\\'", "\n": "\\n"}
    return "$'" + "".join(marks.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in word) + "'"
