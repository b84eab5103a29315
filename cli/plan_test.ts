import assert from "node:assert/strict";
import { join } from "node:path";
import { NatsBus } from "../bus/mod.ts";
import { fixture, repoPath } from "../tests/data.ts";
import { FakeKernels } from "../tests/fakes/kernels.ts";
import { nats } from "../tests/nats.ts";
import { Worker } from "../worker/worker.ts";

interface Plan {
  stages: { replica: number; worker: string; first: number; end: number; memoryBytes: number; seconds: number }[];
  idle: string[];
  devices: { id: string; msPerLayer: number | null; msHead: number | null; hopMs: number }[];
  oneStreamTokS: number;
  manyStreamsTokS: number;
}

/** Runs `plan` as a user does. */
async function run(args: string[], permissions = "run") {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-q", `-P=${permissions}`, repoPath("mod.ts"), "plan", ...args],
    cwd: repoPath(),
    env: { NO_COLOR: "1" },
  }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

async function plan(args: string[], permissions?: string): Promise<Plan> {
  const { code, stdout, stderr } = await run([...args, "--json"], permissions);
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

function near(a: number, b: number, what: string): void {
  assert(Math.abs(a - b) <= 1e-9 * Math.abs(b), `${what}: ${a} is not ${b}`);
}

Deno.test("plan: Llama 2 70B on eight boards, by hand", async () => {
  const { stages, oneStreamTokS, manyStreamsTokS } = await plan([
    "llama-2-70b",
    "--device",
    "8x8GB:12GBps",
    "--hop",
    "1",
  ]);
  assert.deepEqual(stages.map(({ worker, first, end }) => [worker, first, end]), [
    ...[0, 1, 2, 3, 4, 5, 6, 7].map((i) => [`device-${i + 1}`, 10 * i, 10 * i + 10]),
  ]);
  // Q and O, K and V of 8 of 64 heads, three of the feed-forward, at 18 bytes for 32 weights; two norms of f32.
  const weights = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672;
  const layer = 1.02 * (weights / 32 * 18 + 2 * 8192 * 4);
  const kv = 2 * 8192 * 1024 * 2; // 8192 tokens of f16
  const embedding = 1.02 * 32000 * 8192 / 32 * 18;
  const head = 1.02 * (32000 * 8192 / 256 * 210 + 8192 * 4);
  near(stages[0]!.memoryBytes, 10 * (layer + kv) + embedding, "the first holds the embedding");
  near(stages[7]!.memoryBytes, 10 * (layer + kv) + head, "the last holds the head");
  near(stages[0]!.seconds, 10 * layer / 12e9, "reading its layers");
  near(manyStreamsTokS, 12e9 / (10 * layer + head), "the last is slowest");
  near(oneStreamTokS, 1 / ((80 * layer + head) / 12e9 + 8 * 1e-3), "one stream reads all and hops eight times");
});

Deno.test("plan: a model that fits boards lies on each, unless one stream alone is to run; types and KV cache count", async () => {
  const three = ["--device", "8GB:12GBps", "--device", "8GB:10GBps", "--device", "2GB:5GBps"];
  const f16Twice = await plan(["tinyllama-1.1b", "--type", "F16", ...three]);
  const replicas = [0, 1].map((n) => f16Twice.stages.filter(({ replica }) => replica === n));
  assert.deepEqual(replicas.map((stages) => stages.map(({ worker }) => worker)), [["device-1"], [
    "device-3",
    "device-2",
  ]]);
  assert(replicas[1]![0]!.end <= 3, "which cannot hold it takes what costs a stream a twentieth at the most");
  assert(f16Twice.manyStreamsTokS > 1.8 * f16Twice.oneStreamTokS);
  const q8Thrice = await plan(["tinyllama-1.1b", "--type", "Q8_0", "--kv-type", "q8", ...three]);
  assert.deepEqual([q8Thrice.stages.length, q8Thrice.idle], [3, []], "the third holds it too");
  const devices = ["--device", "8GB:12GBps", "--device", "2GB:5GBps"];
  const { stages, idle } = await plan(["tinyllama-1.1b", "--type", "F16", "--streams", "1", ...devices]);
  assert.deepEqual(stages.map(({ worker }) => worker), ["device-1"], "any split would cost one stream a twentieth");
  assert.deepEqual(idle, ["device-2"]);
  const q8 = await plan(["tinyllama-1.1b", "--type", "Q8_0", "--kv-type", "q8", ...devices.slice(2)]);
  assert.deepEqual(q8.stages.map(({ end }) => end), [22], "half the bits fit the small one");
  const f16 = await run(["tinyllama-1.1b", "--type", "F16", ...devices.slice(2)]);
  assert.match(f16.stderr, /device-1 offers 2\.00 GB, room for/);
  const text = await run(["tinyllama-1.1b", ...devices]);
  assert.match(
    text.stdout,
    /^replica +device +layers +memory +of +ms\/layer +head +hop +ms a token\n1 +device-1 .*\n2 +device-2 /m,
  );
  const one = await run(["tinyllama-1.1b", ...devices.slice(2)]);
  assert.match(one.stdout, /^device +layers +memory +of +ms\/layer +head +hop +ms a token$/m);
  assert.match(text.stdout, /one stream [\d.]+ tok\/s, many together [\d.]+ tok\/s/);
});

Deno.test("plan: a config.json needs no weights, and a file gives its own", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const config = {
      ...{ model_type: "llama", hidden_size: 4096, num_hidden_layers: 32, num_attention_heads: 32, vocab_size: 32000 },
      ...{ intermediate_size: 11008, max_position_embeddings: 4096, rms_norm_eps: 1e-5 },
    };
    await Deno.writeTextFile(join(folder, "config.json"), JSON.stringify(config));
    const devices = ["--device", "16GB:10GBps"];
    const known = await plan(["llama-2-7b", ...devices]);
    for (const path of [folder, join(folder, "config.json")]) assert.deepEqual(await plan([path, ...devices]), known);
    await Deno.writeTextFile(join(folder, "config.json"), JSON.stringify({ ...config, vocab_size: null }));
    assert.match((await run([folder, ...devices])).stderr, /has no vocab_size/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
  const file = await plan([fixture("llama-q-Q4_0.gguf"), "--device", "1GB:20GBps", "--device", "1GB:10GBps"]);
  assert.deepEqual(file.stages.map(({ worker, end }) => [worker, end]), [["device-1", 5], ["device-2", 5]]);
  const split = await plan([fixture("llama-q-Q4_0.gguf"), "--device", "2x1GB:20GBps", "--shards", "2"]);
  assert.equal(split.stages.length, 2);
});

Deno.test("plan: what does not fit, is unknown or malformed is refused with what is lacking", async () => {
  const small = await run(["llama-2-70b", "--device", "8GB:12GBps", "--device", "16GB:30GBps"]);
  assert.equal(small.code, 1);
  assert.match(
    small.stderr,
    /device-1 offers 8\.00 GB, room for 15 of 80 layers; device-2 offers 16\.00 GB, room for 30/,
  );
  assert.match(small.stderr, /18\.\d\d GB are missing, 9\.\d\d GB more on each would do/);
  const unknown = await run(["llama-9", "--device", "8GB:12GBps"]);
  assert.match(unknown.stderr, /neither a file llama-9 nor a known model .* known are tinyllama-1\.1b, /);
  assert.match(
    (await run(["llama-2-7b", "--type", "Q7", "--device", "8GB:12GBps"])).stderr,
    /type Q7 is not supported/,
  );
  for (const device of ["8:12", "0x8GB:12GBps", "8GB:0GBps"]) {
    assert.equal((await run(["llama-2-7b", "--device", device])).code, 2, device);
  }
  const without = await run(["llama-2-7b"]);
  assert.match(without.stderr, /give --device, or --nats/);
  assert.equal(without.code, 2);
});

Deno.test({
  name: "plan --nats: plans for the devices that answer",
  ignore: nats.absent,
  async fn() {
    await using server = await nats.start();
    const bus = await NatsBus.connect({ servers: server.url });
    const workers: Worker[] = [];
    for (const [id, memoryBytes, bandwidthGBps] of [["b", 5e9, 10], ["a", 5e9, 10], ["c", 3e9, 5]] as const) {
      const kernels = new FakeKernels();
      workers.push(await Worker.start({ ...{ bus, kernels, id, memoryBytes, bandwidthGBps }, cluster: "home" }));
    }
    const flags = ["--nats", server.url, "--cluster", "home", "--wait", "0.4"];
    const { stages } = await plan(["llama-2-7b", ...flags], "worker");
    const layers = new Map(stages.map(({ worker, first, end }) => [worker, end - first]));
    assert.equal(layers.get("a"), layers.get("b"));
    assert(layers.get("c")! < layers.get("a")!, "none holds it alone; the slow one has least");
    // What they measure counts more than their bandwidth.
    const slow = new FakeKernels({ beforeLayer: () => new Promise((resolve) => setTimeout(resolve, 40)) });
    const fast = new FakeKernels({ beforeLayer: () => new Promise((resolve) => setTimeout(resolve, 10)) });
    for (const [id, kernels] of [["d", slow], ["e", fast]] as const) {
      const options = { bus, kernels, id, memoryBytes: 6.5e9, bandwidthGBps: 10, measure: true, cluster: "measured" };
      workers.push(await Worker.start(options));
    }
    flags.splice(3, 1, "measured");
    const known = await plan(["llama-2-7b", ...flags, "--no-measure"], "worker");
    assert.deepEqual(known.devices.map(({ msPerLayer }) => msPerLayer), [null, null]);
    const measured = await plan(["llama-2-7b", ...flags], "worker");
    assert.deepEqual(measured.devices.map(({ id }) => id), ["d", "e"]);
    const [d, e] = measured.devices.map(({ msPerLayer }) => msPerLayer!);
    assert(d! >= 40 && e! >= 10 && e! < 30, `${d} and ${e} ms`);
    const parts = new Map(measured.stages.map(({ worker, first, end }) => [worker, end - first]));
    assert(parts.get("e")! > 2 * parts.get("d")!, JSON.stringify(measured.stages));
    const none = await run(["llama-2-7b", ...flags, "--cluster", "empty"], "worker");
    assert.match(none.stderr, /there are no workers/);
    for (const worker of workers) await worker.close();
    await bus.close();
  },
});
