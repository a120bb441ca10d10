"""Which modules a recipe adapts, by name alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cola_core.errors import UserError, suggest

__all__ = ["select_targets"]

# What `query_value` means, by family: Llama and OPT, BERT, T5, GPT-2 (whose one map gives query, key and value).
QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"), ("c_attn",))


def select_targets(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The adaptable modules that `targets` means, in model order.

    Args:
        names: every adaptable module, as in cola.json.
        targets: "all", "query_value" (attention's query and value maps, whatever the model calls them), or endings
            of module names such as ["q_proj", "v_proj"].

    Raises:
        UserError: an ending that no adaptable module has; embeddings and LM heads are never among them.
    """
    known = list(names)
    if targets == "all":
        return known
    words = [targets] if isinstance(targets, str) else targets
    wanted = [ending for word in words for ending in _role(word, known)]
    for target in wanted:
        if not any(_ends(name, target) for name in known):
            endings = sorted({name.rsplit(".", 1)[-1] for name in known})
            allowed = [word for word in ("all", "query_value", *endings) if word != target]
            raise UserError(
                f"params.yaml: targets: {target!r} ends no adaptable module (embeddings and the LM head are never "
                f"adapted){suggest(target, allowed)}"
            )
    return [name for name in known if any(_ends(name, target) for target in wanted)]


def _role(target: str, known: Sequence[str]) -> Sequence[str]:
    """The endings that `query_value` stands for in this model; every other target stands for itself."""
    if target != "query_value":
        return [target]
    for endings in QUERY_VALUE:
        if all(any(_ends(name, ending) for name in known) for ending in endings):
            return endings
    return [target]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
