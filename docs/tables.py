"""Rewrites the tables of `docs/*.md` that are made from the code (`make docs`).

Between `<!-- fields module:Class -->` and `<!-- end -->` stand the fields of a dataclass with their defaults and the
text under each; between `<!-- commands -->` and `<!-- end -->`, every command with its arguments; between
`<!-- site methods -->` and `<!-- end -->`, the methods for any torch model, with what their files say of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from graft.studio import registry
from graft.studio.cli import build_parser
from graft.studio.config import field_docs
from graft.studio.methods.lora import LoRA

BLOCK = re.compile(
    r"(?P<head><!-- (?:fields (?P<place>\S+)|(?P<what>commands|site methods)) -->\n).*?(?=<!-- end -->)", re.DOTALL
)
LLAMA = ("ladder_side_tuning",)
LOFTQ = "graft.studio.methods.loftq:loftq"
WHEN_LOFTQ = "a base that is quantised to few bits"
EVERYWHERE = {"--help", "--json", "--version"}


def default(field: dataclasses.Field[Any]) -> str:
    """The default of a field as it is written in TOML."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


def table(cls: Any) -> str:
    """The fields of a dataclass as a Markdown table."""
    docs = field_docs(cls)
    rows = [
        f"| `{field.name}` | {default(field)} | {' '.join(docs[field.name].split()).replace('|', chr(92) + '|')} |"
        for field in dataclasses.fields(cls)
        if field.init
    ]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Parsers of the commands that have no commands of their own."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield parser
    for action in inner:
        for child in action.choices.values():
            yield from leaves(child)


def name(action: argparse.Action) -> str:
    """An argument as it is written on a command line."""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return value
    return action.option_strings[-1] + ("" if action.nargs == 0 else f" {value}")


def commands() -> str:
    """Every command: a heading, what it does, its arguments."""
    parts = []
    for parser in leaves(build_parser()):
        own = [action for action in parser._actions if not EVERYWHERE & set(action.option_strings)]
        needed = [name(a) + (" ..." if a.nargs == "+" else "") for a in own if a.required]
        told = parser.description or ""
        parts += ["", f"### `{' '.join([parser.prog, *needed])}`", "", f"{told[:1].upper()}{told[1:]}."]
        rows = [f"| `{name(action)}` | {(action.help or '').replace('|', chr(92) + '|')} |" for action in own]
        parts += ["", "| argument | meaning |", "|---|---|", *rows] if rows else []
    return "\n".join([*parts, "", ""])


def site_methods() -> str:
    """Each method for any torch model: what it trains, its equation, its size on a ViT-S, when to use it, its paper.

    What needs a decoder is counted on a Llama with the layers and widths of that ViT.
    """
    import timm
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"num_hidden_layers": 12, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224", num_classes=0)
        llama = LlamaForCausalLM(LlamaConfig(**shape))
    rows = []
    for name, place in {**registry.SITE_METHODS, "loftq": LOFTQ}.items():
        cls, told = registry.find(place), import_module(place.partition(":")[0]).__doc__ or ""
        (equation, *_) = re.findall(r"^    (\S.*)$", told, re.MULTILINE)
        papers = ", ".join(re.findall(r"arXiv:\d+\.\d+", told))
        if name == "loftq":  # a start of LoRA
            plan, what, when = (
                LoRA().plan(vit),
                "LoRA, from a start that makes up for the rounding of a base.",
                WHEN_LOFTQ,
            )
        else:
            plan, what, when = cls().plan(llama if name in LLAMA else vit), cls.__doc__ or "", cls.when
        places = ", ".join(dict.fromkeys(site.role or site.kind for site in plan))
        what = f"{what.partition(chr(10))[0]} At: {places}"
        equation = re.sub(r" {2,}", "  ", equation).replace("``", "").replace("|", "\\|")
        count = f"{plan.parameters:,}" + (" (a Llama)" if name in LLAMA else "")
        rows.append(f"| {' | '.join([f'`{name}`', what, f'`{equation}`', count, when, papers])} |")
    head = "| method | what it trains, and where by default | equation | parameters on a ViT-S | when | paper |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]) + "\n"


def rewritten(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        if match["what"]:
            return match["head"] + (commands() if match["what"] == "commands" else site_methods())
        module, cls = match["place"].split(":")
        return match["head"] + table(getattr(import_module(module), cls))

    return BLOCK.sub(fill, text)


if __name__ == "__main__":
    for page in sorted(Path(__file__).parent.glob("*.md")):
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
