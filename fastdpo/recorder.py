"""What one training run did: a metrics file written as it goes, step times, peak memory."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .memory import peak_memory_mib


class RunRecorder(TrainerCallback):
    """Trainer callback: appends each log to `path` as one JSON line, and times the steps.

    Only the main process writes; `path=None` writes nothing.
    """

    def __init__(self, path: Path | None, append: bool = False) -> None:
        self.path = path
        self.append = append
        self.records: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        self._step_started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path is not None and state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.append:
                self.path.write_text("", encoding="utf-8")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._step_started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.write({"step": state.global_step, **logs})

    def write(self, record: dict[str, Any]) -> None:
        """Keep one record and append it to the file."""
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def summary(self) -> dict[str, Any]:
        """steps, step_seconds and seconds_per_step, their median; peak_memory_mib, on a GPU peak_gpu_memory_mib."""
        result: dict[str, Any] = {
            "steps": len(self.step_seconds),
            "step_seconds": self.step_seconds,
            "seconds_per_step": statistics.median(self.step_seconds) if self.step_seconds else 0.0,
            "peak_memory_mib": peak_memory_mib(),
        }
        if torch.cuda.is_available():
            result["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return result
