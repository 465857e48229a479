"""The policy's own answers to the data's prompts, sampled once and kept: what a KL can be estimated from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cache import ReferenceModel, files
from .config import Sampling
from .sampling import Answer, sample


def sampled(
    folder: Path, policy: ReferenceModel, tokenizer: Any, prompts: list[list[int]], sampling: Sampling, seed: int
) -> list[Answer]:
    """Answers to every prompt, `sampling.per_prompt` each, one after the other; prompts by length.

    Kept in folder/samples-<hash of all this>.json after each batch of prompts; a run that was killed goes on with the
    next one: batch i is drawn from seed + i. The policy is loaded only if something is missing.

    Args:
        prompts: token ids of each.
        sampling: `batch` prompts are answered at once; its `prompts` is not looked at.
    """
    prompts = sorted(prompts, key=len)  # a batch is padded to its longest
    asked = json.dumps([policy.reference.id, prompts, asdict(sampling), seed])
    path = folder / f"samples-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    answers = [Answer(*one) for one in json.loads(path.read_bytes())] if path.exists() else []
    done = len(answers) // sampling.per_prompt
    if done < len(prompts):
        from tqdm import tqdm

        with tqdm(total=len(prompts), initial=done, desc="policy: sampling", unit="prompt") as bar:
            for first in range(done, len(prompts), sampling.batch):
                batch = prompts[first : first + sampling.batch]
                found = sample(policy.loaded, tokenizer, batch, sampling, seed + first // sampling.batch)
                answers += [one._replace(prompt=first + one.prompt) for one in found]
                files.write(path, json.dumps(answers).encode())
                bar.update(len(batch))
    return answers
