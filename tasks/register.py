"""Register the evaluated chain as a model version with its card, and call it the challenger."""

from __future__ import annotations

from tasks.context import Context, Done
from tasks.stage import run

RETRIES = 3  # the tracking server may be away for a moment


def main(context: Context) -> Done:
    """Write registration.json and README.md; the same chain is never registered twice.

    Raises:
        UserError: a stage before has not run, or the store refuses the name.
        RetryError: MLflow cannot be reached; nothing is lost.
    """
    from cola_core.files import new_dir
    from cola_core.sealed import write_sealed
    from cola_core.secrets import mask
    from tasks.card import card
    from tasks.places import ARTIFACTS
    from tasks.publish import ALIAS, publish
    from tasks.release import FOLDER, gather, registration
    from tasks.store import locked, open_store
    from tasks.sync import sync

    release, text = gather(context), card(context)
    sync()  # so that the model can name the run that evaluated it
    with locked("sync"), open_store() as store:
        version = publish(store, release, text)
        address = mask(store.uri)
    with new_dir(FOLDER) as folder:
        (folder / "README.md").write_text(text, encoding="utf-8")
        write_sealed(folder / "registration.json", "registration", registration(release, version, ALIAS, address))
    print(f"register: {release.name} version {version} is the {ALIAS}: models:/{release.name}@{ALIAS}", flush=True)
    inputs = [ARTIFACTS / "merge", ARTIFACTS / "evaluate"]
    return Done({"version": float(version), **release.scores}, inputs, [FOLDER], [FOLDER / "README.md"])


if __name__ == "__main__":
    run(main)
