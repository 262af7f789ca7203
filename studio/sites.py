"""Sites: the places in a model where an adapter can act, found before anything is touched and printed as a plan.

A site is a module (or a range of output rows of a packed projection) with a role in its block (``q``, ``up``, ...)
and a tower of the model (``vision``, ``unet``, ...). Roles and towers are read from names and classes of timm,
open_clip, diffusers and transformers, so ``roles=("q", "v"), towers=("text",)`` means the same in all four; any other
model is addressed by path.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, nn

from graft.studio.attention import is_plain_attention
from graft.studio.errors import SiteError

KINDS = ("linear", "packed", "mha", "conv", "embedding", "norm", "bias", "block", "tokens", "kv")
"""The vocabulary of site kinds. `plan_sites` finds those with a weight (``mha`` are rows of the packed projection of
torch's MultiheadAttention, and its output projection), `plan_biases` biases, `plan_blocks` sublayers; methods plan the
others themselves."""
WEIGHTS = ("linear", "packed", "mha", "conv", "embedding")
"""Kinds with a weight that a product or a look-up takes."""

_ATTENTION = ("q", "k", "v", "o")
_MLP = ("up", "gate", "down")

# Ends of module paths. The first match wins, so the longer name stands first.
_ROLES: tuple[tuple[str, str], ...] = (
    ("q", r"to_q|add_q_proj|q_proj|query|q"),
    ("k", r"to_k|add_k_proj|k_proj|key|k"),
    ("v", r"to_v|add_v_proj|v_proj|value|v"),
    ("o", r"to_out\.0|to_add_out|out_proj|o_proj|(attn\d?|attention)\.proj|attention\.output\.dense|SelfAttention\.o"),
    ("gate", r"gate_proj|wi_0|mlp\.fc1_g"),
    (
        "up",
        r"up_proj|wi_1|fc1|fc1_x|c_fc|intermediate\.dense|ff\.net\.0\.proj|ff_context\.net\.0\.proj|layers\.\d+\.linear1",
    ),
    ("down", r"down_proj|wo|fc2|mlp\.c_proj|output\.dense|ff\.net\.2|ff_context\.net\.2|layers\.\d+\.linear2"),
    ("head", r"head|head\.fc|lm_head|classifier"),
)

# Projections whose output rows are several roles of equal size, one below the other.
_PACKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"qkv|to_qkv|to_added_qkv|query_key_value|Wqkv", ("q", "k", "v")),
    (r"to_kv|kv", ("k", "v")),
)

_GROUPS = {
    "all-linear": ("linear", "mha"),
    "all": ("linear", "mha", "conv"),
    "embedding": ("embedding",),
    "norm": ("norm",),
    "everything": ("linear", "mha", "conv", "norm"),
}

# Class names, or "Class/child"; the innermost match names the tower.
_TOWERS: tuple[tuple[str, str], ...] = (
    (r"(Custom)?(Text)?CLIP/(transformer|token_embedding|text_projection|ln_final|text)", "text"),
    (r".*UNet.*", "unet"),
    (r"Autoencoder.*", "vae"),
    (r".*Projector", "projector"),
    (r".*Vision.*|TimmModel|ViT.*|Dino.*|ModifiedResNet|ResNet|Beit|Eva|SwinTransformer.*|ConvNeXt", "vision"),
    (r".*Text.*|T5.*|UMT5.*", "text"),
    (r"(Llama|Mistral|Qwen\d*|Gemma\d*|Phi\d*)(Model|ForCausalLM)", "language"),
    (r".*Transformer2DModel|.*Transformer3DModel", "transformer"),
)


@dataclass(frozen=True)
class Site:
    """A place in a model where an adapter can act."""

    name: str
    """Path of the module."""
    kind: str
    """One of `KINDS`."""
    shape: tuple[int, ...]
    """Shape of the module's whole weight; for a bias its own, for blocks (output, input), for others the method's."""
    rows: tuple[int, int] | None = None
    """Output rows that the site covers; None for all."""
    tower: str | None = None
    """Part of the model, such as vision, text, language, unet."""
    role: str | None = None
    """Place in its block: q, k, v, o, up, gate, down, head."""

    @property
    def key(self) -> str:
        """Unique name: the path, with the rows of a packed site and a mark on a bias."""
        path = f"{self.name}.bias" if self.kind == "bias" else self.name
        return path if self.rows is None else f"{path}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def covered(self) -> tuple[int, ...]:
        """Shape of the part of the weight that the site covers."""
        return self.shape if self.rows is None else (self.rows[1] - self.rows[0], *self.shape[1:])


@dataclass(frozen=True)
class Plan:
    """Sites in model order; ``str(plan)`` is a table."""

    sites: tuple[Site, ...]
    counts: tuple[int, ...] = ()
    """Parameters of each site: a method's trainable ones, or those of the covered weight when empty."""

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def parameters(self) -> int:
        """Sum of the parameters of all sites."""
        return sum(self.counts or (prod(site.covered) for site in self))

    @property
    def hash(self) -> str:
        """sha256 of the sites."""
        return hashlib.sha256(json.dumps(self.to_list(), sort_keys=True).encode()).hexdigest()

    def to_list(self) -> list[dict[str, Any]]:
        """Returns the sites as the plain data that JSON holds, for a card."""
        sites: list[dict[str, Any]] = json.loads(json.dumps([asdict(site) for site in self]))
        return sites

    @classmethod
    def from_list(cls, data: Iterable[Mapping[str, Any]]) -> Plan:
        """Returns the plan that `to_list` wrote (lists of JSON become tuples again)."""

        def plain(site: Mapping[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in site.items()}

        return cls(tuple(Site(**plain(site)) for site in data))

    def __str__(self) -> str:
        counts = self.counts or tuple(prod(site.covered) for site in self)
        lines = [("site", "kind", "role", "tower", "shape", "parameters")]
        for site, count in zip(self, counts, strict=True):
            shape = " x ".join(map(str, site.covered))
            lines.append((site.key, site.kind, site.role or "-", site.tower or "-", shape, f"{count:,}"))
        lines.append((f"{len(self)} sites", "", "", "", "", f"{self.parameters:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


Model = nn.Module | Mapping[str, nn.Module]
"""A model, or its components (``{"unet": ..., "text_encoder": ...}``), whose names begin the paths of their sites."""


def named_modules(model: Model) -> dict[str, nn.Module]:
    """Returns every module of a model by path; those of a mapping's components begin with their name, if any."""
    if isinstance(model, nn.Module):
        return dict(model.named_modules())
    return {
        f"{component}.{name}" if component and name else component or name: module
        for component, root in model.items()
        for name, module in root.named_modules()
    }


def plan_sites(
    model: Model,
    targets: str | Sequence[str] = "attention",
    kinds: Iterable[str] = WEIGHTS,
    roles: Iterable[str] | None = None,
    towers: Iterable[str] | None = None,
) -> Plan:
    """Returns the sites of a model that the targets name.

    Args:
        model: the model or its components.
        targets: one or several of: a role (``q k v o up gate down head``; rows of a packed projection where needed);
            ``attention`` (q k v o), ``mlp`` (up gate down), ``all-linear`` (every linear but heads), ``all`` (those
            and convolutions), ``embedding``, ``norm``, ``everything`` (``all`` and ``norm``); or a regular expression
            for the whole path or its end after a dot (``attn.qkv``).
        kinds: look only at these kinds.
        roles: keep only these roles.
        towers: keep only these towers.

    Raises:
        SiteError: a target that names nothing, or filters that leave nothing.
    """
    kinds = tuple(kinds)
    sites = [site for site in _all_sites(model) if site.kind in kinds]
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen: dict[str, Site] = {}
    for target in wanted:
        found = [site for site in sites if matches(target, site)]
        if not found:
            raise _unknown_target(target, model, sites)
        chosen.update((site.key, site) for site in found)
    kept = _filtered(_filtered(list(chosen.values()), "role", roles), "tower", towers)
    whole = {site.name for site in kept if site.rows is None}
    overlap = sorted({site.name for site in kept if site.rows is not None and site.name in whole})
    if overlap:
        raise SiteError(overlap[0], "targeted as a whole and by rows", "name either the projection or its roles")
    order = {site.key: place for place, site in enumerate(sites)}
    return Plan(tuple(sorted(kept, key=lambda site: order[site.key])))


def plan_biases(model: Model, targets: str | Sequence[str], towers: Iterable[str] | None = None) -> Plan:
    """Returns the biases of the linear layers, convolutions and norms that the targets name, as sites of their own.

    Raises:
        SiteError: as `plan_sites`, or if nothing that is named has a bias.
    """
    modules = named_modules(model)
    found = plan_sites(model, targets, ("linear", "packed", "mha", "conv", "norm"), towers=towers)
    kept = []
    for site in found:
        bias = getattr(modules[site.name], weight_names(modules[site.name])[1], None)
        if bias is not None:
            kept.append(replace(site, kind="bias", shape=tuple(bias.shape)))
    if not kept:
        raise SiteError(f"targets {targets}", "none of these layers has a bias", "use ssf, or choose other targets")
    return Plan(tuple(kept))


def plan_parameters(
    model: Model, targets: str | Sequence[str], kinds: Iterable[str], towers: Iterable[str] | None = None
) -> Plan:
    """Returns the weights that the targets name, and behind them the biases of these layers, if there are any.

    Raises:
        SiteError: as `plan_sites`.
    """
    weights = plan_sites(model, targets, kinds, towers=towers).sites
    try:
        return Plan((*weights, *plan_biases(model, targets, towers)))
    except SiteError:  # a model without biases
        return Plan(weights)


def plan_blocks(
    model: Model, targets: str | Sequence[str] = ("attention", "mlp"), towers: Iterable[str] | None = None
) -> Plan:
    """Returns the sublayers of a transformer: whole attention and feed-forward modules, with shape (output, input).

    A sublayer is the smallest module that holds a first projection (role q or up) and the last one after it (o, down).
    One that also holds the norm behind its last projection, as BERT's attention, is none: it is the sublayer, its
    residual and its norm.

    Raises:
        SiteError: a target other than attention and mlp, or no such sublayer.
    """
    ends = {"attention": ("q", "o", "up"), "mlp": ("up", "down", "q")}
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    modules = named_modules(model)
    sites, order = _all_sites(model), list(modules)
    found: dict[str, Site] = {}
    for target in wanted:
        if target not in ends:
            raise SiteError(f"target {target!r}", "no kind of sublayer", "use attention or mlp")
        first, last, never = ends[target]
        for end in [site for site in sites if site.role == last and site.kind in ("linear", "mha")]:
            block = _sublayer(end, sites, first)
            while isinstance(modules.get(block), nn.ModuleList | nn.ModuleDict):  # these are never called
                block = block.rpartition(".")[0]
            inside = [site for site in sites if site.name.startswith(f"{block}.") or site.name == block]
            roles = {site.role: site for site in inside}
            norms = [site for site in inside if site.kind == "norm" and site.shape[0] == end.shape[0]]
            behind = any(order.index(norm.name) > order.index(end.name) for norm in norms)
            if block and never not in roles and not behind:
                found[block] = Site(block, "block", (end.shape[0], roles[first].shape[1]), None, end.tower, target)
    if missing := [target for target in wanted if not any(site.role == target for site in found.values())]:
        raise SiteError(f"sublayers {', '.join(missing)}", "the model has none as modules", "choose other targets")
    kept = _filtered(sorted(found.values(), key=lambda site: order.index(site.name)), "tower", towers)
    return Plan(tuple(kept))


def _sublayer(end: Site, sites: Sequence[Site], first: str) -> str:
    """Path of the smallest module around a site that holds a projection of role ``first`` too; empty for none."""
    path = end.name
    while path := path.rpartition(".")[0]:
        if any(site.role == first and f"{site.name}.".startswith(f"{path}.") for site in sites):
            return path
    return ""


def _filtered(sites: list[Site], field: str, allowed: Iterable[str] | None) -> list[Site]:
    if allowed is None:
        return sites
    allowed = tuple(allowed)
    kept = [site for site in sites if getattr(site, field) in allowed]
    if not kept:
        present = sorted({str(getattr(site, field)) for site in sites})
        raise SiteError(f"{field}s {', '.join(allowed)}", "no such site among the targets", f"use {', '.join(present)}")
    return kept


def weight_names(module: nn.Module) -> tuple[str, str]:
    """Returns the names of the parameters that the sites of a module cover: its weight and its bias."""
    packed = isinstance(module, nn.MultiheadAttention)
    return ("in_proj_weight", "in_proj_bias") if packed else ("weight", "bias")


def is_dense(weight: Tensor) -> bool:
    """Whether a weight is a plain tensor of floats: not packed integers, and no subclass that computes by itself."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def told(weight: Tensor) -> str:
    """Returns what a weight is that is not dense, for a message."""
    how = "shared out over processes" if hasattr(weight, "full_tensor") else "quantised"
    return f"its weight is {how} ({type(weight).__name__}, {weight.dtype})"


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Returns the shape of a module's weight; packed integers of a linear layer have that of what they stand for."""
    # A parameter, or what a parametrisation or a slot makes of it.
    weight: Any = getattr(module, weight_names(module)[0], None)
    if isinstance(module, nn.Linear) and weight is not None and not weight.is_floating_point():
        return (module.out_features, module.in_features)
    return () if weight is None else tuple(weight.shape)


def channel_dim(module: nn.Module) -> int:
    """Returns the dimension of a layer's output that its weight's first one belongs to."""
    name = type(module).__name__
    first = isinstance(module, nn.GroupNorm) or "BatchNorm" in name or "InstanceNorm" in name or name.endswith("2d")
    return 1 if first or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a remedy that offers the known names nearest to a name."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else "print the model's named_modules() for its names"


def _all_sites(model: Model) -> list[Site]:
    modules = named_modules(model)
    sites = []
    for name, module in modules.items():
        kind = _kind(module)
        if kind is None:
            continue
        site = Site(name, kind, weight_shape(module), None, _tower(name, modules), _role(name))
        if kind == "mha":
            sites += _split(site, ("q", "k", "v"), "mha")
            continue
        if kind == "linear" and is_plain_attention(modules.get(name.rpartition(".")[0])):
            sites.append(replace(site, kind="mha"))  # its output projection
            continue
        sites.append(site)
        if kind == "linear":
            sites += _rows(site)
    return sites


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return "conv" if module.padding_mode == "zeros" else None
    if isinstance(module, nn.MultiheadAttention):
        return "mha" if is_plain_attention(module) else None
    if isinstance(module, nn.Embedding):
        return "embedding"
    scale = getattr(module, "weight", None)
    return "norm" if "Norm" in type(module).__name__ and isinstance(scale, nn.Parameter) and scale.dim() == 1 else None


def ends(name: str, pattern: str) -> bool:
    """Returns whether a pattern is that of a whole path, or of its end after a dot.

    Raises:
        SiteError: no regular expression.
    """
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error as error:
        raise SiteError(f"target {pattern!r}", f"not a regular expression ({error})", "escape its symbols") from None


def _role(name: str) -> str | None:
    return next((role for role, pattern in _ROLES if ends(name, pattern)), None)


def _rows(site: Site) -> list[Site]:
    """Sites of the roles packed in one projection, in order."""
    for pattern, roles in _PACKED:
        if ends(site.name, pattern) and site.shape[0] % len(roles) == 0:
            return _split(site, roles, "packed")
    return []


def _split(site: Site, roles: tuple[str, ...], kind: str) -> list[Site]:
    size = site.shape[0] // len(roles)
    return [replace(site, kind=kind, rows=(k * size, (k + 1) * size), role=role) for k, role in enumerate(roles)]


def _tower(name: str, modules: dict[str, nn.Module]) -> str | None:
    parts = name.split(".")
    tower = None
    for depth in range(len(parts) + 1):
        module = modules.get(".".join(parts[:depth]))
        if module is None:
            continue
        labels = [type(module).__name__, f"{type(module).__name__}/{parts[depth] if depth < len(parts) else ''}"]
        found = next((word for pattern, word in _TOWERS if any(re.fullmatch(pattern, label) for label in labels)), None)
        tower = found or tower
    return tower


def matches(target: str, site: Site) -> bool:
    """Returns whether a target of `plan_sites` names a site."""
    by_role = {"attention": _ATTENTION, "mlp": _MLP}
    if target in by_role or target in {role for role, _ in _ROLES}:
        return site.role in by_role.get(target, (target,)) and site.kind in ("linear", "packed", "mha")
    if target in _GROUPS:
        return site.kind in _GROUPS[target] and site.role != "head"
    return (site.rows is None or site.kind == "mha") and ends(site.name, target)


def _unknown_target(target: str, model: Model, sites: list[Site]) -> SiteError:
    hits = [(name, module) for name, module in named_modules(model).items() if name and ends(name, target)]
    if hits:
        name, module = hits[0]
        reason = (
            f"matches {name}, a {type(module).__name__}, which is no site of kind linear, packed, conv or embedding"
        )
        return SiteError(f"target {target!r}", reason, "target the layers inside it")
    words = ["attention", "mlp", *_GROUPS, *(role for role, _ in _ROLES)]
    tails = [site.name.rpartition(".")[2] for site in sites]
    remedy = nearest(target, [*words, *tails, *(site.name for site in sites)])
    return SiteError(f"target {target!r}", "no site of the model has this role or path", remedy)
