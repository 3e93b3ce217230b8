"""Train the demo model on the built-in text: ``python -m llmopt.demo.train``.

About an hour on two CPU cores. Every batch and learning rate is a function of seed and step, and
checkpoints hold the optimizers, so an interrupted run resumes to the same weights on the same
machine. Until the decay begins nothing depends on the total number of steps.
"""

import argparse
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from llmopt.calibration.builtin_text import builtin_documents
from llmopt.demo.corpus import Corpus, build_corpus, training_batch
from llmopt.demo.model_card import write_model_card
from llmopt.demo.muon import Muon
from llmopt.demo.paths import demo_model_path
from llmopt.demo.perplexity import perplexity, stream_losses
from llmopt.demo.resume import load_checkpoint, save_checkpoint
from llmopt.demo.text_drift import write_text_hashes
from llmopt.demo.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, save_tokenizer, train_tokenizer

MAX_LENGTH = 2048

Trainable = LlamaForCausalLM | Qwen2ForCausalLM
"""What the pieces here train."""


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """Everything that decides the weights, besides the architecture, the text and the versions.

    ``bf16`` multiplies in bfloat16, for processors that have instructions for it; the weights stay
    in float32.
    """

    steps: int = 1800
    batch_tokens: int = 2048
    length: int = 256
    warmup_steps: int = 40
    decay_share: float = 0.4
    long_share: float = 0.2
    muon_lr: float = 0.02
    adam_lr: float = 5e-3
    weight_decay: float = 0.1
    seed: int = 0
    bf16: bool = False

    def lr_scale(self, step: int) -> float:
        """Return the factor of both learning rates: warm up, hold, fall linearly to zero."""
        decay_steps = max(1.0, self.decay_share * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / decay_steps)

    def length_at(self, step: int) -> int:
        """Return the sequence length: the last steps are long, so that long contexts work."""
        return MAX_LENGTH if step >= self.steps * (1 - self.long_share) else self.length

    def rows_at(self, step: int) -> int:
        """Return the rows of a batch: at least two, since two threads share them."""
        return max(2, self.batch_tokens // self.length_at(step))

    @property
    def num_tokens(self) -> int:
        """Tokens of all batches together."""
        return sum(self.rows_at(step) * self.length_at(step) for step in range(self.steps))


def demo_config() -> LlamaConfig:
    """Return the architecture: 4.2 M parameters, small enough to commit."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
    )


def new_demo_model(seed: int) -> LlamaForCausalLM:
    """Return a fresh fp32 demo model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(demo_config())
    silence_residuals(model)
    return model


def silence_residuals(model: Trainable) -> None:
    """Let what adds to the residual stream start at zero."""
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def new_optimizers(model: Trainable, plan: TrainPlan) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices (in two, one a thread), AdamW for the rest."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    hidden_ids = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in hidden_ids]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(hidden[0::2], lr=plan.muon_lr, weight_decay=plan.weight_decay),
        Muon(hidden[1::2], lr=plan.muon_lr, weight_decay=plan.weight_decay),
        torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class HalvedStep:
    """Training steps on two threads, each with half of the rows.

    One barrier a step instead of one an operation: on two cores shared with other work, waiting
    for the slower thread at every operation costs more than the operations.
    """

    def __init__(
        self, model: Trainable, optimizers: list[torch.optim.Optimizer], bf16: bool = False
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.bf16 = bf16
        self.params = list(model.parameters())
        self.pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, batch: torch.Tensor, scale: float) -> float:
        """Take one step on ``batch`` ([rows, length] ids) and return its loss in nats."""
        halves = batch.chunk(2)
        losses, grads = zip(*self.pool.map(self.loss_and_grads, halves), strict=True)
        for param, *parts in zip(self.params, *grads, strict=True):
            param.grad = torch.stack(parts).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
        list(self.pool.map(lambda optimizer: optimizer.step(), self.optimizers))
        return float(sum(losses) / len(losses))

    def loss_and_grads(self, rows: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        """Return the mean loss of ``rows`` and its gradients, in the order of the parameters."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        return loss.item(), torch.autograd.grad(loss, self.params)


def train(
    model: Trainable,
    plan: TrainPlan,
    corpus: Corpus,
    checkpoint: Path,
    every: int,
    stop_after: int | None = None,
) -> None:
    """Train the fp32 model in place, or go on from ``checkpoint``.

    Args:
        model: fresh from the plan's seed; a checkpoint replaces its weights.
        plan: what decides the weights.
        corpus: the token streams.
        checkpoint: file of weights and optimizer states; read if there, written as it goes.
        every: steps between two checkpoints, each with a line of progress.
        stop_after: stop after this step, as an interruption would.
    """
    optimizers = new_optimizers(model, plan)
    text_sha256 = hashlib.sha256(corpus.text.numpy().tobytes()).hexdigest()
    first = load_checkpoint(checkpoint, model, optimizers, text_sha256)
    take_step = HalvedStep(model, optimizers, plan.bf16)
    started, num_tokens = time.monotonic(), 0
    for step in range(first, stop_after or plan.steps):
        length, scale = plan.length_at(step), plan.lr_scale(step)
        batch = training_batch(corpus, step, plan.rows_at(step), length, plan.seed)
        loss = take_step(batch, scale)
        done, num_tokens = step + 1, num_tokens + batch.numel()
        if done % every == 0 or done == plan.steps:
            save_checkpoint(checkpoint, model, optimizers, text_sha256, done)
            rate = num_tokens / (time.monotonic() - started)
            valid = perplexity(stream_losses(model, corpus.validation, plan.length))
            print(
                f"step {done}/{plan.steps} loss {loss:.3f} validation perplexity {valid:.2f} "
                f"lr x{scale:.3f} {rate:.0f} tokens/s",
                flush=True,
            )


def save_model(model: Trainable, folder: Path) -> None:
    """Write config, generation config and bf16 weights."""
    model.generation_config = GenerationConfig.from_dict(
        {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "do_sample": False}
    )
    model.bfloat16()
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors leaves them to the owner alone; a wheel is for everyone


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    plan = TrainPlan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=plan.steps)
    parser.add_argument("--batch-tokens", type=int, default=plan.batch_tokens)
    parser.add_argument("--length", type=int, default=plan.length)
    parser.add_argument("--out", type=Path, default=demo_model_path())
    parser.add_argument("--checkpoint", type=Path, default=Path("demo-output/train.pt"))
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--documents", type=int, help="train on the first N documents only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train tokenizer and model, write both, the model card and the hashes of the text."""
    args = parse_args(argv)
    torch.set_num_threads(1)  # HalvedStep has two threads of its own
    plan = TrainPlan(steps=args.steps, batch_tokens=args.batch_tokens, length=args.length)
    documents = builtin_documents("train")[: args.documents]
    tokenizer = train_tokenizer(document.text for document in documents)
    corpus = build_corpus(tokenizer, documents)
    print({name: len(stream) for name, stream in asdict(corpus).items()}, "tokens", flush=True)
    model = new_demo_model(plan.seed)
    train(model, plan, corpus, args.checkpoint, args.every)
    args.out.mkdir(parents=True, exist_ok=True)
    save_model(model, args.out)
    save_tokenizer(tokenizer, args.out, MAX_LENGTH)
    write_text_hashes(args.out.parent / "text_hashes.json")
    training = {**asdict(plan), "tokens": plan.num_tokens}
    write_model_card(args.out, training, builtin_documents("evaluation")[: args.documents])


if __name__ == "__main__":
    main()
