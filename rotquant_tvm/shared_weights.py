"""One copy on disk of weights that several artifacts hold: configurations of one model differ in their code alone."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .errors import ArtifactError


def share_weights(artifact: Path, others: Iterable[Path]) -> bool:
    """Make the weights file of ``artifact`` a hard link to an equal one in ``others``; return whether it now is.

    An entry of ``others`` that is no artifact, is damaged or is being removed is passed over, and a file system
    without hard links leaves all as it was.
    """
    from .runtime import read_artifact
    from .runtime.manifest import WEIGHTS_FILE

    mine, link = artifact / WEIGHTS_FILE, artifact / f".{WEIGHTS_FILE}.link"
    wanted = read_artifact(artifact, verify=False).manifest.files[WEIGHTS_FILE]
    for other in others:
        with suppress(ArtifactError, OSError):
            theirs = other / WEIGHTS_FILE
            if other == artifact or read_artifact(other, verify=False).manifest.files[WEIGHTS_FILE] != wanted:
                continue
            if not theirs.samefile(mine) and filecmp.cmp(theirs, mine, shallow=False):
                try:
                    os.link(theirs, link)
                    os.replace(link, mine)
                finally:
                    link.unlink(missing_ok=True)
            if theirs.samefile(mine):
                return True
    return False
