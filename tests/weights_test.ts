import assert from "node:assert/strict";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { NatsBus, shardTensors } from "../bus/mod.ts";
import type { NatsServer } from "../bus/mod.ts";
import { startLocalCluster } from "../cli/local_cluster.ts";
import { loadModel } from "../model/mod.ts";
import type { LoadedModel } from "../model/mod.ts";
import { createApp } from "../orchestrator/api/mod.ts";
import { Engine, shardOf } from "../orchestrator/mod.ts";
import type { EngineOptions } from "../orchestrator/mod.ts";
import { CHUNK_BYTES, ChunkFiles, chunksOf, fetchedPaths, hashFiles, WeightSource } from "../weights/mod.ts";
import type { Manifest } from "../weights/mod.ts";
import { decodeWish, modelSubjects } from "../weights/protocol.ts";
import { loadKernels } from "../worker/mod.ts";
import { repoPath } from "./data.ts";
import { syntheticLlama, writeGguf } from "./gguf_writer.ts";
import { nats } from "./nats.ts";
import { writeMixtureFolder } from "./safetensors_writer.ts";

// Never closed, hence opened before any test: it is no test's leak.
loadKernels();

const LAYERS = 8;
const CONTEXT = 64;

function writeLlama(path: string): void {
  const { metadata, tensors } = syntheticLlama({ layers: LAYERS, embedding: 256, feedForward: 1024 });
  writeFileSync(path, writeGguf(metadata, tensors));
}

/** A server, an engine and a source in this process, and worker processes that do not have the model's file. */
class Site implements AsyncDisposable {
  readonly folder = mkdtempSync(join(tmpdir(), "lutra-weights-"));
  readonly path: string;
  /** The model's files. */
  paths!: string[];
  server: NatsServer;
  readonly bus: NatsBus;
  /** How often each chunk was asked for. */
  readonly wishes = new Map<number, number>();
  readonly logs: string[] = [];
  model!: LoadedModel;
  manifest!: Manifest;
  engine: Engine | undefined;
  /** Milliseconds that the source takes for a chunk. */
  delayMs = 0;
  onWish: (total: number) => void = () => {};
  readonly #workers = new Map<string, Deno.ChildProcess>();
  #source: WeightSource | undefined;
  #sources = 0;

  private constructor(server: NatsServer, bus: NatsBus, name: string) {
    this.server = server;
    this.bus = bus;
    this.path = join(this.folder, name);
  }

  /** @param write Makes the model at the site's path. */
  static async create(name = "model.gguf", write: (path: string) => void = writeLlama): Promise<Site> {
    const server = await nats.start();
    const site = new Site(server, await NatsBus.connect({ servers: server.url, onError: () => {} }), name);
    write(site.path);
    const { path, files } = site.model = await loadModel(site.path);
    site.paths = [path, ...files.map((file) => join(dirname(path), file))];
    site.manifest = await hashFiles(site.paths);
    site.bus.subscribe(modelSubjects("lutra", site.manifest.root).source("*"), ({ data }) => {
      const { kind, index } = decodeWish(data);
      if (kind !== "chunk") return;
      site.wishes.set(index, (site.wishes.get(index) ?? 0) + 1);
      site.onWish(site.total);
    });
    return site;
  }

  get total(): number {
    return [...this.wishes.values()].reduce((sum, n) => sum + n, 0);
  }

  /** Begins to give chunks, under another name every time. */
  async offer(): Promise<void> {
    const file = await ChunkFiles.open(this.paths, this.manifest, join(this.folder, "source"), "own");
    file.trust();
    const read = file.read.bind(file);
    file.read = async (chunk) => {
      await new Promise((resolve) => setTimeout(resolve, this.delayMs));
      return await read(chunk);
    };
    this.#source = new WeightSource({ bus: this.bus, cluster: "lutra", id: `source-${this.#sources++}`, file });
  }

  async withdraw(): Promise<void> {
    await this.#source?.close();
    this.#source = undefined;
  }

  cache(id: string): string {
    return join(this.folder, id);
  }

  /** Kills the server and starts it again. */
  async restartServer(): Promise<void> {
    const { port } = this.server;
    this.server.kill("SIGKILL");
    await this.server.stop();
    this.server = await nats.start({ port });
  }

  get ref() {
    return { root: this.manifest.root, files: [...this.manifest.files] };
  }

  /** Where a worker has what it fetched of a file. */
  fetched(id: string, file = 0): string {
    return fetchedPaths(this.cache(id), this.ref)[file]!;
  }

  /** Bytes that a worker has on its disk. */
  held(id: string): number {
    return this.paths.reduce((sum, _, file) => sum + 512 * statSync(this.fetched(id, file)).blocks, 0);
  }

  work(id: string, permissions: readonly string[] = [], more: readonly string[] = []): void {
    const flags = [
      ...more,
      "--id",
      id,
      "--threads",
      "1",
      "--bandwidth",
      "10",
      "--memory",
      "0.5",
      "--no-cache",
      "--no-measure",
    ];
    const child = new Deno.Command(Deno.execPath(), {
      args: [
        "run",
        "-q",
        "-P=worker",
        ...permissions,
        repoPath("mod.ts"),
        "worker",
        "--nats",
        this.server.url,
        ...flags,
      ],
      env: { NO_COLOR: "1", LUTRA_CACHE: this.cache(id) },
      stdin: "null",
      stdout: "null",
      stderr: Deno.env.has("LUTRA_TEST_LOG") ? "inherit" : "null",
    }).spawn();
    this.#workers.set(id, child);
  }

  async end(id: string, signal: Deno.Signal): Promise<void> {
    const child = this.#workers.get(id);
    this.#workers.delete(id);
    try {
      child?.kill(signal);
    } catch { /* it has ended */ }
    await child?.status;
  }

  /** @param folder Where the orchestrator says that the model is: no worker has it there. */
  async serve({ folder = "/nowhere", ...options }: Partial<EngineOptions> & { folder?: string } = {}): Promise<Engine> {
    const model = { ...this.model, path: join(folder, basename(this.model.path)) };
    const engine = this.engine = await Engine.open({
      bus: this.bus,
      model,
      cluster: "lutra",
      weights: this.ref,
      context: CONTEXT,
      kvTokens: 4 * CONTEXT,
      workerTimeoutMs: 60_000,
      lostMs: 1600,
      recoveryTimeoutMs: 60_000,
      patient: true,
      unload: false,
      log: (text) => this.logs.push(text),
      ...options,
    });
    await engine.ready;
    return engine;
  }

  /** The chunks of some of the layers. */
  share(first: number, end: number): number[] {
    const settings = { path: "x", kv: { type: "f16", tokens: 64 }, maxBatch: 64, context: CONTEXT } as const;
    return chunksOf(shardTensors(shardOf(this.model.description, { first, end }, settings)), this.manifest);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.engine?.close();
    await this.withdraw();
    for (const id of [...this.#workers.keys()]) await this.end(id, "SIGKILL");
    await this.bus.close();
    await this.server.stop();
    rmSync(this.folder, { recursive: true });
  }
}

async function answers(engine: Engine, count = 3): Promise<number[][]> {
  return await Promise.all(Array.from({ length: count }, async (_, n) => {
    const ids: number[] = [];
    const promptTokens = Array.from({ length: 9 }, (_, i) => 3 + (i * 31 + n * 57) % 250);
    const sampling = n === 0 ? { temperature: 0 } : { temperature: 1, seed: BigInt(n) };
    for await (const event of engine.generate({ promptTokens, maxTokens: 30, ignoreEos: true, sampling })) {
      if (event.type === "token") ids.push(event.id);
    }
    return ids;
  }));
}

/** What the API tells of the state, to a probe and to a client. */
async function apiState(engine: Engine): Promise<string> {
  const app = createApp({ engine, onError: () => {} });
  const health = await app.request("/healthz");
  const { status, devices = [] } = await health.json();
  const shown = devices.map((device: Record<string, unknown>) =>
    `${device["id"]} ${device["phase"]} ${device["progress"]} ${device["eta_seconds"]}`
  );
  const response = await app.request("/v1/completions", { method: "POST", body: '{"prompt":"a"}' });
  const { error } = await response.json();
  return `${health.status} ${status}; ${shown.join(", ")}; retry ${health.headers.get("retry-after")}; ` +
    `${error?.code} ${response.headers.get("retry-after")}`;
}

async function expected(path: string): Promise<number[][]> {
  await using one = await startLocalCluster(path, { threads: 1, context: CONTEXT, kvTokens: 4 * CONTEXT });
  return await answers(one.engine);
}

/** An engine that two workers without the file serve, and the answers of one process, which it gave. */
async function servedByTwo(site: Site): Promise<{ engine: Engine; right: number[][] }> {
  const right = await expected(site.path);
  await site.offer();
  site.work("a");
  site.work("b");
  const engine = await site.serve({ workers: 2, shards: 2 });
  assert.deepEqual(await answers(engine), right);
  return { engine, right };
}

function test(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: `weights over the bus: ${name}`, ignore: nats.absent, fn });
}

test("workers without the file get their layers and no more, are given them by peers, and answer as one process does", async () => {
  await using site = await Site.create();
  const { engine, right } = await servedByTwo(site);
  const stages = engine.stats().stages;
  assert.equal(stages.length, 2);
  let chunks = 0;
  for (const { worker, first, end } of stages) {
    const share = site.share(first, end);
    chunks += share.length;
    assert(share.length < 0.6 * site.manifest.chunks, "about half of the file");
    const held = site.held(worker);
    const wanted = share.reduce((sum, chunk) => sum + site.manifest.place(chunk).bytes, 0);
    assert(held >= wanted && held < wanted + 65_536, `${worker} holds ${held} bytes for ${wanted}`);
  }
  assert.equal(site.total, chunks, "every chunk once for each that needs it");

  // Nobody has the whole file any more: who takes the place of one that leaves gets its layers from it.
  await site.withdraw();
  site.wishes.clear();
  const leaving = stages[0]!.worker;
  site.work("c");
  while (engine.clusterStatus().workers.length < 3) await new Promise((resolve) => setTimeout(resolve, 50));
  const running = answers(engine);
  await site.end(leaving, "SIGTERM");
  assert.deepEqual(await running, right);
  assert.deepEqual(await answers(engine), right);
  const needed = engine.stats().stages.map(({ worker, first, end }) => {
    assert.notEqual(worker, leaving);
    const had = stages.find((stage) => stage.worker === worker);
    const held = new Set(had === undefined ? [] : site.share(had.first, had.end));
    return site.share(first, end).filter((chunk) => !held.has(chunk)).length;
  });
  assert.equal(site.total, needed.reduce((sum, n) => sum + n, 0));
  // They fetched while it went on computing, so that answers waited for no transfer.
  const at = (pattern: RegExp) => site.logs.findIndex((text) => pattern.test(text));
  assert(
    at(/^weights are fetched for/) >= 0 && at(/^weights are fetched for/) < at(/wants to leave/),
    site.logs.join("\n"),
  );
});

test("a mixture in several files, whose description exceeds a message: each worker fetches its layers' chunks, and uses files that it has", async () => {
  const layers = 48;
  await using site = await Site.create("mixture", (path) => {
    mkdirSync(path);
    writeMixtureFolder(path, { layers, experts: 128, files: 3 });
  });
  const options = { path: "x", kv: { type: "f16", tokens: 64 }, maxBatch: 64, context: CONTEXT } as const;
  const text = JSON.stringify(shardOf(site.model.description, { first: 0, end: layers / 2 }, options));
  assert(text.length > site.bus.maxPayload, `${text.length} bytes of half the layers`);
  const right = await expected(site.path);
  await site.offer();
  // `a` has none of the files; `b` has them in a folder of its own.
  const models = join(site.folder, "of-b");
  mkdirSync(join(models, "mixture"), { recursive: true });
  for (const path of site.paths) copyFileSync(path, join(models, "mixture", basename(path)));
  site.work("a");
  site.work("b", [], ["--models", models]);
  const engine = await site.serve({ workers: 2, shards: 2, folder: "/nowhere/mixture" });
  assert.deepEqual(await answers(engine), right);
  const { first, end } = engine.stats().stages.find(({ worker }) => worker === "a")!;
  const share = site.share(first, end);
  assert.equal(site.total, share.length, "every chunk of a's layers once, and none of b's");
  assert(share.length < 0.6 * site.manifest.chunks);
  const wanted = share.reduce((sum, chunk) => sum + site.manifest.place(chunk).bytes, 0);
  assert(site.held("a") >= wanted && site.held("a") < wanted + 3 * 65_536, `${site.held("a")} bytes for ${wanted}`);
  assert(!existsSync(site.fetched("b")), "it has its own");
});

test("a GGUF in three files: workers without them get their layers' chunks of each", async () => {
  await using site = await Site.create("model-00001-of-00003.gguf", (path) => {
    const { metadata, tensors } = syntheticLlama({ layers: LAYERS, embedding: 256, feedForward: 1024 });
    for (const [no, at] of [0, 1, 2].entries()) {
      const own = tensors.filter((_, i) => Math.floor(3 * i / tensors.length) === at);
      const split: typeof metadata = [
        ["split.no", { u32: no }],
        ["split.count", { u32: 3 }],
        ["split.tensors.count", { u32: tensors.length }],
      ];
      const name = path.replace("00001", `0000${no + 1}`);
      writeFileSync(name, writeGguf([...(no === 0 ? metadata : []), ...split], own));
    }
  });
  assert.equal(site.paths.length, 3);
  const { engine } = await servedByTwo(site);
  const { stages } = engine.stats();
  assert.equal(site.total, stages.reduce((sum, { first, end }) => sum + site.share(first, end).length, 0));
  assert(stages.every(({ first, end }) => site.share(first, end).length < 0.6 * site.manifest.chunks));
});

test("a transfer goes on where the worker, the source or the server was killed; damage is found and mended", async () => {
  await using site = await Site.create();
  const right = await expected(site.path);
  site.delayMs = 15;
  await site.offer();
  site.work("a");
  const share = site.share(0, LAYERS);
  const acts = new Map<number, () => void>([
    // Killed without a word, and started again.
    [Math.floor(share.length / 4), () => void site.end("a", "SIGKILL").then(() => site.work("a"))],
    // The source goes, and comes again elsewhere.
    [Math.floor(share.length / 2), () => void site.withdraw().then(() => site.offer())],
    [Math.floor(3 * share.length / 4), () => void site.restartServer()],
  ]);
  const states: Promise<string>[] = [];
  site.onWish = (total) => {
    acts.get(total)?.();
    acts.delete(total);
    if (total % 8 === 0) states.push(apiState(site.engine!));
  };
  const engine = await site.serve();
  assert.equal(acts.size, 0);
  assert.deepEqual(await answers(engine), right);
  // While it loads the API says so, how far each device is, and when to ask again.
  const told = (await Promise.all(states)).filter((text) => text.startsWith("503 loading"));
  assert(
    told.some((text) => /^503 loading; a fetching 0\.\d+ \d+; retry \d+; model_loading \d+/.test(text)),
    told.join("\n"),
  );
  const twice = [...site.wishes.values()].filter((times) => times > 1).length;
  assert.equal(site.wishes.size, share.length);
  assert(twice <= 12, `${twice} chunks were asked for twice; only those on their way may be`);

  // Under a new orchestrator, with a bit of the cache changed meanwhile: that chunk alone is fetched.
  await engine.close();
  await site.end("a", "SIGKILL");
  const data = readFileSync(site.fetched("a"));
  const hit = share[Math.floor(share.length / 3)]!;
  data[CHUNK_BYTES * hit + 1234]! ^= 8;
  writeFileSync(site.fetched("a"), data);
  site.wishes.clear();
  site.work("a");
  const again = await site.serve();
  assert.deepEqual([...site.wishes], [[hit, 1]]);
  assert.deepEqual(await answers(again), right);
  assert.deepEqual(readdirSync(join(site.cache("a"), "fetched")), [site.manifest.root]);
});

test("serve gives its file to workers that may not read it", async () => {
  await using site = await Site.create();
  const flags = ["--nats", site.server.url, "--no-worker", "--port", "0", "--kv-tokens", "256"];
  const serve = new Deno.Command(Deno.execPath(), {
    args: ["run", "-q", "-P=serve", repoPath("mod.ts"), "serve", site.path, ...flags],
    env: { NO_COLOR: "1", LUTRA_CACHE: site.cache("serve") },
    ...{ stdin: "null", stdout: "piped", stderr: "null" },
  }).spawn();
  try {
    site.work("a", [`--deny-read=${site.path}`]);
    let text = "";
    let url: string | undefined;
    for await (const part of serve.stdout.pipeThrough(new TextDecoderStream())) {
      text += part;
      url = /http:\/\/127\.0\.0\.1:\d+/.exec(text)?.[0];
      if (url !== undefined) break;
    }
    assert(url !== undefined, text);
    for (let i = 0;; i++) {
      const health = await fetch(`${url}/healthz`);
      const state = await health.text();
      if (health.ok) break;
      assert(i < 600, state);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    const body = JSON.stringify({ prompt: "a", max_tokens: 8, temperature: 0, ignore_eos: true });
    const response = await fetch(`${url}/v1/completions`, { method: "POST", body });
    const { usage } = await response.json();
    assert.equal(usage.completion_tokens, 8);
    assert.equal(site.total, site.share(0, LAYERS).length);
    assert.deepEqual(readdirSync(join(site.cache("a"), "fetched")), [site.manifest.root]);
  } finally {
    serve.kill("SIGKILL");
    await serve.status;
  }
});

test("who takes a lost worker's place and must fetch much does not hold requests up: they are told, and it serves later", async () => {
  await using site = await Site.create();
  const right = await expected(site.path);
  await site.offer();
  site.work("a");
  const engine = await site.serve({ shards: 1, recoveryTimeoutMs: 500 });
  assert.deepEqual(await answers(engine), right);
  site.work("b");
  while (engine.clusterStatus().workers.length < 2) await new Promise((resolve) => setTimeout(resolve, 20));
  site.delayMs = 60;
  const running = (async () => {
    for await (const _ of engine.generate({ promptTokens: [5, 6], maxTokens: 60, ignoreEos: true })) {
      await site.end("a", "SIGKILL");
    }
  })();
  await assert.rejects(running, /workers are loading the layers of one that was lost/);
  const states = new Set<string>();
  while (engine.failure !== undefined) {
    states.add(await apiState(engine));
    await new Promise((resolve) => setTimeout(resolve, 100));
    if (states.size > 5) site.delayMs = 0;
  }
  const pattern = /^503 loading; b fetching 0\.\d+ \d+; retry \d+; model_loading \d+$/;
  assert([...states].some((text) => pattern.test(text)), [...states].join("\n"));
  assert.deepEqual(await answers(engine), right);
});

test("who stands by has the layers of one that is lost", async () => {
  await using site = await Site.create();
  const right = await expected(site.path);
  await site.offer();
  site.work("a");
  site.work("b");
  const engine = await site.serve({ workers: 2, shards: 2, standby: true });
  // Each gets the other's layers, too.
  const all = site.share(0, LAYERS).length;
  for (let i = 0; ["a", "b"].some((id) => site.held(id) < CHUNK_BYTES * (all - 1)); i++) {
    assert(i < 600, `${site.held("a")} and ${site.held("b")} bytes are there`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  while (engine.state.loading.length > 0) await new Promise((resolve) => setTimeout(resolve, 50));
  await site.withdraw();
  site.wishes.clear();
  const running = answers(engine);
  await site.end("a", "SIGKILL");
  assert.deepEqual(await running, right);
  assert.equal(site.total, 0);
  assert.deepEqual(await answers(engine), right);
});
