"""The averages of a stage as they were at every so many steps: what an average of another length is made of.

    <stage>/ema/step-000000123/   manifest.json  state.json  ema_length_0-05.safetensors  ...

Written and verified as checkpoints are, but never rotated. Of one step they are written before the checkpoint, so a
checkpoint has all of its past; what is newer than the step that a stage resumes from is set aside, and written again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoints import files
from ldm.checkpoints.manifest import INVALID, Verify
from ldm.checkpoints.store import Checkpoint, Store
from ldm.errors import LdmError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """updates: how many had been averaged.   lengths: of the averages, by the names of their files."""

    step: int
    updates: int
    lengths: Mapping[str, float]


class Snapshots:
    """The `ema/` folder of one stage. One writer per run is assumed."""

    def __init__(self, folder: Path | str, verify: Verify = "hash") -> None:
        self.store = Store(folder, keep_every=1, keep_best=0, verify=verify)  # every one is kept for good

    def begin(self, step: int) -> None:
        """Before the first save of a life that starts from `step`."""
        if not self.store.folder.exists():
            return
        self.store.claim()
        for newer in (s for s in self.store.steps() if s > step):
            aside = self.store.folder / f"abandoned-{self.store.path(newer).name}"
            files.remove_tree(aside)  # of an earlier life: one is enough
            os.rename(self.store.path(newer), aside)
        files.sync_folder(self.store.folder)

    def save(self, snapshot: Snapshot, averages: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Commit one. averages: by the names of their files. Raises SaveFailed when the disk refuses."""
        self.store.folder.mkdir(parents=True, exist_ok=True)
        state = {"train_step": snapshot.step, "updates": snapshot.updates, "lengths": dict(snapshot.lengths)}
        return self.store.save(snapshot.step, tensors=averages, trees={}, documents={"state": state})

    def all(self) -> list[Snapshot]:
        """In the order of their steps. Raises LdmError for a damaged one."""
        states = ((step, self.open(step).document("state")) for step in self.store.steps())
        return [Snapshot(step, state["updates"], state["lengths"]) for step, state in states]

    def open(self, step: int) -> Checkpoint:
        """Verified, for the tensors. Raises LdmError if it is damaged."""
        try:
            return self.store.load(step)
        except LdmError as error:
            if error.code != INVALID:
                raise
            advice = "move this folder away: the other snapshots may do"
            raise LdmError(error.code, error.what, where=error.where, next=advice) from error
