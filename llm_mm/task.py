"""The training task that a job of this domain hands to the loop: rows as tokens, one forward, loss on the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import IGNORED, Conversation, Tokens, Writer
from graft.llm_mm.data import DataConfig, Rows
from graft.llm_mm.joint import kinds, parted, shares
from graft.llm_mm.method import model_inputs
from graft.llm_mm.packing import position_ids, together
from graft.llm_mm.parts import PARTS, part_of
from graft.llm_mm.pictures import PictureStore
from graft.studio.adapter import Adapter, Card
from graft.studio.config import to_dict
from graft.studio.disk import write_json

if TYPE_CHECKING:
    from graft.studio.job import Job


class Batch(NamedTuple):
    """Token ids, labels and padding mask (b, n), and the pictures in the order of their places.

    Packed rows have positions (b, n), too, which begin anew with each conversation and with the padding.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    pictures: tuple[Any, ...]
    positions: Tensor | None = None


@dataclass(frozen=True)
class Reader:
    """A base with all that turns conversations into its batches and a batch into logits."""

    base: MultimodalBase
    store: PictureStore
    writer: Writer
    length: int = 0
    """Most tokens of a row; 0 takes all."""
    learn: str = "answers"
    """Or "all": every token but those of pictures."""

    @classmethod
    def of(cls, base: MultimodalBase, data: DataConfig, cache: Any = None) -> Reader:
        """Returns one for a data section."""
        store = PictureStore(base, data.fit, data.background, cache if data.cache else None)
        return cls(base, store, Writer(base.processor), data.length, data.learn)

    def tokens(self, row: Conversation) -> Tokens:
        """Ids and labels of a conversation."""
        found = self.writer.tokens(row, self.store.expand, self.length)
        if self.learn == "answers":
            return found
        labels = [IGNORED if token == self.writer.image_id else token for token in found.ids]
        return replace(found, labels=[IGNORED, *labels[1:]])  # in a packed row another conversation comes before

    def batch(self, rows: Sequence[Conversation], most: int = 0) -> tuple[Batch, list[Tokens]]:
        """Rows side by side, padded at their ends; and the tokens of each.

        Args:
            rows: one or more.
            most: tokens of a packed row, which holds several of them in another order; 0 packs none.
        """
        found = [self.tokens(row) for row in rows]
        lengths = [len(each.ids) for each in found]
        groups = together(lengths, most) if most else [[k] for k in range(len(rows))]
        longest = max(sum(lengths[k] for k in group) for group in groups)
        tokenizer = self.writer.tokenizer
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

        def column(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            told = [[value for k in group for value in values[k]] for group in groups]
            return torch.stack([pad(torch.tensor(each), (0, longest - len(each)), value=fill) for each in told])

        pictures = tuple(
            rows[k].pictures[part]
            for group in groups
            for k in group
            for turn in _kept(rows[k], found[k])
            for part in turn.parts
            if isinstance(part, int)
        )
        mask, positions = column([[1] * n for n in lengths], 0), None
        if most:
            positions = column([range(n) for n in lengths], 0)
            positions = torch.where(mask == 1, positions, (1 - mask).cumsum(1) - 1)
        labels = column([[IGNORED, *each.labels[1:]] for each in found], IGNORED)  # nothing tells a first token
        return Batch(column([each.ids for each in found], filler), labels, mask, pictures, positions), found

    def logits(self, batch: Batch, frozen_tower: bool) -> tuple[Tensor, Tensor]:
        """Logits before each learnt token and these tokens, (m, vocabulary) and (m,), row by row.

        Args:
            batch: of `batch`.
            frozen_tower: whether the image tower is the base's own, so that what it says may come from the cache.
        """
        base = self.base
        ids, labels = batch.ids.to(base.device), batch.labels.to(base.device)
        places = labels[:, 1:] != IGNORED
        positions = None if batch.positions is None else batch.positions.to(base.device)
        mask = batch.mask.to(base.device) if positions is None else None
        if not (frozen_tower and self.store.features_kept):
            given = model_inputs(base, ids, mask, self.store.inputs(batch.pictures))
            if positions is not None:
                shown = ids == self.writer.image_id
                given["position_ids"] = position_ids(base.model, ids, positions, shown, given)
            logits = base.model(**given, use_cache=False).logits[:, :-1][places]
            return logits.float(), labels[:, 1:][places]
        model = base.model.model
        embeds = model.get_input_embeddings()(ids)
        if batch.pictures:
            seen = model.multi_modal_projector(self.store.features(batch.pictures)).to(embeds.dtype)
            embeds = embeds.masked_scatter((ids == self.writer.image_id)[..., None], seen)
        given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        hidden = model.language_model(**given, use_cache=False).last_hidden_state
        return base.model.lm_head(hidden[:, :-1][places]).float(), labels[:, 1:][places]


def _kept(row: Conversation, tokens: Tokens) -> Sequence[Any]:
    """The turns that were not dropped."""
    ends = [k + 1 for k, turn in enumerate(row.turns) if turn.role == "assistant"]
    return row.turns[: ends[len(tokens.answers) - 1]]


class LanguageTask(nn.Module):
    """What the loop trains; `parameters()` and the saved state are those of the bank, the only child.

    Args:
        job: its name of the method, batch size, and steps between measurements are read.
        reader: of the base, with the adapter attached.
        handle: of the adapter.
        method: its settings.
        data: the job's data section.
        rows: to train on, to be asked and to be tested with.
        old: the rows of old data, if there are any.
    """

    def __init__(
        self, job: Job, reader: Reader, handle: Any, method: Any, data: DataConfig, rows: Rows, old: Rows | None = None
    ):
        super().__init__()
        self.name, self.batch_size, self.every = str(job.method["name"]), job.train.batch_size, job.sample.every
        self.reader, self.handle, self.method = reader, handle, method
        self.data, self.rows, self.old = data, rows, old
        self.bank = handle.bank
        self.disjoint = bool(getattr(method, "disjoint", False))
        self.frozen_tower = all(part_of(site.name) in ("projector", "language") for site in handle.plan)
        self.measured: dict[str, Tensor] = {}
        self.facts = ""

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate of each part."""
        if hasattr(self.method, "rates"):
            found: dict[str, float] = self.method.rates()
            return found
        return dict.fromkeys((*PARTS, "other"), self.default_learning_rate)

    @property
    def default_learning_rate(self) -> float:
        """The method's own."""
        return float(getattr(self.method, "default_learning_rate", 1e-3))

    @property
    def trained(self) -> dict[str, int]:
        """Trained numbers of each part."""
        counts: dict[str, int] = {}
        for name, parameter in self.bank.named_parameters():
            counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
        return counts

    def param_groups(self) -> list[dict[str, Any]]:
        """One for each part, at its learning rate."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.bank.named_parameters():
            groups.setdefault(part_of(name), []).append(parameter)
        rates = self.rates
        scale = {part: rates.get(part, self.default_learning_rate) / self.default_learning_rate for part in groups}
        return [{"params": params, "lr_scale": scale[part]} for part, params in groups.items()]

    def origin(self) -> dict[str, str]:
        """Digests of the base and of the data."""
        old = {"old_digest": self.old.digest} if self.old is not None else {}
        return {
            "base": self.reader.base.name,
            "base_hash": self.reader.base.hash,
            "data_digest": self.rows.digest,
            **old,
        }

    def files(self) -> dict[str, str]:
        """What the run folder gets beside the job: the table of parts."""
        return {"parts.txt": self.facts + "\n"}

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Rows of one step, old ones among them by their share."""
        count = round(self.data.replay * self.batch_size) if self.old is not None else 0
        if self.disjoint:
            each = zip(kinds(self.rows.train), shares(self.batch_size - count, self.rows.train), strict=True)
            rows = [row for some, share in each for row in _drawn(some, share, generator)]
        else:
            rows = _drawn(self.rows.train, self.batch_size - count, generator)
        if self.old is not None and count:
            rows += _drawn(self.old.train, count, generator)
        return self.reader.batch(rows, self.data.packing)[0]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy of the answers' tokens, and the share of them that are the likeliest ones.

        Where the method's parts are taught by kinds of rows, it is the sum over both, each a figure of its own.
        """
        told: dict[str, Tensor] = {}
        if self.disjoint:
            found = []
            for part, some in parted(batch, self.reader.writer.image_id).items():
                with self.method.learning(self.handle, part):
                    found.append(self.reader.logits(some, self.frozen_tower))
                    told[part] = cross_entropy(*found[-1])
            loss, (logits, labels) = torch.stack(list(told.values())).sum(), map(torch.cat, zip(*found, strict=True))
            told = {part: value.detach() for part, value in told.items()}
        else:
            logits, labels = self.reader.logits(batch, self.frozen_tower)
            loss = cross_entropy(logits, labels)
        penalty = self.handle.penalty() if hasattr(self.handle, "penalty") else None
        hit = (logits.argmax(-1) == labels).float().mean()
        return loss if penalty is None else loss + penalty, {"token_accuracy": hit, **told, **self.measured}

    def before_step(self, step: int, steps: int) -> None:
        """Lets the method prepare the step; measures what is kept aside when that is due."""
        if hasattr(self.handle, "before_step"):
            self.handle.before_step(step, steps)
        due = self.every > 0 and step % self.every == 0
        self.measured = {k: torch.tensor(v) for k, v in self.validate().items()} if due else {}

    def after_step(self, step: int, steps: int) -> None:
        """Lets the method follow the step."""
        if hasattr(self.handle, "after_step"):
            self.handle.after_step(step, steps)

    def validate(self) -> dict[str, float]:
        """All figures of rows kept aside, also with other pictures and with none; and exact match on old data."""
        from graft.llm_mm.evaluation import exact_match, measured

        figures: dict[str, float] = {}
        reader = replace(self.reader, learn="answers")
        mode = self.bank.training
        self.bank.eval()
        try:
            asked = self.rows.val[: self.data.checked]
            for name, value in measured(reader, asked, self.frozen_tower).items() if asked else ():
                control = "exact_" * (name in ("rotated", "blank"))
                figures |= {f"val_{control}{name.replace(' ', '_')}": value} if name != "questions" else {}
            if self.old is not None and self.old.val:
                figures["old_exact"] = exact_match(reader, self.old.val[: self.data.checked], "", self.frozen_tower)
        finally:
            self.bank.train(mode)
        return {name: value for name, value in figures.items() if value == value}

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draws pictures kept aside with what is answered now; the figures stand beside."""
        from graft.llm_mm.previews import answered, sheet

        rows = [row for row in (self.rows.val or self.rows.train) if row.pictures][:12]
        if not rows:
            return []
        mode = self.bank.training
        self.bank.eval()
        try:
            told = answered(self.reader, [row.asking() for row in rows])
        finally:
            self.bank.train(mode)
        lines = [
            [row.turns[-2].text, f"right: {row.answers[-1]}", f"now: {now}"]
            for row, now in zip(rows, told, strict=True)
        ]
        path = Path(folder) / f"step-{step:06d}.png"
        sheet([self.reader.store.open(row.pictures[0]) for row in rows], lines, path)
        write_json(path.with_suffix(".json"), [line[1:] for line in lines])
        return [path]

    def adapter(self, metrics: dict[str, Any], slot: int = 0) -> Adapter:
        """What has been learnt so far."""
        base = self.reader.base
        details: dict[str, Any] = {key: getattr(self.data, key) for key in ("fit", "background", "system", "learn")}
        details["processor"] = base.picture_settings
        card = Card(
            method=self.name,
            config=to_dict(self.method),
            domain="llm_mm",
            base=base.name,
            base_hash=base.hash,
            sites=self.handle.plan.to_list(),
            metrics=metrics | {"parameters": sum(self.trained.values())} | self.validate(),
            data_digest=self.rows.digest,
            details=details,
        )
        return Adapter(self.handle.tensors(slot), card)


def _drawn(rows: Sequence[Conversation], count: int, generator: torch.Generator) -> list[Conversation]:
    """Rows at random, none twice before every one came once."""
    rounds = -(-count // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])[:count]
    return [rows[k] for k in order.tolist()]


def ways(handle: Any, trained: Mapping[str, int]) -> dict[str, str]:
    """How each trained part is trained, in words."""
    told = getattr(getattr(handle, "method", None), "ways", None)
    if told is not None:
        return {part: {"lora": "LoRA"}.get(way, way) for part, way in told.items()}
    name = type(handle.rule).__name__ if getattr(handle, "rule", None) is not None else "trained"
    return dict.fromkeys(trained, name.removeprefix("Language"))
