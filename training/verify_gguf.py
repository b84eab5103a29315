"""Checks an exported GGUF against two engines that know nothing of this project: `transformers` and llama.cpp.

- Tokens: llama.cpp, from the file's metadata, against `tokenizers`, built from the same metadata, on the validation text.
- Logits: llama.cpp on the file against `transformers` (float32, eager attention) on the dequantised weights. They may
  differ by the 8-bit rounding of activations that llama.cpp's ternary products make.
- Loss: of both, on the validation text that training held out.

    pip install -r training/requirements-verify.txt
    python training/verify_gguf.py --model models/lutra-books-6M-TQ2_0.gguf --data ../shared/data/text/books
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from llama_cpp import Llama
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from train import read_books

# Root mean square difference of the logits, relative to their spread, allowed for the rounding of activations to 8 bits
# (llama.cpp against float32): about 0.64 % for each of the model's products in sequence, added as independent errors are.
TOLERANCE = 0.032
PROMPTS = ["Once upon a time there was a little girl who lived", "“Where are you going?” said the", "The old man"]


def field(reader: gguf.GGUFReader, name: str):
    entry = reader.get_field(name)
    if entry is None:
        raise SystemExit(f"the file has no {name}")
    return entry.contents()


def tokenizer_of(reader: gguf.GGUFReader) -> Tokenizer:
    """The file's byte-level BPE in the `tokenizers` library."""
    tokens, merges = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.merges")
    tokenizer = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]
    ))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    control = [t for t, kind in zip(tokens, field(reader, "tokenizer.ggml.token_type")) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    return tokenizer


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K from interleaved pairs (GGUF's llama architecture) to rotated halves (`transformers`)."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def reference_model(reader: gguf.GGUFReader) -> LlamaForCausalLM:
    """The file's model in `transformers`, weights dequantised to float32."""
    heads, kv_heads = field(reader, "llama.attention.head_count"), field(reader, "llama.attention.head_count_kv")
    tensors = {
        t.name.removesuffix(".weight"): gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]).astype(np.float32)
        for t in reader.tensors
    }
    tied = "output" not in tensors
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tensors["token_embd"]), hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"), num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=field(reader, "llama.rope.dimension_count"),
        max_position_embeddings=field(reader, "llama.context_length"),
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=field(reader, "llama.rope.freq_base"), tie_word_embeddings=tied, attn_implementation="eager",
    )).float().eval()
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    top = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    state = {}
    for name, values in tensors.items():
        part = name.split(".")
        if part[-1] in ("attn_q", "attn_k"):
            values = unpermute(values, heads if part[-1] == "attn_q" else kv_heads)
        key = top[name] if len(part) == 1 else f"model.layers.{part[1]}.{names[part[2]]}"
        state[f"{key}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) > ({"lm_head.weight"} if tied else set()):
        raise SystemExit(f"tensors do not match the architecture: missing {missing}, unexpected {unexpected}")
    if tied:
        model.tie_weights()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/lutra-books-6M-TQ2_0.gguf"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text/books"))
    parser.add_argument("--windows", type=int, help="validation windows to compare; all of them unless given")
    args = parser.parse_args()
    torch.set_num_threads(2)

    reader = gguf.GGUFReader(args.model)
    context = field(reader, "llama.context_length")
    tokenizer, reference = tokenizer_of(reader), reference_model(reader)
    llama = Llama(str(args.model), n_ctx=context, n_batch=context, n_threads=2, logits_all=True, verbose=False)

    texts, data_hash = read_books(args.data)
    if data_hash != field(reader, "lutra.training.data_sha256"):
        print("warning: these are not the texts that the model was trained on")
    texts = [t[t.rfind("\n", 0, int(len(t) * 0.98)) + 1 :] for t in texts]
    ours = [tokenizer.encode(t).ids for t in texts]
    theirs = [llama.tokenize(t.encode(), add_bos=False, special=False) for t in texts]
    assert ours == theirs, "llama.cpp reads other tokens from the file than `tokenizers`"
    print(f"tokens: equal on {len(texts)} texts, {sum(map(len, ours))} tokens")

    end = field(reader, "tokenizer.ggml.eos_token_id")
    ids = np.array([i for text in ours for i in (end, *text)])
    starts = list(range(0, len(ids) - context, context))[: args.windows]
    largest, squares, agree, count, losses = 0.0, 0.0, 0, 0, np.zeros(2)
    for start in starts:
        window = ids[start : start + context]
        targets = torch.from_numpy(ids[start + 1 : start + context + 1])
        with torch.no_grad():
            expected = reference(torch.from_numpy(window)[None]).logits[0]
        llama.reset()
        llama.eval(window.tolist())
        actual = torch.from_numpy(np.array(llama.scores[:context]))
        largest = max(largest, (actual - expected).abs().max().item())
        squares += (actual - expected).square().mean().item() / len(starts)
        agree += (actual.argmax(1) == expected.argmax(1)).sum().item()
        losses += [F.cross_entropy(x, targets, reduction="sum").item() for x in (expected, actual)]
        count += context
    text_bytes = sum(len(t.encode()) for t in texts)
    for engine, loss in zip(("transformers float32", "llama.cpp"), losses / count):
        print(f"{engine}: validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}, "
              f"{loss * len(ids) / text_bytes / math.log(2):.4f} bits per byte, {count} tokens")
    relative = math.sqrt(squares) / expected.std().item()
    print(f"logits: std {expected.std():.2f}, relative error {relative:.4f}, largest difference {largest:.4f}, "
          f"argmax equal at {agree} of {count}")
    assert relative < TOLERANCE and agree > 0.98 * count

    for seed, prompt in enumerate(PROMPTS):
        text = llama(prompt, max_tokens=120, temperature=0.8, top_p=0.95, min_p=0.0, top_k=0, repeat_penalty=1.0, seed=seed)
        print(f"\nseed {seed}: {prompt}{text['choices'][0]['text']}")


if __name__ == "__main__":
    main()
