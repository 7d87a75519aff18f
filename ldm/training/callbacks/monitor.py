"""wandb as the monitor: never the truth, never a reason to stop."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.errors import LdmError

log = logging.getLogger(__name__)
MODES = ("auto", "online", "offline", "disabled")
QUEUE_SIZE = 1000


def choose_mode(mode: str) -> str:
    """auto: online if and only if a key is configured, for that is asking; else offline."""
    if mode not in MODES:
        raise LdmError("CONFIG", f"logger.mode must be one of {', '.join(MODES)}, not {mode!r}", where="logger.mode")
    environment = os.environ.get("WANDB_MODE")
    if mode != "auto" or environment in ("offline", "disabled"):
        return environment if mode == "auto" and environment else mode
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False


class Monitor:
    """Sends records and pictures to wandb from a thread of its own, through a bounded queue.

    A step never waits: when the queue is full the oldest entry is dropped and counted. Whatever wandb does, training
    goes on; a failure is said once. The x-axis is `train/step`.
    """

    def __init__(
        self, *, mode: str, project: str, name: str, stage: str, run_id: str, folder: Path, config: dict[str, Any]
    ) -> None:
        self.dropped = 0
        self._queue: queue.Queue[tuple[dict[str, float], Path | None] | None] = queue.Queue(QUEUE_SIZE)
        self._settings: dict[str, Any] = {
            "mode": mode,
            "project": project,
            "name": f"{name}-{stage}",
            "group": name,
            "job_type": stage,
            "id": run_id,
            "resume": "allow",
            "dir": str(folder),
            "config": config,
        }
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, float], picture: Path | None = None) -> None:
        entry = (dict(record), picture)
        while True:
            try:
                return self._queue.put_nowait(entry)
            except queue.Full:
                try:
                    self._queue.get_nowait()
                    self.dropped += 1
                except queue.Empty:
                    pass

    def close(self, timeout_s: float = 30.0) -> None:
        """Waits at most `timeout_s` for what is left."""
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.put_nowait(None)
                break
            except queue.Full:
                time.sleep(0.05)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("wandb did not finish within %.0f s; metrics.jsonl has everything", timeout_s)
        if self.dropped:
            log.warning("wandb was slow: %d records were not sent; metrics.jsonl has everything", self.dropped)

    def _work(self) -> None:
        run = self._guarded(self._start)
        while (entry := self._queue.get()) is not None:
            if run is not None:
                self._guarded(self._send, run, *entry)
        if run is not None:
            self._guarded(run.finish)

    def _start(self) -> Any:
        import wandb

        Path(self._settings["dir"]).mkdir(parents=True, exist_ok=True)
        # nothing of the surroundings goes along: no code, no diff, no environment, no console
        quiet = wandb.Settings(
            silent=True, console="off", disable_code=True, disable_git=True, save_code=False, x_disable_meta=True
        )
        run = wandb.init(settings=quiet, **self._settings)
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        return run

    def _send(self, run: Any, record: dict[str, float], picture: Path | None) -> None:
        import wandb

        images = {"samples": wandb.Image(str(picture))} if picture is not None else {}
        run.log({**record, **images})

    def _guarded(self, work: Callable[..., Any], *args: Any) -> Any:
        """What wandb, its service or the network may raise is their own affair: said, and the queue drains."""
        from wandb.errors import Error

        try:
            return work(*args)
        except (Error, OSError, RuntimeError, ValueError, TypeError) as error:
            log.warning("wandb: %s: %s; training goes on, metrics.jsonl has everything", type(error).__name__, error)
            return None
