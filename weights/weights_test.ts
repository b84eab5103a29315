import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { InProcessBus } from "../bus/mod.ts";
import type { Bus, BusMessage } from "../bus/mod.ts";
import {
  CHUNK_BYTES,
  ChunkFiles,
  chunksOf,
  fetchedPaths,
  HASH_BYTES,
  hashFiles,
  Manifest,
  manifestOf,
  WeightSource,
  WeightStore,
} from "./mod.ts";
import type { WeightProgress } from "./mod.ts";
import { decodeWish, modelSubjects } from "./protocol.ts";

const CHUNKS = 21;
const SIZE = CHUNK_BYTES * (CHUNKS - 1) + 1000;

/** A folder with a file of noise, and what a test needs on both sides of a bus. */
class Site implements AsyncDisposable {
  readonly folder = mkdtempSync(join(tmpdir(), "lutra-weights-"));
  readonly bus = new InProcessBus();
  readonly path = join(this.folder, "model.gguf");
  readonly data = new Uint8Array(SIZE);
  readonly logs: string[] = [];
  manifest!: Manifest;
  readonly ends: (() => Promise<void>)[] = [];

  static async create(): Promise<Site> {
    const site = new Site();
    for (let at = 0; at < SIZE; at += 65_536) crypto.getRandomValues(site.data.subarray(at, at + 65_536));
    site.data.fill(0, CHUNK_BYTES * 7, CHUNK_BYTES * 8); // as padding may be
    writeFileSync(site.path, site.data);
    site.manifest = await hashFiles([site.path]);
    return site;
  }

  get ref() {
    return { root: this.manifest.root, files: [SIZE] };
  }

  cache(name: string): string {
    return join(this.folder, name);
  }

  /** A source with the whole file, or a copy of it that the test has made. */
  async source(id: string, path = this.path): Promise<WeightSource> {
    const file = await ChunkFiles.open([this.path], this.manifest, this.cache(`cache-of-${id}`), "own");
    await file.lacks(Array.from({ length: CHUNKS }, (_, i) => i));
    // What is damaged later is given all the same, as a broken disk would.
    if (path !== this.path) file.read = (chunk) => Promise.resolve(chunkIn(readFileSync(path), chunk));
    const source = new WeightSource({ bus: this.bus, cluster: "c", id, file });
    this.ends.push(() => source.close());
    return source;
  }

  store(id: string, options: { cache?: string; maxBytes?: number; share?: boolean; bus?: Bus } = {}): WeightStore {
    const store = new WeightStore({
      bus: this.bus,
      cluster: "c",
      id,
      cache: this.cache(id),
      maxBytes: 1e9,
      log: (text) => this.logs.push(text),
      ...options,
    });
    this.ends.push(() => store.close());
    return store;
  }

  /** Counts the wishes for each chunk. */
  wishes(): Map<number, number> {
    const counts = new Map<number, number>();
    this.bus.subscribe(modelSubjects("c", this.manifest.root).source("*"), ({ data }) => {
      const { kind, index } = decodeWish(data);
      if (kind === "chunk") counts.set(index, (counts.get(index) ?? 0) + 1);
    });
    return counts;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const end of this.ends.reverse()) await end();
    await this.bus.close();
    rmSync(this.folder, { recursive: true });
  }
}

function chunkIn(data: Uint8Array, chunk: number): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(data.subarray(CHUNK_BYTES * chunk, CHUNK_BYTES * (chunk + 1)));
}

/** The bytes of chunks `first` to `end`. */
function span(first: number, end: number) {
  return { offset: CHUNK_BYTES * first + 1, bytes: Math.min(SIZE, CHUNK_BYTES * end) - CHUNK_BYTES * first - 1 };
}

function assertHas([path]: readonly string[], site: Site, first: number, end: number): void {
  const found = readFileSync(path!);
  assert.equal(found.byteLength, SIZE);
  for (let chunk = first; chunk < end; chunk++) {
    assert.deepEqual(chunkIn(found, chunk), chunkIn(site.data, chunk), `chunk ${chunk}`);
  }
}

const count = (counts: Map<number, number>) => [...counts.values()].reduce((sum, n) => sum + n, 0);

Deno.test("hashFiles: every chunk's hash is SHA-256 of its bytes, and the root changes with each", async () => {
  await using site = await Site.create();
  const { manifest, data } = site;
  assert.equal(manifest.chunks, CHUNKS);
  for (let chunk = 0; chunk < CHUNKS; chunk++) {
    const hash = createHash("sha256").update(chunkIn(data, chunk)).digest();
    assert.deepEqual(Buffer.from(manifest.hashes.subarray(32 * chunk, 32 * chunk + 32)), hash);
  }
  data[SIZE - 1]! ^= 1;
  writeFileSync(site.path, data);
  assert.notEqual((await hashFiles([site.path])).root, manifest.root);
  writeFileSync(site.path, data.subarray(0, SIZE - 1));
  assert.notEqual((await hashFiles([site.path])).root, manifest.root);
});

Deno.test("manifestOf: a file is hashed once, and again when it is another", async () => {
  await using site = await Site.create();
  const cache = site.cache("c");
  let hashed = 0;
  const root = async () => (await manifestOf([site.path], cache, { onProgress: () => hashed++ })).root;
  assert.equal(await root(), site.manifest.root);
  assert.equal(hashed, CHUNKS);
  assert.equal(await root(), site.manifest.root);
  assert.equal(hashed, CHUNKS);
  // A damaged note costs time only.
  for (const name of readdirSync(join(cache, "manifests"))) writeFileSync(join(cache, "manifests", name), "nonsense");
  assert.equal(await root(), site.manifest.root);
  assert.equal(hashed, 2 * CHUNKS);
  site.data[5]! ^= 1;
  writeFileSync(site.path, site.data);
  assert.notEqual(await root(), site.manifest.root);
});

Deno.test("chunksOf: what ranges touch, and none behind the file's end", () => {
  assert.deepEqual(
    chunksOf(
      [{ offset: CHUNK_BYTES - 1, bytes: 2 }, { offset: 0, bytes: 1 }],
      new Manifest([SIZE], new Uint8Array(HASH_BYTES * CHUNKS)),
    ),
    [0, 1],
  );
  assert.deepEqual(
    chunksOf([{ offset: CHUNK_BYTES, bytes: CHUNK_BYTES }], new Manifest([SIZE], new Uint8Array(HASH_BYTES * CHUNKS))),
    [1],
  );
  assert.throws(
    () => chunksOf([{ offset: SIZE, bytes: 1 }], new Manifest([SIZE], new Uint8Array(HASH_BYTES * CHUNKS))),
    /ends behind/,
  );
});

Deno.test("WeightStore: fetches the chunks of the ranges and no others, once, and finds them again", async () => {
  await using site = await Site.create();
  await site.source("o");
  const wishes = site.wishes();
  const seen: WeightProgress[] = [];
  const store = site.store("a");
  const paths = await store.provide(site.ref, ["/nowhere/model.gguf"], [span(3, 9)], {
    onProgress: (p) => seen.push(p),
  });
  assert.deepEqual([...wishes.keys()].sort((a, b) => a - b), [3, 4, 5, 6, 7, 8]);
  assertHas(paths, site, 3, 9);
  assert.equal(seen.at(-1)!.done, 6 * CHUNK_BYTES);
  assert(seen.every(({ done, total }, i) => total === 6 * CHUNK_BYTES && done >= (seen[i - 1]?.done ?? 0)));
  assert(seen.at(-1)!.etaMs === 0);
  assert(512 * statSync(paths[0]!).blocks < 9 * CHUNK_BYTES, "holes take no room");
  // More of it: only what is new.
  await store.provide(site.ref, ["/nowhere"], [span(0, 5), span(20, 21)]);
  assert.equal(count(wishes), 10);
  await store.close();
  // After a restart nothing is fetched, nor is it read: the hashes were noted.
  const again = site.store("a");
  await again.provide(site.ref, ["/nowhere"], [span(0, 9)]);
  assert.equal(count(wishes), 10);
  assert.equal(again.traffic.fetched, 0);
});

Deno.test("WeightStore: the device's own file is used when it is the same, and not when it is another", async () => {
  await using site = await Site.create();
  const wishes = site.wishes();
  await site.source("o");
  const store = site.store("a");
  assert.deepEqual(await store.provide(site.ref, [site.path], [span(2, 4)]), [site.path]);
  assert.equal(count(wishes), 0);
  const other = join(site.folder, "other.gguf");
  const changed = site.data.slice();
  changed[CHUNK_BYTES * 3]! ^= 1;
  writeFileSync(other, changed);
  assert.deepEqual(await store.provide(site.ref, [other], [span(0, 3)]), [other], "what differs is not needed");
  assert.deepEqual(await store.provide(site.ref, [other], [span(2, 4)]), fetchedPaths(site.cache("a"), site.ref));
  assert.equal(count(wishes), 2);
  writeFileSync(other, site.data.subarray(1));
  await store.provide(site.ref, [other], [span(2, 4)]);
  assert.match(site.logs.at(-1)!, /has \d+ bytes, not/);
});

Deno.test("WeightStore: a transfer that was cut goes on with what is missing", async () => {
  await using site = await Site.create();
  const wishes = site.wishes();
  await site.source("o");
  const cut = new AbortController();
  const first = site.store("a");
  let got = 0;
  const running = first.provide(site.ref, ["/nowhere"], [span(0, CHUNKS)], {
    signal: cut.signal,
    onProgress: ({ phase, done }) => {
      if (phase === "fetching" && done > 0 && ++got === 8) cut.abort(new Error("cut"));
    },
  });
  await assert.rejects(running, /cut/);
  const before = first.traffic.fetched;
  assert(before >= 8 && before < CHUNKS, `${before} chunks before the cut`);
  await first.close();
  // As a kill leaves it: no note of what is there.
  rmSync(join(site.cache("a"), "checked"), { recursive: true });
  const second = site.store("a");
  const paths = await second.provide(site.ref, ["/nowhere"], [span(0, CHUNKS)]);
  assertHas(paths, site, 0, CHUNKS);
  // The chunk of zeros may come twice: it looks like a hole.
  assert(second.traffic.fetched >= CHUNKS - before && second.traffic.fetched <= CHUNKS - before + 1);
  assert(count(wishes) <= CHUNKS + 2 + 1, "but for those on their way, nothing twice");
});

Deno.test("WeightStore: a source that dies is replaced by another, a peer with parts of the file", async () => {
  await using site = await Site.create();
  const whole = await site.source("o");
  const peer = site.store("peer");
  await peer.provide(site.ref, ["/nowhere"], [span(0, 12)]);
  const store = site.store("a");
  let got = 0;
  const running = store.provide(site.ref, ["/nowhere"], [span(0, 12)], {
    onProgress: ({ phase }) => {
      if (phase === "fetching" && ++got === 3) void whole.close();
    },
  });
  assertHas(await running, site, 0, 12);
  assert(peer.traffic.sent > 0, "the peer has helped");
});

Deno.test("WeightStore: damaged chunks are refused and asked of others", async () => {
  await using site = await Site.create();
  const bad = join(site.folder, "bad.gguf");
  writeFileSync(bad, site.data.map((byte) => byte ^ 1));
  await site.source("bad", bad);
  await site.source("good");
  const store = site.store("a");
  const paths = await store.provide(site.ref, ["/nowhere"], [span(0, CHUNKS)]);
  assertHas(paths, site, 0, CHUNKS);
  assert(site.logs.some((text) => /comes damaged from bad: it is asked for again/.test(text)), site.logs.join("\n"));
});

Deno.test("WeightStore: a source that lies about everything does no harm but time", async () => {
  await using site = await Site.create();
  const { source, who } = modelSubjects("c", site.manifest.root);
  const answer = (message: BusMessage, text: string) => message.respond(new TextEncoder().encode(text));
  site.bus.subscribe(who, (message) => answer(message, '{"source":"../x","ranges":[]}'));
  site.bus.subscribe(who, (message) => answer(message, "nonsense"));
  site.bus.subscribe(who, (message) => answer(message, `{"source":"liar","ranges":[[0,${CHUNKS}]]}`));
  site.bus.subscribe(source("liar"), (message) => answer(message, "x".repeat(32 * CHUNKS)));
  site.bus.publish(source("o"), Uint8Array.of(1, 2, 3));
  await site.source("o");
  site.bus.publish(source("o"), Uint8Array.of(1, 2, 3));
  site.bus.publish(source("o"), new Uint8Array(8).fill(255));
  const store = site.store("a");
  assertHas(await store.provide(site.ref, ["/nowhere"], [span(0, 4)]), site, 0, 4);
});

Deno.test("WeightStore: a damaged cache is found, and the chunk fetched again", async () => {
  await using site = await Site.create();
  const wishes = site.wishes();
  await site.source("o");
  const store = site.store("a");
  const paths = await store.provide(site.ref, ["/nowhere"], [span(0, 6)]);
  const data = readFileSync(paths[0]!);
  data[CHUNK_BYTES * 4 + 77]! ^= 4;
  writeFileSync(paths[0]!, data);
  wishes.clear();
  await store.provide(site.ref, ["/nowhere"], [span(0, 6)]);
  assert.deepEqual([...wishes], [[4, 1]]);
  assertHas(paths, site, 0, 6);
  await store.close();
  data.fill(0);
  writeFileSync(paths[0]!, data.subarray(5));
  wishes.clear();
  assertHas(await site.store("a").provide(site.ref, ["/nowhere"], [span(0, 6)]), site, 0, 6);
  assert.equal(count(wishes), 6);
});

Deno.test("WeightStore: what was fetched of other models goes when there is no room, the present one never", async () => {
  await using site = await Site.create();
  await site.source("o");
  const old = join(site.cache("a"), "fetched", "0".repeat(64));
  mkdirSync(old, { recursive: true });
  writeFileSync(join(old, "0"), new Uint8Array(1 << 20));
  const foreign = join(site.cache("a"), "fetched", "keep.txt");
  writeFileSync(foreign, "not ours");
  await site.store("a", { maxBytes: 1 << 22 }).provide(site.ref, ["/nowhere"], [span(0, 2)]);
  assert(readdirSync(join(site.cache("a"), "fetched")).includes("0".repeat(64)));
  await site.store("a", { maxBytes: 1 << 20 }).provide(site.ref, ["/nowhere"], [span(0, 4)]);
  assert.deepEqual(
    readdirSync(join(site.cache("a"), "fetched")).sort(),
    [site.manifest.root, "keep.txt"].sort(),
  );
});

Deno.test("WeightStore: a server that takes small messages only is named", async () => {
  await using site = await Site.create();
  const bus = new InProcessBus({ maxPayload: 65_536 });
  await assert.rejects(site.store("a", { bus }).provide(site.ref, ["/nowhere"], [span(0, 1)]), /raise its max_payload/);
  await bus.close();
});

Deno.test("WeightSource: while tokens are on their way it takes breaks", async () => {
  await using site = await Site.create();
  const file = await ChunkFiles.open([site.path], site.manifest, site.cache("s"), "own");
  await file.lacks(Array.from({ length: CHUNKS }, (_, i) => i));
  let asked = 0;
  const source = new WeightSource({ bus: site.bus, cluster: "c", id: "s", file, busy: () => ++asked > 0 });
  await site.store("a").provide(site.ref, ["/nowhere"], [span(0, 5)]);
  assert(asked >= 5, `asked ${asked} times`);
  await source.close();
});

/** A model in three files, of which the one in the middle is smaller than a chunk, and who gives them. */
class Parts implements AsyncDisposable {
  static readonly sizes = [CHUNK_BYTES * 3 + 17, 1000, CHUNK_BYTES * 5];
  readonly site: Site;
  readonly paths: string[];
  readonly data: Uint8Array[];
  manifest!: Manifest;

  private constructor(site: Site) {
    this.site = site;
    this.data = Parts.sizes.map((size, i) => site.data.slice(1000 * i, 1000 * i + size));
    this.paths = Parts.sizes.map((_, i) => join(site.folder, `part-${i}`));
  }

  static async create(): Promise<Parts> {
    const parts = new Parts(await Site.create());
    parts.paths.forEach((path, i) => writeFileSync(path, parts.data[i]!));
    parts.manifest = await manifestOf(parts.paths, parts.site.cache("source"));
    const file = await ChunkFiles.open(parts.paths, parts.manifest, parts.site.cache("source"), "own");
    file.trust();
    parts.site.ends.push(() => source.close());
    const source = new WeightSource({ bus: parts.site.bus, cluster: "c", id: "source", file });
    return parts;
  }

  get ref() {
    return { root: this.manifest.root, files: [...Parts.sizes] };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.site[Symbol.asyncDispose]();
  }
}

Deno.test("Manifest: chunks of several files are numbered file after file; lengths and order are in the root", async () => {
  await using parts = await Parts.create();
  const { manifest } = parts;
  assert.equal(manifest.chunks, 4 + 1 + 5);
  assert.deepEqual([0, 3, 4, 5, 9].map((chunk) => manifest.place(chunk)), [
    { file: 0, offset: 0, bytes: CHUNK_BYTES },
    { file: 0, offset: 3 * CHUNK_BYTES, bytes: 17 },
    { file: 1, offset: 0, bytes: 1000 },
    { file: 2, offset: 0, bytes: CHUNK_BYTES },
    { file: 2, offset: 4 * CHUNK_BYTES, bytes: CHUNK_BYTES },
  ]);
  const roots = [[0, 1, 2], [1, 0, 2], [0, 1]].map(async (order) =>
    (await hashFiles(order.map((i) => parts.paths[i]!))).root
  );
  assert.equal(new Set(await Promise.all(roots)).size, 3);
  assert.equal(await roots[0], manifest.root);
  assert.deepEqual(
    chunksOf([{ file: 2, offset: CHUNK_BYTES - 1, bytes: 2 }, { file: 1, offset: 9, bytes: 1 }], manifest),
    [
      ...[4, 5, 6],
    ],
  );
  assert.throws(() => chunksOf([{ file: 1, offset: 1000, bytes: 1 }], manifest), /ends behind/);
  assert.throws(() => chunksOf([{ file: 3, offset: 0, bytes: 1 }], manifest), /in file 3 of 3/);
});

Deno.test("WeightStore: of several files the chunks that are needed are fetched, once, and found again", async () => {
  await using parts = await Parts.create();
  const { site, ref } = parts;
  const spans = [{ offset: CHUNK_BYTES * 3, bytes: 17 }, { file: 1, offset: 0, bytes: 1000 }, {
    ...{ file: 2, offset: CHUNK_BYTES * 2, bytes: 5 },
  }];
  for (const fetched of [3, 0]) {
    const store = site.store("a");
    const paths = await store.provide(ref, ["/nowhere/0", "/nowhere/1", "/nowhere/2"], spans);
    assert.deepEqual(paths, fetchedPaths(site.cache("a"), ref));
    for (const { file = 0, offset, bytes } of spans) {
      const found: Uint8Array = readFileSync(paths[file]!);
      assert.equal(found.byteLength, Parts.sizes[file]);
      assert.deepEqual(
        found.subarray(offset, offset + bytes),
        Buffer.from(parts.data[file]!.subarray(offset, offset + bytes)),
      );
    }
    assert.equal(store.traffic.fetched, fetched);
    await store.close();
  }
});

Deno.test("WeightStore: a device uses its own files where it has those that it needs, and gives others what it has", async () => {
  await using parts = await Parts.create();
  const { site, ref } = parts;
  const own = Parts.sizes.map((_, i) => join(site.folder, "own", `part-${i}`));
  mkdirSync(join(site.folder, "own"));
  for (const i of [0, 2]) writeFileSync(own[i]!, parts.data[i]!);
  const store = site.store("a");
  const first = [{ offset: 5, bytes: CHUNK_BYTES }, { file: 2, offset: 0, bytes: 9 }];
  assert.deepEqual(await store.provide(ref, own, first), own);
  assert.equal(store.traffic.fetched, 0);
  // One of its files is missing, or another: what it needs is fetched.
  const second = [...first, { file: 1, offset: 0, bytes: 1000 }];
  assert.deepEqual(await store.provide(ref, own, second), fetchedPaths(site.cache("a"), ref));
  assert.equal(store.traffic.fetched, 4);
  assert.match(site.logs.at(-1)!, /not all that is needed/);
  writeFileSync(own[1]!, new Uint8Array(999));
  assert.deepEqual(await store.provide(ref, own, first), fetchedPaths(site.cache("a"), ref));
  assert.match(site.logs.at(-1)!, /has 999 bytes, not 1000/);
  assert.deepEqual(await store.provide(ref, own.slice(1), first), fetchedPaths(site.cache("a"), ref));
  assert.match(site.logs.at(-1)!, /2 files are named of a model in 3/);
});
