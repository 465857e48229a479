"""What the documents hold of code: Python blocks and how they run, shell commands, other blocks."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for glob in ("*.md", "docs/*.md", "kernels/*.md") for path in ROOT.glob(glob)
)
_FENCED = r"^```(?P<language>\w*)\n(?P<fenced>(?:.*\n)*?)```$"
_INDENTED = r"(?<=\n\n)(?P<indented> {4}.*\n(?:(?: {4}.*)?\n)*)"


class Block(NamedTuple):
    """A block of code."""

    where: str  # document:line
    language: str  # shell where it is indented
    text: str


def parts(document: str) -> tuple[list[Block], str]:
    """Its blocks, and the prose without them."""
    text, found = (ROOT / document).read_text(encoding="utf-8"), []
    for match in re.finditer(f"{_FENCED}|{_INDENTED}", text, flags=re.MULTILINE):
        where = f"{document}:{text.count(chr(10), 0, match.start()) + 1}"
        indented = match["indented"]
        if indented is None:
            found.append(
                Block(
                    where, {"bash": "shell", "sh": "shell"}.get(match["language"], match["language"]), match["fenced"]
                )
            )
        else:
            found.append(Block(where, "shell", re.sub("^    ", "", indented, flags=re.MULTILINE)))
    return found, re.sub(f"{_FENCED}|{_INDENTED}", "", text, flags=re.MULTILINE)


def blocks(document: str, language: str = "python") -> list[str]:
    """Its blocks of a language."""
    return [block.text for block in parts(document)[0] if block.language == language]


def run(document: str, names: dict[str, Any], only: slice = slice(None)) -> dict[str, Any]:
    """Run the blocks (or some of them) in one namespace, which is returned."""
    for number, block in list(enumerate(blocks(document)))[only]:
        exec(compile(block, f"{document}, block {number}", "exec"), names)
    return names


# --- shell commands --------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A simple command, in a block or in the text."""

    where: str
    words: tuple[str, ...]
    in_text: bool = False  # may then be the command's name alone


def commands(document: str) -> list[Command]:
    """Every command of its shell blocks, loops unrolled and variables set; and of the text, those of ours."""
    every, prose = parts(document)
    found: list[Command] = []
    scopes: list[list[dict[str, str]]] = [[{}]]  # of each loop that is open, the variables of each of its turns
    for block in every:
        for words in _simple(block.text) if block.language == "shell" else ():
            if words[0] == "export" and len(words) == 2:
                scopes[-1] = [{**one, words[1].partition("=")[0]: words[1].partition("=")[2]} for one in scopes[-1]]
            elif words[0] == "for" and words[2:3] == ["in"] and words[3:]:
                scopes.append([{**one, words[1]: value} for one in scopes[-1] for value in words[3:]])
            elif words == ["done"] and scopes[1:]:
                scopes.pop()
            else:
                found += [Command(block.where, tuple(_expand(word, one) for word in words)) for one in scopes[-1]]
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        if re.match(r"(fastdpo|make|python3?|pip|accelerate|torchrun)\s", span):
            found += [Command(document, tuple(words), in_text=True) for words in _simple(" ".join(span.split()))]
    return list(dict.fromkeys(found))


def _simple(code: str) -> Iterator[list[str]]:
    """The words of each simple command; [options] are given, `...` and the file of a redirection left out."""
    code = re.sub(r"<<(\w+)\n(?:.*\n)*?\1\n", "\n", code.replace("\\\n", " "))
    for line in re.sub(r"\[(--[^]]*)\]", r"\1", code).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in (";", "&&", "|"):
                words.append(word)
                continue
            if ">" in words:
                words = words[: words.index(">")] + words[words.index(">") + 2 :]
            words = [word for word in words if word != "..."][words[:1] == ["do"] :]
            if words:
                yield words
            words = []


def _expand(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), word)


# --- docs/distributed.md, on every rank of a group -------------------------------------------------------------------


def distributed_blocks(rank: int, folder: str) -> list[float]:
    """The losses of the four blocks: FSDP2, a split vocabulary, a tensor-parallel model, split sequences."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    import fastdpo

    world = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    model = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    whole, hidden = model.lm_head.weight.detach().clone(), model.model(input_ids).last_hidden_state.detach()
    names = {
        **{"fastdpo": fastdpo, "fully_shard": fully_shard, "AutoModelForCausalLM": AutoModelForCausalLM},
        **{"model": model, "folder": folder, "input_ids": input_ids, "labels": input_ids, "ref_logps": torch.zeros(4)},
    }
    parts = blocks("docs/distributed.md")
    losses = []
    for number, block in enumerate(parts):
        if number == 1:
            names |= {"group": dist.group.WORLD, "my_rows_of_the_head": whole.tensor_split(world)[rank]}
            names["hidden"] = hidden.clone().requires_grad_()
        if number == 3:
            mine = [part.tensor_split(world, dim=1)[rank] for part in (hidden, input_ids)]
            names |= {"my_hidden": mine[0], "my_labels": mine[1], "weight": whole}
        exec(compile(block, f"docs/distributed.md, block {number}", "exec"), names)
        losses.append(float(names["out"].loss))
    return losses
