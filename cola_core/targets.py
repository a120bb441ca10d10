"""Which modules a recipe adapts, by name alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cola_core.errors import UserError, suggest

__all__ = ["select_targets"]


def select_targets(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The adaptable modules that `targets` means, in model order.

    Args:
        names: every adaptable module, as in cola.json.
        targets: "all", or endings of module names such as ["q_proj", "v_proj"].

    Raises:
        UserError: an ending that no adaptable module has; embeddings and LM heads are never among them.
    """
    known = list(names)
    if targets == "all":
        return known
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for target in wanted:
        if not any(_ends(name, target) for name in known):
            endings = sorted({name.rsplit(".", 1)[-1] for name in known})
            raise UserError(
                f"params.yaml: targets: {target!r} ends no adaptable module (embeddings and the LM head are never "
                f"adapted){suggest(target, ['all', *endings])}"
            )
    return [name for name in known if any(_ends(name, target) for target in wanted)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
