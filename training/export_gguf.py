"""Writes a training checkpoint as GGUF: blocks in TQ2_0, the tied embedding in Q8_0, norms in F32.

    python training/export_gguf.py --checkpoints training/checkpoints --out models/lutra-books-6M-TQ2_0.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer

from train import END_OF_TEXT, Config


def tq2_0(weight: torch.Tensor) -> np.ndarray:
    """The ternary values that training used, as TQ2_0 blocks: 256 two-bit codes and an f16 scale.

    The quantiser of the `gguf` package takes each block's largest magnitude as its scale; given the rounded weights it
    therefore finds exactly the scale and the values that `train.ternary` computed with, unless a block is all zero,
    where any scale is right.
    """
    scale = weight.abs().mean().clamp(min=1e-6).half().float()
    rounded = (weight / scale).round().clamp(-1, 1) * scale
    packed = gguf.quants.quantize(rounded.numpy(), Type.TQ2_0)
    if not np.array_equal(gguf.quants.dequantize(packed, Type.TQ2_0), rounded.numpy()):
        raise AssertionError("TQ2_0 changed a ternary weight")
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=Path("training/checkpoints"))
    parser.add_argument("--out", type=Path, default=Path("models/lutra-books-6M-TQ2_0.gguf"))
    args = parser.parse_args()

    state = torch.load(args.checkpoints / "checkpoint.pt", weights_only=False)
    c, weights = Config(**state["config"]), state["model"]
    tokenizer = json.loads(Tokenizer.from_file(str(args.checkpoints / "tokenizer.json")).to_str())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    if [i for _, i in vocabulary] != list(range(c.vocab)):
        raise SystemExit(f"the tokenizer has {len(tokens)} tokens, the model {c.vocab}: train with --vocab {len(tokens)}")
    end = tokens.index(END_OF_TEXT)

    w = gguf.GGUFWriter(args.out, "llama")
    w.add_name("Lutra Books 6M")
    w.add_author("The Lutra authors")
    w.add_description("A small ternary text-completion model trained on public-domain children's books")
    w.add_license("mit")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_TQ2_0)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_vocab_size(c.vocab)
    w.add_context_length(c.context)
    w.add_embedding_length(c.embedding)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.feed_forward)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_base)
    w.add_layer_norm_rms_eps(c.rms_eps)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if t == END_OF_TEXT else gguf.TokenType.NORMAL for t in tokens])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    w.add_bos_token_id(end)
    w.add_eos_token_id(end)
    w.add_add_bos_token(True)
    w.add_uint32("lutra.training.steps", state["step"])
    w.add_string("lutra.training.data_sha256", state["data"])

    w.add_tensor("token_embd.weight", gguf.quants.quantize(weights["token_embd"].numpy(), Type.Q8_0), raw_dtype=Type.Q8_0)
    w.add_tensor("output_norm.weight", weights["output_norm"].numpy())
    names = dict(q="attn_q", k="attn_k", v="attn_v", o="attn_output", gate="ffn_gate", up="ffn_up", down="ffn_down")
    for layer in range(c.layers):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{layer}.{norm}.weight", weights[f"blocks.{layer}.{norm}"].numpy())
        for ours, theirs in names.items():
            w.add_tensor(f"blk.{layer}.{theirs}.weight", tq2_0(weights[f"blocks.{layer}.{ours}"]), raw_dtype=Type.TQ2_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    print(f"{args.out}: {args.out.stat().st_size} bytes, step {state['step']}")


if __name__ == "__main__":
    main()
