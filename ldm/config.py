"""Composing: `key=value` words and the files of `configs/` -> one plain, resolved dict, or every problem at once.

Uses Hydra's compose API and nothing else of Hydra: composing constructs nothing. Never imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ldm.errors import LdmError, nearest, raise_all

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OPEN = (  # mappings whose keys are the user's own
    *("columns", "data.columns", "stage.diffusion.sample_columns"),
    *("stage.autoencoder.param_groups", "stage.diffusion.param_groups", "stage.features.param_groups"),
)
TEMPLATES = ("data.caption", "data.caption_prefix", "data.caption_suffix")  # texts: braces in them are no dicts
VERBATIM = ("prompt", "negative_prompt", "prompts_file")  # any text, never parsed

_CONSTRUCTED_BY_HYDRA = ("callbacks", "launcher", "sweeper", "hydra_logging", "job_logging")
_MAX_FILE_BYTES = 1_000_000
_Tree = dict[str, Any]
_Compose = Callable[[Sequence[str]], Any]


def compose(config_name: str, argv: Sequence[str], *, config_dir: Path = CONFIGS) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and scalars.

    argv: `key=value` words. The texts of `prompt=` and its kin never reach a grammar: any text arrives unchanged.
    Raises LdmError (exit code 2) with one line for every problem that was found.
    """
    config_dir = Path(config_dir).resolve()
    _check_place(config_dir)
    trusted_targets(argv)
    texts = {key_of(w): w.split("=", 1)[1] for w in argv if key_of(w) in VERBATIM}
    words = [w for w in argv if key_of(w) not in (*VERBATIM, "trusted_targets")]

    with _hydra(config_name, config_dir) as compose_with:
        parsed, problems = _parse(words)
        groups = [(w, o) for w, o in parsed if _is_group(o.key_or_group, config_dir)]
        raise_all(problems + _check_groups(groups, config_dir))  # without its groups the tree says little about keys
        values = [(w, o) for w, o in parsed if (w, o) not in groups]
        choices = [f"~{w.split('=')[0]}" if o.value() is None and not o.is_delete() else w for w, o in groups]
        whole = compose_with(choices)
        tree = _plain(whole)
        known = dict(walk(tree))
        raise_all(_check_keys(values, texts, tree) + _check_overlays(tree, compose_with, config_dir))
        words_of_values = [f"++{w}" if _is_open(o, known) else w for w, o in values]
        whole = compose_with(choices + words_of_values) if values else whole
        _check_hydra_node(whole.pop("hydra"), words)
        return {**_resolve(whole), **texts}


def changed(tree: Mapping[str, Any], words: Sequence[str]) -> _Tree:
    """A resolved tree with the values of `key=value` words, in the grammar of `compose`. What is null may be filled.

    Raises LdmError (exit code 2) with one line for every problem that was found.
    """
    from omegaconf import OmegaConf

    parsed, problems = _parse(words)
    found, known = deepcopy(dict(tree)), dict(walk(tree))
    fills = [o.key_or_group for _, o in parsed if known.get(o.key_or_group.rpartition(".")[0], 0) is None]
    values = [(word, o) for word, o in parsed if o.key_or_group not in fills]
    problems += _check_keys(values, {}, {**tree, "hydra": {"runtime": {"choices": {}}}})
    raise_all(problems + [_a_sweep(w) for w, o in parsed if o.key_or_group in fills and o.is_sweep_override()])
    _limit_resolvers()
    for _, override in parsed:
        (value,) = _resolve(OmegaConf.create({override.key_or_group: override.value()})).values()
        *above, key = override.key_or_group.split(".")
        below = found
        for step in above:
            below[step] = below[step] if isinstance(below.get(step), dict) else {}
            below = below[step]
        below[key] = {**below[key], **value} if isinstance(value, dict) and isinstance(below.get(key), dict) else value
    return found


def trusted_targets(argv: Sequence[str]) -> tuple[str, ...]:
    """Packages that this command line, and nothing else, lets a config construct from: `trusted_targets=[my_pkg]`."""
    given = [w.split("=", 1)[1] for w in argv if key_of(w) == "trusted_targets"]
    names = [n.strip() for n in given[-1].strip("[]").split(",") if n.strip()] if given else []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise LdmError("CONFIG", f"{name!r} is not the name of a package", where="trusted_targets")
    return tuple(names)


def sweep_axes(words: Sequence[str]) -> list[list[str]]:
    """For each word its alternatives: `seed=1,2` -> ["seed=1", "seed=2"], anything else -> itself."""
    parsed, problems = _parse([w for w in words if key_of(w) not in VERBATIM])
    raise_all(problems)
    swept = {
        word: [f"{word.split('=', 1)[0]}={value}" for value in override.sweep_string_iterator()]
        for word, override in parsed
        if override.is_sweep_override()
    }
    return [swept.get(word, [word]) for word in words]


def key_of(word: str) -> str:
    """The key of a `key=value` word without its `+`; empty when it is not one."""
    return word.split("=", 1)[0].lstrip("+") if "=" in word else ""


def walk(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below `tree`, mappings included."""
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")


# ---- Hydra ---------------------------------------------------------------------------------------------------------


@contextmanager
def _hydra(config_name: str, config_dir: Path) -> Iterator[_Compose]:
    """A function words -> unresolved tree, with its `hydra` node, while `config_dir` is the only search path."""
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def compose_with(words: Sequence[str]) -> Any:
        try:
            tree = compose(config_name, list(words), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            text = re.split("Config search path|Set the environment variable", str(error))[0]
            if stranger := re.match(r"Could not override '([^'@]+)", text):
                raise _not_here(stranger[1], config_name, config_dir) from error
            raise LdmError("CONFIG", " ".join(text.split()), where=f"{config_name}.yaml") from error
        OmegaConf.set_struct(tree, False)
        return tree

    with initialize_config_dir(str(config_dir), version_base="1.3"):
        _limit_resolvers()
        yield compose_with


def _limit_resolvers() -> None:
    """`${oc.env:LDM_NAME,default}` is the only resolver: a file computes nothing and reads no secret."""
    from omegaconf import OmegaConf

    def env(name: str, *default: Any) -> Any:
        if not name.startswith("LDM_"):
            raise ValueError(f"only variables LDM_* may be read, not {name}")
        if name not in os.environ and not default:
            raise ValueError(f"the variable {name} is not set")
        return _number(os.environ[name]) if name in os.environ else default[0]

    OmegaConf.clear_resolvers()
    for name in ("oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.select"):
        OmegaConf.clear_resolver(name)
    OmegaConf.register_new_resolver("oc.env", env, replace=True)


def _number(text: str) -> Any:
    """What YAML would have read: 1e-4 is a number."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _parse(words: Sequence[str]) -> tuple[list[tuple[str, Any]], list[LdmError]]:
    """(word, Hydra's reading of it), and an error for every word that cannot be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed, problems = [], []
    for word in map(_quoted, words):
        try:
            parsed.append((word, parser.parse_override(word)))
        except HydraException as error:
            reason = " ".join(str(error).split("See https")[0].split())
            hint = f"quote the value: \"{key_of(word)}='...'\"" if "=" in word else "write key=value"
            problems.append(LdmError("CONFIG", f"cannot read {word!r}", limit=reason, next=hint))
    return parsed, problems


def _quoted(word: str) -> str:
    """A template as Hydra's quoted string, unless the user quoted it."""
    key, _, text = word.partition("=")
    if key not in TEMPLATES or "{" not in text or text[0] in "'\"":
        return word
    inner = re.sub(r"(\\*)'", r"\1\1\\'", text)
    ending = len(inner) - len(inner.rstrip("\\"))
    return f"{key}='{inner}{inner[len(inner) - ending :]}'"


def _plain(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _resolve(whole: Any) -> _Tree:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, _ in walk(_plain(whole)):
        if key.rpartition(".")[2] == "trusted_targets":
            raise LdmError("CONFIG", "only the command line may trust targets", where=key, next="remove it")
    try:
        if missing := sorted(OmegaConf.missing_keys(whole)):
            hint = "add " + " ".join(f"{key}=..." for key in missing)
            raise LdmError("CONFIG", "values are missing: " + ", ".join(missing), next=hint)
        return OmegaConf.to_container(whole, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise LdmError("CONFIG", str(error).splitlines()[0], where=str(error.full_key or "")) from error


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_place(config_dir: Path) -> None:
    if "HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE" in os.environ:
        raise LdmError("CONFIG", "HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE is set", next="unset it")
    if not config_dir.is_dir():
        raise LdmError("CONFIG", "there is no folder of configurations", where=str(config_dir))
    for path in config_dir.rglob("*.yaml"):
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise LdmError("CONFIG", "a configuration file is too large", where=str(path), limit="limit 1 MB")


def _is_group(key: str, config_dir: Path) -> bool:
    return key.startswith("hydra/") or any((config_dir / key).glob("*.yaml"))


def _check_groups(groups: Sequence[tuple[str, Any]], config_dir: Path) -> list[LdmError]:
    """Options that do not exist, each with the nearest that does."""
    problems = []
    for word, override in groups:
        folder = config_dir / override.key_or_group
        if override.is_sweep_override():
            problems.append(_a_sweep(word))
        elif override.value() is not None and not override.is_delete() and folder.is_dir():
            options = [p.stem for p in folder.glob("*.yaml")]
            chosen = override.value() if isinstance(override.value(), list) else [override.value()]
            problems += [
                LdmError("CONFIG", f"{override.key_or_group} has no option {str(c)!r}", next=nearest(str(c), options))
                for c in chosen
                if str(c) not in options
            ]
    return problems


def _not_here(group: str, config_name: str, config_dir: Path) -> LdmError:
    """A group of files that this command does not choose from."""
    roots = [f for f in sorted(config_dir.glob("*.yaml")) if f.stem != config_name]
    others = [f"{f.stem}.py" for f in roots if re.search(rf"^  - {group}[:@]", f.read_text(), re.MULTILINE)]
    mounts = re.findall(rf"^  - ({group}@[^:]+):", (config_dir / f"{config_name}.yaml").read_text(), re.MULTILINE)
    hint = f"did you mean {' or '.join(map(repr, mounts[:2]))}? " if mounts else ""
    hint += f"it belongs to {' and '.join(others)}; " if others and not mounts else ""
    what = f"unknown key {group!r}"
    return LdmError("CONFIG", what, where=f"{config_name}.py", next=f"{hint}python {config_name}.py --help lists all")


def _check_keys(values: Sequence[tuple[str, Any]], texts: Mapping[str, str], tree: _Tree) -> list[LdmError]:
    """Unknown keys, and values in the place of mappings, with what was probably meant."""
    known = dict(walk(tree))
    mounts = _mounts(tree)
    names = _names(tree)
    problems = [_unknown(key, names) for key in texts if key not in known]
    for word, override in values:
        key = override.key_or_group
        if override.is_sweep_override():
            problems.append(_a_sweep(word))
        elif key not in known and not _is_open(override, known):
            if not override.is_add() and not override.is_force_add():  # `build` judges what `+key=` adds
                problems.append(_unknown(key, names))
        elif isinstance(known.get(key), dict) and not isinstance(override.value(), dict | None):
            choice = f"{mounts[key]}=NAME or " if key in mounts else ""
            hint = f"write {choice}{key}.KEY=VALUE"
            problems.append(LdmError("CONFIG", f"{key} is a mapping, not a value", where=word, next=hint))
    return problems


def _is_open(override: Any, known: Collection[str]) -> bool:
    """Whether a word sets a mapping of `OPEN` that this tree has, or a key in one, without a sign of its own."""
    inside = any(key in known and f"{override.key_or_group}.".startswith(f"{key}.") for key in OPEN)
    return inside and not (override.is_add() or override.is_force_add() or override.is_delete())


def _check_overlays(tree: _Tree, compose_with: _Compose, config_dir: Path) -> list[LdmError]:
    """What an experiment or debug file sets must exist below it in the same choice of groups, or it is a typo.

    Nodes with `_target_` are left to `build`, which compares their arguments with the constructor.
    """
    choices = _choices(tree)
    overlays = {g: c for g, c in choices.items() if c is not None and _is_overlay(config_dir / g, c)}
    without = [f"~{group}" for group in overlays]
    try:
        own = _choices(_plain(compose_with(without)))
    except LdmError:  # the overlay fills a group that is missing without it: nothing to compare with
        return []
    same = [f"{g}={c}" for g, c in choices.items() if c is not None and g in own]
    below = _plain(compose_with(without + same))
    added = [mount for mount, group in _mounts(tree).items() if group not in own]
    where = ", ".join(f"{g}={c}" for g, c in overlays.items())
    problems = []
    for key, is_known in _strays(tree, below):
        if key.startswith("hydra") or any(f"{key}.".startswith(f"{mount}.") for mount in added):
            continue
        mapping = LdmError("CONFIG", f"{key} is a mapping, not a value", where=where)
        problems.append(mapping if is_known else _unknown(key, _names(below), where))
    return problems


def _check_hydra_node(node: Any, words: Sequence[str]) -> None:
    """What Hydra would construct by itself must be Hydra's own, unless this command line said otherwise."""
    packaged = _packaged_hydra_node(tuple(w for w in words if re.match(r"[+~]*hydra[./@]", w)))
    for name in _CONSTRUCTED_BY_HYDRA:
        if _plain(node[name]) != packaged[name]:
            what = "a file may not set what Hydra constructs"
            raise LdmError("CONFIG", what, where=f"hydra.{name}", next="remove it from the file")


@cache
def _packaged_hydra_node(words: tuple[str, ...]) -> _Tree:
    from hydra import compose

    return _plain(compose(None, list(words), return_hydra_config=True)["hydra"])


def _choices(tree: _Tree) -> dict[str, Any]:
    """group[@mount] -> option, as Hydra chose; without its own groups."""
    return {str(g): c for g, c in tree["hydra"]["runtime"]["choices"].items() if not str(g).startswith("hydra/")}


def _mounts(tree: _Tree) -> dict[str, str]:
    """dotted key -> the group mounted there: {"model.network": "model/network"}."""
    return {g.rpartition("@")[2].replace("/", "."): g for g in _choices(tree)}


def _names(tree: _Tree) -> list[str]:
    """What may stand to the left of `=`."""
    keys = [key for key, _ in walk(tree) if not key.startswith("hydra")]
    return keys + [group for group in _mounts(tree).values() if group not in keys]


def _is_overlay(folder: Path, option: Any) -> bool:
    files = [folder / f"{name}.yaml" for name in (option if isinstance(option, list) else [option])]
    return any(f.is_file() and "@package _global_" in f.read_text() for f in files)


def _strays(tree: _Tree, below: _Tree, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(key, whether it is known) of keys that are only in `tree`, or a value there and a mapping in `below`."""
    for key, value in tree.items():
        if key not in below:
            yield f"{prefix}{key}", False
        elif isinstance(below[key], dict) and below[key] and "_target_" not in below[key]:
            if not isinstance(value, dict | None) and "${" not in str(value):
                yield f"{prefix}{key}", True
            elif isinstance(value, dict) and "_target_" not in value:
                yield from _strays(value, below[key], f"{prefix}{key}.")


def _unknown(key: str, names: Sequence[str], where: str = "") -> LdmError:
    same_end = [n for n in names if n.endswith(f".{key}")]
    close = same_end[:2] or get_close_matches(key, names, n=2, cutoff=0.7)
    siblings = [n for n in names if n.rpartition(".")[0] == key.rpartition(".")[0] and "/" not in n]
    top = [n for n in names if "." not in n]
    hint = "did you mean " + " or ".join(map(repr, close)) + "?" if close else nearest(key, siblings or top)
    return LdmError("CONFIG", f"unknown key {key!r}", where=where, next=hint)


def _a_sweep(word: str) -> LdmError:
    return LdmError("CONFIG", f"{word!r} names several values", next="quote the value, or add -m to run each of them")
