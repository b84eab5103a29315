//! What the tests need to run a model: a reader of GGUF headers, descriptors, batches, and a row of shards.

pub use crate::numerics_tests::Random;
use lutra_kernels::batch::SampleParameters;
use lutra_kernels::descriptor::Descriptor;
use lutra_kernels::shard::Shard;
use lutra_kernels::Result;
use serde_json::{json, Value};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// A file of the shared test data; `None`, with a word about it, where that is not beside the checkout. CI must have it.
pub fn shared(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LUTRA_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    if root.join("MANIFEST.md").exists() {
        return Some(root.join(name));
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "CI needs the shared test data: set LUTRA_DATA to its folder"
    );
    println!("skipped: no shared test data in {}", root.display());
    None
}

/// Reads a trusted GGUF header.
struct Reader<'a>(&'a [u8], usize);

impl Reader<'_> {
    fn bytes(&mut self, n: usize) -> &[u8] {
        self.1 += n;
        &self.0[self.1 - n..self.1]
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes(4).try_into().unwrap())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes(8).try_into().unwrap())
    }
    fn string(&mut self) -> String {
        let n = self.u64() as usize;
        String::from_utf8_lossy(self.bytes(n)).into_owned()
    }
    fn value(&mut self, kind: u32) -> Value {
        match kind {
            0 | 1 | 7 => json!(self.bytes(1)[0]),
            2 | 3 => json!(self.bytes(2)[0]),
            4 => json!(self.u32()),
            5 => json!(self.u32() as i32),
            6 => json!(f32::from_bits(self.u32())),
            8 => json!(self.string()),
            9 => {
                let (kind, n) = (self.u32(), self.u64());
                Value::Array((0..n).map(|_| self.value(kind)).collect())
            }
            10 => json!(self.u64()),
            11 => json!(self.u64() as i64),
            12 => json!(f64::from_bits(self.u64())),
            _ => panic!("GGUF value of type {kind}"),
        }
    }
}

pub struct Model {
    path: PathBuf,
    pub hyper: Value,
    tensors: HashMap<String, Value>,
}

/// How shards run a model.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub threads: usize,
    pub isa: Option<&'a str>,
    pub kv: &'a str,
    pub kv_tokens: usize,
    pub max_batch: usize,
}

pub const RUN: Run<'static> = Run { threads: 1, isa: None, kv: "f32", kv_tokens: 1024, max_batch: 256 };

impl Model {
    pub fn open(path: PathBuf) -> Model {
        let file = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut r = Reader(&file, 0);
        assert_eq!(r.bytes(4), b"GGUF");
        assert_eq!(r.u32(), 3);
        let (count, pairs) = (r.u64(), r.u64());
        let mut meta = HashMap::new();
        for _ in 0..pairs {
            let (key, kind) = (r.string(), r.u32());
            meta.insert(key, r.value(kind));
        }
        let mut tensors = HashMap::new();
        for _ in 0..count {
            let (name, dims) = (r.string(), r.u32());
            let shape: Vec<u64> = (0..dims).map(|_| r.u64()).collect();
            let (kind, offset) = (r.u32(), r.u64());
            tensors.insert(name, (shape, kind, offset));
        }
        let align = meta.get("general.alignment").map_or(32, |v| v.as_u64().unwrap());
        let data = (r.1 as u64).next_multiple_of(align);
        let tensors: HashMap<String, Value> = tensors
            .into_iter()
            .map(|(name, (shape, kind, offset))| {
                // Types that the kernels do not know get no size, and their descriptor is refused.
                let row = lutra_kernels::SourceType::from_ggml(kind).and_then(|t| t.row_bytes(shape[0] as usize));
                let bytes = row.unwrap_or(0) as u64 * shape.get(1).unwrap_or(&1);
                let tensor =
                    json!({"name": name, "type": kind, "shape": shape, "offset": data + offset, "bytes": bytes});
                (name, tensor)
            })
            .collect();
        let get = |key: &str| meta.get(&format!("llama.{key}")).cloned();
        let number = |key: &str| get(key).unwrap_or_else(|| panic!("no {key}")).as_u64().unwrap();
        let head_dim = number("embedding_length") / number("attention.head_count");
        let hyper = json!({
            "layers": number("block_count"), "embedding": number("embedding_length"), "heads": number("attention.head_count"),
            "kvHeads": number("attention.head_count_kv"), "headDim": head_dim, "feedForward": number("feed_forward_length"),
            "vocab": tensors["token_embd.weight"]["shape"][1], "context": number("context_length"),
            "norm": {"kind": "rms", "eps": get("attention.layer_norm_rms_epsilon").unwrap()}, "activation": "silu",
            "ropes": [{"base": get("rope.freq_base").unwrap_or(json!(10000.0)), "dims": head_dim, "style": "norm"}],
        });
        Model { path, hyper, tensors }
    }

    pub fn fixture(name: &str) -> Model {
        Model::open(fixture(name))
    }

    pub fn size(&self, key: &str) -> usize {
        self.hyper[key].as_u64().unwrap() as usize
    }

    /// The descriptor of layers `first..end`.
    pub fn descriptor(&self, first: usize, end: usize, run: Run<'_>) -> Value {
        let tensor = |name: &str| self.tensors[name].clone();
        let layer = |i: usize| {
            let part = |name: &str| json!({"weight": tensor(&format!("blk.{i}.{name}.weight"))});
            json!({
                "attnNorm": part("attn_norm"), "q": part("attn_q"), "k": part("attn_k"), "v": part("attn_v"),
                "o": part("attn_output"), "rope": 0, "ffnNorm": part("ffn_norm"),
                "mlp": {"gate": part("ffn_gate"), "up": part("ffn_up"), "down": part("ffn_down")},
            })
        };
        let output = if self.tensors.contains_key("output.weight") { "output.weight" } else { "token_embd.weight" };
        json!({
            "path": self.path, "threads": run.threads, "isa": run.isa, "kv": {"type": run.kv, "tokens": run.kv_tokens},
            "maxBatch": run.max_batch, "hyper": self.hyper, "first": first, "end": end,
            "embedding": if first == 0 { tensor("token_embd.weight") } else { Value::Null },
            "head": if end == self.size("layers") {
                json!({"norm": {"weight": tensor("output_norm.weight")}, "output": {"weight": tensor(output)}})
            } else {
                Value::Null
            },
            "layers": (first..end).map(layer).collect::<Vec<_>>(),
        })
    }

    /// Shards of about as many layers each.
    pub fn shards(&self, count: usize, run: Run<'_>) -> Shards {
        let layers = self.size("layers");
        let shards = (0..count)
            .map(|i| open(&self.descriptor(layers * i / count, layers * (i + 1) / count, run)).unwrap())
            .collect();
        Shards { shards, embedding: self.size("embedding"), vocab: self.size("vocab") }
    }
}

pub fn open(descriptor: &Value) -> Result<Shard> {
    Shard::open(&Descriptor::parse(descriptor.to_string().as_bytes())?)
}

/// An entry of a batch.
#[derive(Clone)]
pub struct Part {
    pub seq: u32,
    pub pos: usize,
    pub tokens: Vec<u32>,
    pub logits: bool,
    pub sample: Option<SampleParameters>,
}

pub const GREEDY: SampleParameters = SampleParameters {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repeat_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    penalty_last_n: -1,
    prompt_len: 0,
    seed: 0,
    top: None,
    bias: Vec::new(),
};

impl Part {
    pub fn new(seq: u32, pos: usize, tokens: &[u32]) -> Part {
        Part { seq, pos, tokens: tokens.to_vec(), logits: false, sample: None }
    }
    pub fn logits(mut self) -> Part {
        self.logits = true;
        self
    }
    pub fn sample(mut self, parameters: &SampleParameters) -> Part {
        self.sample = Some(parameters.clone());
        self
    }
}

/// The batch as bytes.
pub fn encode(parts: &[Part]) -> Vec<u8> {
    let mut words = vec![parts.len() as u32];
    for p in parts {
        words.extend([
            p.seq,
            p.pos as u32,
            p.tokens.len() as u32,
            u32::from(p.sample.is_some()) | u32::from(p.logits) << 1,
        ]);
    }
    words.extend(parts.iter().flat_map(|p| &p.tokens));
    for p in parts.iter().filter_map(|p| p.sample.as_ref()) {
        words.extend([p.temperature.to_bits(), p.top_k, p.top_p.to_bits(), p.min_p.to_bits()]);
        words.extend([p.repeat_penalty, p.presence_penalty, p.frequency_penalty].map(f32::to_bits));
        words.extend([p.penalty_last_n as u32, p.prompt_len, p.seed as u32, (p.seed >> 32) as u32]);
        words.extend([p.top.unwrap_or(u32::MAX), p.bias.len() as u32]);
        words.extend(p.bias.iter().flat_map(|&(id, bias)| [id, bias.to_bits()]));
    }
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A whole model in one or several shards.
pub struct Shards {
    pub shards: Vec<Shard>,
    pub embedding: usize,
    pub vocab: usize,
}

impl Shards {
    /// The results' bytes.
    pub fn forward(&self, parts: &[Part]) -> Result<Vec<u8>> {
        let batch = encode(parts);
        let tokens: usize = parts.iter().map(|p| p.tokens.len()).sum();
        let mut states = Vec::new();
        for (i, shard) in self.shards.iter().enumerate() {
            let last = i + 1 == self.shards.len();
            let results = |p: &Part| {
                p.sample.as_ref().map_or(0, |s| 12 + 8 * s.top.unwrap_or(0) as usize)
                    + if p.logits { 4 * self.vocab * p.tokens.len() } else { 0 }
            };
            let size = if last { parts.iter().map(results).sum() } else { tokens * self.embedding * 4 };
            let mut out = vec![0; size];
            let written = shard.forward(&batch, &states, None, &mut out)?;
            assert_eq!(written, size);
            states = out;
        }
        Ok(states)
    }

    /// Logits of all tokens of a sequence, computed in chunks.
    pub fn logits(&self, seq: u32, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let mut logits = Vec::new();
        for (i, part) in tokens.chunks(chunk).enumerate() {
            logits.extend(floats(&self.forward(&[Part::new(seq, i * chunk, part).logits()]).unwrap()));
        }
        logits
    }

    /// One sampled token of a sequence.
    pub fn next(&self, seq: u32, pos: usize, tokens: &[u32], parameters: &SampleParameters) -> u32 {
        let out = self.forward(&[Part::new(seq, pos, tokens).sample(parameters)]).unwrap();
        u32::from_le_bytes(out[..4].try_into().unwrap())
    }
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[track_caller]
pub fn assert_bits(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    for (i, (a, b)) in actual.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == b.to_bits(), "{what}: logit {i} is {a:?}, not {b:?}");
    }
}
