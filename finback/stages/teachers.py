"""Teachers of distillation: models in this process, or servers that report their likeliest tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finback.checkpoint import models
from finback.client import RequestFailed, Retries
from finback.data.tokenizer import Tokenizer
from finback.model.count import forward_flops_of
from finback.model.logprobs import in_chunks, rows_at_once
from finback.parallel.mesh import World
from finback.rollouts import server_checks
from finback.rollouts.dispatcher import Dispatcher
from finback.rollouts.generation_server import GenerationServer, Likeliest, ServedModel
from finback.rollouts.servers import Servers, connected
from finback.runs.external import ExternalEngines
from finback.runs.folder import StageRun
from finback.stages.tuning_setup import frozen_share
from finback.train.batch import Batch, idle
from finback.train.loss import cross_entropy, distillation, likeliest_distillation
from finback.train.trainer import Trainer

if TYPE_CHECKING:
    from finback.stages.distill import Distill

CHUNK = 512  # tokens whose logits (student and teacher) are in memory at once; fewer for a large vocabulary
FOREIGN = "Their probabilities cannot be compared: sample traces with a reject stage and use SFT."


class Teacher(ABC):
    """One teacher of a stage. Its outputs for a batch's labels (`outputs`) go to `divergence` in chunks, like the student's states."""

    def __init__(self, stage: "Distill", vocab: int) -> None:
        self.stage, self.vocab = stage, vocab

    @abstractmethod
    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The teacher's outputs, one row per learnt label. Collective if the student is sharded."""

    @abstractmethod
    def divergence(self, logits: Tensor, *outputs: Tensor) -> Tensor:
        """Divergences (n,) of the student's logits (n, vocab) from the teacher's outputs for the same n labels."""

    def flops(self, lengths: Sequence[int]) -> float:
        """Known FLOPs of reading documents of these lengths."""
        return 0.0

    def close(self) -> None:  # noqa: B027 - models hold nothing
        """Let go of connections."""


class ModelTeacher(Teacher):
    """A model in this process, whole or sharded like the student."""

    def __init__(self, stage: "Distill", run: StageRun, name: str, trainer: Trainer, tokenizer: Tokenizer) -> None:
        super().__init__(stage, tokenizer.vocab_size)
        folder, self.in_step = run.input(name), trainer.in_step
        if trainer.in_step:
            self.model = frozen_share(stage, folder, trainer, torch.float32, "teacher").model
        else:
            self.model = models.load(folder).eval().to(World.of(run).device)
        self.config = self.model.config
        longest, window = stage.seq_len if stage.task is None else stage.max_tokens, self.config.max_position_embeddings
        if longest > window:
            problem = f"reads {window} tokens, lessons may have {longest}"
            remedy = "Shorten seq_len or max_tokens, or use another teacher."
            raise stage.wrong("teacher", problem, remedy)
        if tokenizer.as_json() != Tokenizer(folder).as_json():
            raise stage.wrong("teacher", "does not have the student's tokenizer", FOREIGN)

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Final hidden states (n, hidden_size)."""
        device, learnt = batch.tokens.device, batch.learnt
        if not len(batch.tokens):
            if not self.in_step:
                return (torch.empty(0, self.config.hidden_size, device=device),)
            batch = idle(1).to(device)  # other ranks may have rows of its domain
        tokens, _, document_ids = batch.inputs
        with torch.no_grad():
            states: Tensor = self.model(tokens, document_ids=document_ids)
        return (states[learnt] if len(learnt) else states[:0, 0],)

    def divergence(self, logits: Tensor, *outputs: Tensor) -> Tensor:
        theirs = self.model.logits(outputs[0])[:, : self.vocab]  # the head may be padded differently from the student's
        return distillation(logits, theirs, self.stage.divergence, self.stage.top_k)

    def flops(self, lengths: Sequence[int]) -> float:
        return forward_flops_of(self.config, lengths)


class ServerTeacher(Teacher):
    """Servers of one model; each reads some of the rows."""

    def __init__(self, stage: "Distill", run: StageRun, knobs: Servers, tokenizer: Tokenizer, domain: str = "") -> None:
        super().__init__(stage, tokenizer.vocab_size)
        field = f"{stage.name}.teacher"
        self.hired: ExternalEngines | None = None
        self.knobs, self.retries = knobs, Retries(knobs.tries, backoff=knobs.backoff)
        self.clients = knobs.clients(field)
        try:
            self.servers = connected(self.clients, field, ServedModel(self.vocab, 0, 0))
            name = f"{field}.{domain}" if domain else field
            # nothing says how large the served model is
            self.hired = run.hire(name, knobs.price, [each.count for each in self.servers], knows_flops=False)
            for server in self.servers if run.is_writer else ():
                self._check(server, tokenizer)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _check(server: GenerationServer, tokenizer: Tokenizer) -> None:
        try:
            has_one = server_checks.has_tokenizer(server, tokenizer, FOREIGN)
        except RequestFailed as error:
            raise server.unfit(f"failed: {error}", "See its log.") from None
        if not has_one:
            raise server.unfit("has no tokenizer to compare with the student's", "Start it with one.")

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Ids of the likeliest tokens, and their log-probabilities, both (n, top_k)."""
        tokens, padding_mask, _ = batch.inputs
        assert padding_mask is not None, "each answer has its own row"
        texts = [ids[mask].tolist() for ids, mask in zip(tokens, padding_mask, strict=True)]

        def ask(server: GenerationServer, places: Sequence[int]) -> Iterator[tuple[int, list[Likeliest]]]:
            for place in places:
                yield place, server.likeliest(texts[place], self.stage.top_k)

        found = dict(Dispatcher(self.servers, ask, len(texts), self.knobs.concurrency, self.retries).results())
        learnt = [row.nonzero().flatten().tolist() for row in batch.learnt]
        likeliest = [found[row][place] for row, places in enumerate(learnt) for place in places]
        pairs = torch.tensor(likeliest, dtype=torch.float64, device=tokens.device).view(-1, self.stage.top_k, 2)
        return pairs[..., 0].long(), pairs[..., 1].float()

    def divergence(self, logits: Tensor, *outputs: Tensor) -> Tensor:
        ids, logprobs = outputs
        return likeliest_distillation(logits, ids, logprobs, self.stage.divergence)

    def close(self) -> None:
        if self.hired is not None:
            self.hired.leave()
        for client in self.clients.values():
            client.close()


class DistillationTeacher:
    """The main loss of a student that learns, for each row, from the probabilities of that row's teacher."""

    def __init__(self, stage: "Distill", run: StageRun, trainer: Trainer, tokenizer: Tokenizer) -> None:
        self.stage, self.student, self.vocab = stage, trainer.model, tokenizer.vocab_size
        self.teachers: list[Teacher] = []
        try:
            for domain, named in stage.teachers.items():
                self.teachers.append(
                    ModelTeacher(stage, run, named, trainer, tokenizer)
                    if isinstance(named, str)
                    else ServerTeacher(stage, run, named, tokenizer, domain)
                )
        except BaseException:
            self.close()
            raise

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The divergence summed over labels, mixed with SFT's loss by the weight `hard`."""
        stage, soft = self.stage, list[Tensor]()
        rows = min(CHUNK, rows_at_once(self.vocab))
        for number, teacher in enumerate(self.teachers):
            mine = batch.taught_by(number)
            ours = hidden if mine is batch else hidden[batch.teachers == number]
            outputs = teacher.outputs(mine)

            def summed(states: Tensor, *outputs: Tensor, teacher: Teacher = teacher) -> tuple[Tensor]:
                return (teacher.divergence(self.student.logits(states)[:, : self.vocab], *outputs).sum()[None],)

            if len(outputs[0]):
                soft.append(in_chunks(summed, rows, ours[mine.learnt], *outputs)[0].sum())
        divergence = sum(soft[1:], soft[0]) if soft else hidden.sum() * 0
        if not stage.hard:
            return divergence
        hard = cross_entropy(hidden.flatten(0, 1), self.student.head.weight, batch.labels_at(0).flatten())
        return (1 - stage.hard) * divergence + stage.hard * hard

    @property
    def knows_flops(self) -> bool:
        """Whether the FLOPs of a teacher are counted."""
        return self.stage.knows_flops

    def flops(self, batch: Batch) -> float:
        """FLOPs of the teachers in this process; those of servers are unknown."""
        taught = [(teacher, batch.taught_by(number)) for number, teacher in enumerate(self.teachers)]
        return sum(teacher.flops(rows.lengths()) for teacher, rows in taught)

    def close(self) -> None:
        """Let go of connections."""
        for teacher in self.teachers:
            teacher.close()
