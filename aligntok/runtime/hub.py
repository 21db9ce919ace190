"""Folders that are named by where they lie on the Hugging Face hub: USER/NAME or USER/NAME@REVISION.

A folder that is there is taken, whatever it is called; only a name of two parts that no folder has goes to the hub. Its
files come into the hub's own cache, and are not fetched again. Nothing that they hold is executed.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from aligntok.errors import UserError
from aligntok.runtime.manifest import FILES
from aligntok.runtime.weights import in_short

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(folder: str | Path, what: str) -> Path:
    """The folder of a tokenizer or a generator, here or from the hub.

    Args:
        what: what is looked for, in messages.

    Raises:
        UserError: neither a folder nor a repository that can be had.
    """
    given = str(folder)
    name, _, revision = given.partition("@")
    if Path(folder).expanduser().exists() or not NAME.fullmatch(name):
        return Path(folder)
    return _fetched(name, revision or None, what)


@cache
def _fetched(name: str, revision: str | None, what: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # network, authorisation, names, revisions: each has its own
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"no {what} at {name}: there is no such folder, and no repository of that name{at} can be fetched from the "
            f"hub ({in_short(error)})"
        ) from error
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise UserError(f"the hub's {name} has no {' and no '.join(missing)}: it is no {what} of aligntok push")
    return folder
