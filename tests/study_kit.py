"""What the tests of the study share: tiny models in folders, a config of few short runs, and studies in processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cache_kit as kit
import pytest

pytest.importorskip("yaml")

from fastdpo import demo_task
from fastdpo.study import runner
from fastdpo.study.cell_run import Lab
from fastdpo.study.config import StudyConfig, from_dict

TRAINING = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": 64,
}


def world(folder: Path) -> Path:
    """A folder with models `policy`, `better` and `foreign` (the words in another order), and pairs."""
    kit.save_model(folder / "policy", seed=1)
    kit.save_model(folder / "better", seed=2)
    kit.save_model(folder / "foreign", seed=3)
    demo_task.tokenizer(backwards=True).save_pretrained(folder / "foreign")
    every = kit.rows(14)
    for name, rows in (("train", every[:8]), ("held_out", every[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scoring.py").write_text(
        "from fastdpo import demo_task\n"
        "def score(prompts, answers, rows):\n"
        "    assert all(p == r['prompt'] for p, r in zip(prompts, rows))\n"
        "    return [len(a.split()) for a in answers]\n"
    )
    return folder


def settings(world: Path, **changes: Any) -> dict[str, Any]:
    """Two betas, one reference, one seed; two steps each."""
    return {
        "policy": str(world / "policy"),
        "data": {"train": str(world / "train.jsonl"), "held_out": str(world / "held_out.jsonl")},
        "references": {"start": "policy"},
        "betas": [0.1, 1],
        "parameterizations": ["ratio"],
        "training": TRAINING,
        "sampling": {"prompts": 4, "max_new_tokens": 5, "batch": 4},
        "scorer": f"{world / 'scoring.py'}:score",
        "workers": 1,
        "threads": 1,
        "token_rows": 2,
        **changes,
    }


def config(world: Path, **changes: Any) -> StudyConfig:
    return from_dict(settings(world, **changes))


def lab(world: Path, folder: Path, *references: str, **changes: Any) -> Lab:
    """In this process: the study's data and cache, with some references scored."""
    runner.settle(config(world, **changes), folder)
    do = runner.worker(folder)
    for name in ("start", *references):
        do(("reference", name))
    return Lab(folder)


def study_process(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    """`runner.run` of a YAML file, as `fastdpo study` starts it, in a process group of its own."""
    code = (
        "import sys; from pathlib import Path\n"
        "from fastdpo.study import runner; from fastdpo.study.config import read\n"
        "if __name__ == '__main__': print(runner.run(read(Path(sys.argv[1])), Path(sys.argv[2])))\n"
    )
    script = folder.parent / "run_study.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["."])}
    return subprocess.Popen(
        [sys.executable, str(script), str(config), str(folder)],
        env=environment,
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """The parent alone: its workers have to notice."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
