"""Checkpoints committed beside training: the loop waits for a copy in memory, a thread does the rest."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.checkpoints.store import SaveFailed, Store
from ldm.errors import TEMPORARY, LdmError, classified

if TYPE_CHECKING:
    from torch import Tensor

DEADLINE_S = 300.0
"""A commit that takes longer than this is given up: the disk does not answer. Other ranks wait 600 s for this one."""


class Result(NamedTuple):
    """failed: saves in a row that the disk refused; infinite after an error that no later save can mend.

    error: of the last one, None if it stands.
    """

    failed: float = 0
    error: LdmError | None = None


class Writer:
    """Commits the checkpoints of one stage to `store`, one at a time.

    background: `save` returns as soon as it has a copy of the state in the host's memory, at most one at any time; the
        next `save` waits until that is committed. Otherwise `save` returns after the commit.
    result: of the newest commit that ended.
    """

    def __init__(self, store: Store, *, background: bool = False) -> None:
        self.store, self.background = store, background
        self.result = Result()
        self._thread: threading.Thread | None = None

    def save(self, step: int, *, wait: bool = False, deadline_s: float = DEADLINE_S, **state: Any) -> None:
        """state: as `Store.save` takes it. Whether it was committed stands in `result`, after `join`.

        wait: return after the commit in any case.   Raises LdmError (exit 75) if the one before does not end in time.
        """
        self.join(deadline_s)
        if wait or not self.background:
            self._commit(step, state)
        else:
            work = threading.Thread(target=self._commit, args=(step, copied(state)), daemon=True)
            work.start()
            self._thread = work

    def join(self, deadline_s: float = DEADLINE_S) -> None:
        """Waits until nothing is being written. Raises LdmError (exit 75) after deadline_s seconds."""
        if self._thread is None:
            return
        self._thread.join(deadline_s)
        given_up, self._thread = self._thread.is_alive(), None
        if given_up:
            raise LdmError(
                "DISK",
                "a checkpoint is still being written",
                where=str(self.store.folder),
                limit=f"waited {deadline_s:g} s",
                next="see whether the disk answers and rerun the same command: it continues from the one before",
                exit_code=TEMPORARY,
            )

    def _commit(self, step: int, state: dict[str, Any]) -> None:
        try:
            self.store.save(step, **state)
        except SaveFailed as error:
            self.result = Result(self.result.failed + 1, _without_frames(error))
        except LdmError as error:
            self.result = Result(math.inf, _without_frames(error))
        except BaseException as error:
            self.result = Result(math.inf, classified(error))
            raise
        else:
            self.result = Result() if self.result.failed < math.inf else self.result


def _without_frames(error: LdmError) -> LdmError:
    """The frames hold the state that could not be written."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error


def copied(tree: Any, copies: dict[tuple, Tensor] | None = None) -> Any:
    """`tree` with copies of its tensors in the host's memory; what showed the same memory does so again."""
    import torch

    from ldm.checkpoints.codec import memory_of

    copies = {} if copies is None else copies  # no closure that calls itself: it would keep them all until collected
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach()
        if (key := memory_of(tree)) not in copies:
            copies[key] = tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()
        return copies[key]
    if isinstance(tree, Mapping):
        return {key: copied(value, copies) for key, value in tree.items()}
    return type(tree)(copied(value, copies) for value in tree) if type(tree) in (list, tuple) else tree
