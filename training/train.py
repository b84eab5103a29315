"""Trains Lutra's bundled model: a small ternary llama-architecture language model, on the CPU.

The blocks' linear layers are ternary with a straight-through estimator and one absmean scale per matrix, as in BitNet
b1.58 (arXiv:2402.17764); embedding and head are one tied matrix, trained against its Q8_0 rounding. Weights are plain
for the first part of the run and ternary from `ternary_from` on.

Everything that decides the result is the seed, the data (its SHA-256 is recorded) and the configuration: the batch of
step n is drawn from a generator seeded by (seed, n), so that a resumed run continues the same sequence of batches.

    python training/train.py --data ../shared/data/text/books --out training/checkpoints
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model and of its training."""

    vocab: int = 4096
    embedding: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 768
    context: int = 512
    rope_base: float = 10000.0
    rms_eps: float = 1e-5
    batch: int = 16  # windows of `context` tokens a step; twice as many of half the length until `full_context_from`
    full_context_from: float = 0.6  # share of the steps
    steps: int = 1800
    warmup: int = 100
    learning_rate: float = 3e-3
    decay_from: float = 0.55  # share of the steps after which the learning rate decays to 2 %
    ternary_from: float = 0.35  # share of the steps after which the blocks are ternary
    weight_decay: float = 0.05
    seed: int = 20261124

    @property
    def head_dim(self) -> int:
        return self.embedding // self.heads


def ternary(weight: torch.Tensor) -> torch.Tensor:
    """{-1, 0, 1} times the mean magnitude, rounded to f16 as the file stores it; the gradient passes straight through."""
    scale = weight.abs().mean().clamp(min=1e-6).half().float()
    rounded = (weight / scale).round().clamp(-1, 1) * scale
    return weight + (rounded - weight).detach()


def q8(weight: torch.Tensor) -> torch.Tensor:
    """Q8_0 rounding: groups of 32 with an f16 scale; the gradient passes straight through."""
    groups = weight.detach().view(-1, 32)
    scale = (groups.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-8)
    rounded = ((groups / scale).round() * scale.half().float()).view_as(weight)
    return weight + (rounded - weight).detach()


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        kv = c.kv_heads * c.head_dim
        self.attn_norm = nn.Parameter(torch.ones(c.embedding))
        self.ffn_norm = nn.Parameter(torch.ones(c.embedding))
        shapes = dict(
            q=(c.embedding, c.embedding), k=(kv, c.embedding), v=(kv, c.embedding), o=(c.embedding, c.embedding),
            gate=(c.feed_forward, c.embedding), up=(c.feed_forward, c.embedding), down=(c.embedding, c.feed_forward),
        )
        for name, (rows, cols) in shapes.items():
            std = 0.5 * cols**-0.5 / (math.sqrt(2 * c.layers) if name in ("o", "down") else 1)
            self.register_parameter(name, nn.Parameter(torch.randn(rows, cols) * std))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, low_bit: bool) -> torch.Tensor:
        c = self.c

        def linear(value: torch.Tensor, name: str) -> torch.Tensor:
            weight = getattr(self, name)
            return F.linear(value, (ternary(weight) if low_bit else weight).to(value.dtype))

        batch, length, _ = x.shape
        h = F.rms_norm(x, (c.embedding,), self.attn_norm, c.rms_eps).to(torch.bfloat16)
        q = linear(h, "q").view(batch, length, c.heads, c.head_dim)
        k = linear(h, "k").view(batch, length, c.kv_heads, c.head_dim)
        v = linear(h, "v").view(batch, length, c.kv_heads, c.head_dim)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        repeat = c.heads // c.kv_heads
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.repeat_interleave(repeat, 2).transpose(1, 2),
            v.repeat_interleave(repeat, 2).transpose(1, 2), is_causal=True,
        )
        x = x + linear(attended.transpose(1, 2).reshape(batch, length, c.embedding), "o").float()
        h = F.rms_norm(x, (c.embedding,), self.ffn_norm, c.rms_eps).to(torch.bfloat16)
        return x + linear(F.silu(linear(h, "gate")) * linear(h, "up"), "down").float()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding over interleaved pairs, as GGUF's llama architecture stores Q and K. x: [batch, length, heads, dim]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class Model(nn.Module):
    """Decoder-only transformer with a tied head."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.token_embd = nn.Parameter(torch.randn(c.vocab, c.embedding) * 0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.output_norm = nn.Parameter(torch.ones(c.embedding))
        angles = torch.arange(c.context)[:, None] * c.rope_base ** (
            -torch.arange(0, c.head_dim, 2)[None] / c.head_dim
        )
        self.register_buffer("cos", angles.cos()[None, :, None].bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None].bfloat16(), persistent=False)

    def forward(self, ids: torch.Tensor, low_bit: bool) -> torch.Tensor:
        """ids [batch, length] → logits [batch, length, vocab]."""
        length = ids.shape[1]
        table = q8(self.token_embd) if low_bit else self.token_embd
        x = F.embedding(ids, table)
        for block in self.blocks:
            x = block(x, self.cos[:, :length], self.sin[:, :length], low_bit)
        x = F.rms_norm(x, (self.c.embedding,), self.output_norm, self.c.rms_eps)
        return F.linear(x.to(torch.bfloat16), table.to(torch.bfloat16)).float()


def read_books(folder: Path) -> tuple[list[str], str]:
    """The texts in name order, and the SHA-256 over names and bytes."""
    digest, texts = hashlib.sha256(), []
    for path in sorted(folder.glob("*.txt")):
        raw = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + raw)
        texts.append(raw.decode("utf-8"))
    if not texts:
        raise SystemExit(f"{folder} has no .txt files: pass the folder of books with --data")
    return texts, digest.hexdigest()


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[END_OF_TEXT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def split(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, int]:
    """Training ids, validation ids (the last 2 % of every book) and the bytes of the validation text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    train, valid, valid_bytes = [], [], 0
    for text in texts:
        cut = text.rfind("\n", 0, int(len(text) * 0.98)) + 1
        valid_bytes += len(text[cut:].encode())
        train += [end, *tokenizer.encode(text[:cut]).ids]
        valid += [end, *tokenizer.encode(text[cut:]).ids]
    train.append(end)
    return np.array(train, dtype=np.int64), np.array(valid, dtype=np.int64), valid_bytes


def batch_of(ids: np.ndarray, step: int, c: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step: windows at positions that only (seed, step) decide."""
    length, size = (c.context, c.batch) if step >= c.full_context_from * c.steps else (c.context // 2, 2 * c.batch)
    starts = np.random.default_rng((c.seed, step)).integers(0, len(ids) - length - 1, size=size)
    windows = torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts]))
    return windows[:, :-1], windows[:, 1:]


def learning_rate(step: int, c: Config) -> float:
    """Linear warm-up, constant, cosine decay to 2 %."""
    if step < c.warmup:
        return c.learning_rate * (step + 1) / c.warmup
    begin = c.decay_from * c.steps
    if step < begin:
        return c.learning_rate
    progress = (step - begin) / (c.steps - begin)
    return c.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model: Model, ids: np.ndarray, c: Config, low_bit: bool) -> float:
    """Mean loss in nats per token over consecutive windows."""
    model.eval()
    total = count = 0
    for start in range(0, len(ids) - c.context - 1, c.context * c.batch):
        windows = [ids[s : s + c.context + 1] for s in range(start, start + c.context * c.batch, c.context)]
        windows = torch.from_numpy(np.stack([w for w in windows if len(w) == c.context + 1]))
        logits = model(windows[:, :-1], low_bit)
        total += F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
        count += windows[:, 1:].numel()
    model.train()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text/books"))
    parser.add_argument("--out", type=Path, default=Path("training/checkpoints"))
    parser.add_argument("--stop-after", type=int, help="stop after this step, as an interruption would")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do without torch.compile")
    for field in dataclasses.fields(Config):
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    c = Config(**{f.name: args[f.name] for f in dataclasses.fields(Config)})
    torch.set_num_threads(2)
    torch.manual_seed(c.seed)
    torch.use_deterministic_algorithms(True)
    out: Path = args["out"]
    out.mkdir(parents=True, exist_ok=True)

    texts, data_hash = read_books(args["data"])
    tokenizer_file = out / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(texts, c.vocab)
        tokenizer.save(str(tokenizer_file))
    train_ids, valid_ids, valid_bytes = split(texts, tokenizer)

    model = Model(c)
    decay = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": c.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=c.learning_rate, betas=(0.9, 0.95), eps=1e-8,
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train_ids)} training tokens, "
          f"{len(valid_ids)} validation tokens of {valid_bytes} bytes, data {data_hash[:12]}", flush=True)
    checkpoint_file, log_file = out / "checkpoint.pt", out / "log.jsonl"
    step, elapsed = 0, 0.0
    if checkpoint_file.exists():
        state = torch.load(checkpoint_file, weights_only=False)
        if state["data"] != data_hash or state["config"] != dataclasses.asdict(c):
            raise SystemExit(f"{checkpoint_file} is of other data or another configuration: choose another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]

    def save() -> None:
        temporary = checkpoint_file.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "elapsed": elapsed,
                    "data": data_hash, "config": dataclasses.asdict(c)}, temporary)
        os.replace(temporary, checkpoint_file)

    compiled = torch.compile(model) if args["compile"] else model
    began = time.monotonic() - elapsed
    while step < c.steps:
        if step == args["stop_after"]:
            break
        low_bit = step >= c.ternary_from * c.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        inputs, targets = batch_of(train_ids, step, c)
        loss = F.cross_entropy(compiled(inputs, low_bit).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        elapsed = time.monotonic() - began
        if step % 20 == 0:
            row = {"step": step, "loss": round(loss.item(), 4), "norm": round(norm.item(), 3), "ternary": low_bit,
                   "seconds": round(elapsed)}
            if step % 200 == 0 or step == c.steps:
                valid = evaluate(model, valid_ids, c, low_bit)
                row |= {"valid": round(valid, 4), "bits_per_byte": round(valid * len(valid_ids) / valid_bytes / math.log(2), 4)}
            print(json.dumps(row), flush=True)
            with log_file.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if step % args["checkpoint_every"] == 0:
            save()
    save()


if __name__ == "__main__":
    main()
